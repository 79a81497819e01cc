"""ScanObjectNN, ShapeNetPart, S3DIS and ModelNet40's text form, and the report on a folder."""

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from crosspoint import cli
from crosspoint.data import (
    load_modelnet40_text,
    load_parts,
    load_s3dis,
    load_scanobjectnn,
    write_modelnet40,
)
from crosspoint.data.check import check_folder
from crosspoint.data.modelnet import LabelledClouds
from crosspoint.data.ply import write_points

rng = np.random.default_rng(0)


def h5(path, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file[name] = values
    return path


def cloud(n, points=8, channels=3):
    return rng.normal(size=(n, points, channels)).astype(np.float32)


# ---- ScanObjectNN


def test_scanobjectnn_variants(tmp_path):
    data = {key: cloud(4) for key in ("bg", "only", "hard", "train")}
    labels = np.array([0, 3, 14, 7])
    h5(tmp_path / "main_split/test_objectdataset.h5", data=data["bg"], label=labels)
    h5(tmp_path / "main_split/training_objectdataset.h5", data=data["train"], label=labels)
    h5(tmp_path / "main_split_nobg/test_objectdataset.h5", data=data["only"], label=labels)
    h5(tmp_path / "main_split/test_objectdataset_augmentedrot_scale75.h5", data=data["hard"], label=labels)
    for variant, key in (("OBJ_BG", "bg"), ("OBJ_ONLY", "only"), ("PB_T50_RS", "hard")):
        loaded = load_scanobjectnn(tmp_path, "test", variant=variant, points=5)
        assert np.array_equal(loaded.points, data[key][:, :5]) and loaded.labels.tolist() == labels.tolist()
        assert len(loaded.class_names) == 15 and loaded.class_names[4] == "chair"
    assert np.array_equal(load_scanobjectnn(tmp_path / "main_split", "train", points=8).points, data["train"])
    with pytest.raises(FileNotFoundError, match=r"no test_objectdataset\.h5 or|no folder"):
        load_scanobjectnn(tmp_path / "main_split", "test", variant="OBJ_ONLY", points=8)
    with pytest.raises(FileNotFoundError, match=r"training_objectdataset_augmentedrot_scale75\.h5"):
        load_scanobjectnn(tmp_path, "train", variant="PB_T50_RS")


def test_scanobjectnn_renamed_and_wrong(tmp_path):
    h5(tmp_path / "train.h5", data=cloud(2), label=np.array([1, 2]))
    assert load_scanobjectnn(tmp_path, "train", points=8).labels.tolist() == [1, 2]
    h5(tmp_path / "test.h5", data=cloud(2), label=np.array([1, 15]))
    with pytest.raises(ValueError, match=r"test\.h5: has label 15, but there are 15 classes"):
        load_scanobjectnn(tmp_path, "test", points=8)
    with pytest.raises(ValueError, match="variant must be one of OBJ_BG, OBJ_ONLY, PB_T50_RS, got 'x'"):
        load_scanobjectnn(tmp_path, "test", variant="x")
    with pytest.raises(ValueError, match="split must be"):
        load_scanobjectnn(tmp_path, "val")


# ---- parts


def test_shapenetpart_by_its_counts(tmp_path):
    pid = np.array([[0, 1, 2, 3, 0, 0, 1, 1], [47, 48, 49, 47, 47, 47, 47, 47]])
    h5(
        tmp_path / "ply_data_train0.h5",
        data=cloud(2),
        label=np.array([[0], [15]], np.uint8),
        pid=pid.astype(np.uint8),
    )
    h5(tmp_path / "ply_data_val0.h5", data=cloud(1), label=np.array([[2]]), pid=np.full((1, 8), 6))
    h5(tmp_path / "ply_data_test0.h5", data=cloud(1), label=np.array([[15]]), pid=np.full((1, 8), 49))
    train = load_parts(tmp_path, "train", points=8)
    assert train.categories.tolist() == [0, 15] and train.parts.tolist() == pid.tolist()
    assert train.category_names[15] == "table" and train.parts_of[15] == (47, 48, 49)
    assert (
        len(train.part_names) == 50
        and train.parts_of[0] == (0, 1, 2, 3)
        and train.parts_of[10] == tuple(range(30, 36))
    )
    assert load_parts(tmp_path, "trainval", points=8).categories.tolist() == [0, 15, 2]
    assert load_parts(tmp_path, "test", points=4).parts.shape == (1, 4)


def test_other_parts_from_names_and_files(tmp_path):
    (tmp_path / "categories.txt").write_text("cup\nhand\n")
    (tmp_path / "parts.txt").write_text("cup/body\ncup/handle\nhand/palm\nhand/finger\n")
    h5(tmp_path / "train0.h5", data=cloud(2), label=np.array([[0], [1]]), pid=np.array([[0, 1] * 4, [2] * 8]))
    h5(tmp_path / "test0.h5", data=cloud(1), label=np.array([[1]]), pid=np.array([[2, 3] * 4]))
    train = load_parts(tmp_path, "train", points=8)
    assert train.category_names == ("cup", "hand") and train.parts_of == ((0, 1), (2, 3))
    assert load_parts(tmp_path, "trainval", points=8).categories.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"label": np.array([[0]]), "pid": np.full((1, 8), 9)},
            r"shape 0, a airplane, has part 9; its parts are",
        ),
        ({"label": np.array([[0]]), "pid": np.zeros((1, 4), int)}, r"'pid' has shape \(1, 4\)"),
        ({"label": np.array([[0]])}, "has no 'pid'"),
        ({"label": np.array([[0.5]]), "pid": np.zeros((1, 8), int)}, "'label': labels must be whole numbers"),
        ({"label": np.array([[-1]]), "pid": np.zeros((1, 8), int)}, "labels start at -1"),
    ],
)
def test_wrong_parts_are_named(tmp_path, fields, reason):
    h5(tmp_path / "train0.h5", data=cloud(1), **fields)
    with pytest.raises(ValueError, match=reason):
        load_parts(tmp_path, "train", points=8)


# ---- S3DIS


def rooms(tmp_path, names=("Area_1_office_1", "Area_5_hall_2", "Area_2_wc_1")):
    for i in range(len(names)):
        h5(
            tmp_path / f"ply_data_all_{i}.h5",
            data=np.full((1, 8, 9), i, np.float32),
            label=np.full((1, 8), i),
        )
    (tmp_path / "room_filelist.txt").write_text("".join(f"{name}\n" for name in names))


def test_s3dis_areas(tmp_path):
    rooms(tmp_path)
    test, train = (load_s3dis(tmp_path, split, points=6) for split in ("test", "train"))
    assert test.points.shape == (1, 6, 9) and test.labels.unique().tolist() == [1]
    assert train.labels[:, 0].tolist() == [0, 2] and len(train.class_names) == 13
    assert load_s3dis(tmp_path, "test", test_area=1, points=8).labels.unique().tolist() == [0]


def test_s3dis_files_go_by_number(tmp_path):
    rooms(tmp_path, [f"Area_{1 + i % 6}_x_{i}" for i in range(12)])
    assert load_s3dis(tmp_path, "test", test_area=5, points=8).labels[:, 0].tolist() == [4, 10]


def test_wrong_s3dis_is_named(tmp_path):
    rooms(tmp_path)
    (tmp_path / "room_filelist.txt").write_text("Area_1\n")
    with pytest.raises(ValueError, match="names 1 blocks, but the files hold 3"):
        load_s3dis(tmp_path, "train", points=8)
    (tmp_path / "room_filelist.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"room_filelist\.txt"):
        load_s3dis(tmp_path, "train", points=8)
    with pytest.raises(ValueError, match="test_area must be between 1 and 6"):
        load_s3dis(tmp_path, "train", test_area=7)


# ---- ModelNet40 as text


def text_set(tmp_path, points=5):
    (tmp_path / "modelnet40_shape_names.txt").write_text("airplane\nnight_stand\n")
    (tmp_path / "modelnet40_train.txt").write_text("night_stand_0001\nairplane_0002\n")
    (tmp_path / "modelnet40_test.txt").write_text("airplane_0001\n")
    values = {}
    for shape in ("night_stand_0001", "airplane_0002", "airplane_0001"):
        values[shape] = rng.normal(size=(points, 6)).astype(np.float32)
        folder = tmp_path / shape.rpartition("_")[0]
        folder.mkdir(exist_ok=True)
        np.savetxt(folder / f"{shape}.txt", values[shape], delimiter=",", fmt="%.6f")
    return values


def test_modelnet40_text(tmp_path):
    values = text_set(tmp_path)
    train = load_modelnet40_text(tmp_path, "train", points=4)
    assert train.labels.tolist() == [1, 0] and train.class_names == ("airplane", "night_stand")
    np.testing.assert_allclose(train.points[0], values["night_stand_0001"][:4, :3], atol=1e-6)
    with pytest.raises(
        ValueError, match=r"airplane_0001\.txt: has 5 lines of 6 numbers, expected at least 9"
    ):
        load_modelnet40_text(tmp_path, "test", points=9)
    (tmp_path / "airplane/airplane_0001.txt").write_text("1,2,x,0,0,0\n")
    with pytest.raises(ValueError, match=r"airplane_0001\.txt: "):
        load_modelnet40_text(tmp_path, "test", points=1)
    (tmp_path / "airplane/airplane_0001.txt").unlink()
    with pytest.raises(FileNotFoundError, match="which the listing names"):
        load_modelnet40_text(tmp_path, "test", points=1)
    (tmp_path / "modelnet40_test.txt").write_text("sofa_0001\n")
    with pytest.raises(ValueError, match="'sofa_0001' is of no class"):
        load_modelnet40_text(tmp_path, "test", points=1)


# ---- the report


def test_report_names_every_set_and_fault(tmp_path, capsys):
    clouds = LabelledClouds(torch.from_numpy(cloud(3)), torch.tensor([0, 1, 1]), ("a", "b"))
    write_modelnet40(tmp_path, "train", clouds)
    h5(tmp_path / "main_split/test_objectdataset.h5", data=cloud(1), label=np.array([99]))
    reports = {report.kind: report for report in check_folder(tmp_path, points=8)}
    modelnet = reports["ModelNet40, h5"]
    assert (
        "train: 3 clouds of 8 points (the published set has 9840 or 9843), 2 of 2 classes, 1 to 2 clouds a class"
        in (modelnet.lines[0])
    )
    assert "radius about the mean" in modelnet.lines[1]
    assert [p for p in modelnet.problems if p.startswith("test: no ply_data_test*.h5")]
    assert any("has label 99" in p for p in reports["ScanObjectNN, OBJ_BG"].problems)
    assert cli.main(["data", "check", str(tmp_path), "--points", "8"]) == 1
    said = capsys.readouterr()
    assert "wrong: test: no ply_data_test*.h5" in said.out and "problems, listed above" in said.err


def test_report_on_pairs_and_parts(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "ShapeNet/x").mkdir(parents=True, exist_ok=True)
        write_points(tmp_path / f"ShapeNet/x/{name}.ply", cloud(1)[0])
        views = tmp_path / f"ShapeNetRendering/x/{name}/rendering"
        views.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(views / "0.png")
    h5(tmp_path / "my_train.h5", data=cloud(1), label=np.array([[0]]), pid=np.zeros((1, 8), int))
    h5(tmp_path / "my_test.h5", data=cloud(1), label=np.array([[0]]), pid=np.ones((1, 8), int))
    assert cli.main(["data", "check", str(tmp_path), "--points", "8"]) == 0
    said = capsys.readouterr().out
    assert "2 shapes in 1 classes, 1 to 1 readable images each" in said
    assert "train: 1 clouds of 8 points, 1 of 16 categories, 1 of 50 parts" in said
    (tmp_path / "ShapeNetRendering/x/b/rendering/0.png").write_bytes(b"broken")
    assert cli.main(["data", "check", str(tmp_path), "--points", "8"]) == 1
    assert "the image cannot be read" in capsys.readouterr().out


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no data set of a known layout"):
        check_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_folder(tmp_path / "nowhere")
