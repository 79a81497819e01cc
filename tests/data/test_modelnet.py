"""ModelNet40's h5 files."""

import h5py
import numpy as np
import pytest
import torch

from crosspoint.data import LabelledClouds, load_modelnet40, write_modelnet40

FOLDER = "modelnet40_ply_hdf5_2048"


def clouds(n=6, points=20, seed=0):
    rng = np.random.default_rng(seed)
    return LabelledClouds(
        torch.from_numpy(rng.normal(size=(n, points, 3)).astype(np.float32)),
        torch.from_numpy(rng.integers(0, 3, n)),
        ("airplane", "chair", "table"),
    )


def write(path, data, label):
    with h5py.File(path, "w") as file:
        if data is not None:
            file["data"] = data
        if label is not None:
            file["label"] = label


def test_round_trip_from_the_folder_or_its_parent(tmp_path):
    train, test = clouds(), clouds(4, seed=1)
    write_modelnet40(tmp_path, "train", train)
    write_modelnet40(tmp_path / FOLDER, "test", test)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [
        "ply_data_test0.h5",
        "ply_data_train0.h5",
        "shape_names.txt",
    ]
    for root in (tmp_path, tmp_path / FOLDER):
        for split, expected in (("train", train), ("test", test)):
            loaded = load_modelnet40(root, split, points=20)
            assert torch.equal(loaded.points, expected.points)
            assert torch.equal(loaded.labels, expected.labels) and loaded.labels.dtype == torch.int64
            assert loaded.class_names == expected.class_names
    assert torch.equal(load_modelnet40(tmp_path, "train", points=7).points, train.points[:, :7])


def test_files_are_joined_in_the_order_of_their_names(tmp_path):
    everything = clouds(9)
    points, labels = everything.points.numpy(), everything.labels.numpy()
    write(tmp_path / "ply_data_test1.h5", points[4:], labels[4:, None].astype(np.uint8))
    write(tmp_path / "ply_data_test0.h5", points[:4], labels[:4])
    loaded = load_modelnet40(tmp_path, "test", points=20)
    assert torch.equal(loaded.points, everything.points)
    assert torch.equal(loaded.labels, everything.labels)
    assert loaded.class_names == tuple(map(str, range(int(labels.max()) + 1)))


def test_a_missing_folder_or_file_is_named_with_the_layout(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere; expected layout: ply_data_train\*\.h5"
    ):
        load_modelnet40(tmp_path / "nowhere", "train")
    write_modelnet40(tmp_path, "train", clouds())
    with pytest.raises(FileNotFoundError, match=r"no ply_data_test\*\.h5 in .*; expected layout"):
        load_modelnet40(tmp_path, "test")


ZEROS = np.zeros((5, 8, 3), np.float32)
LABELS = np.zeros((5, 1), np.uint8)


@pytest.mark.parametrize(
    ("data", "label", "reason"),
    [
        (None, LABELS, "has no 'data'"),
        (ZEROS, None, "has no 'label'"),
        (ZEROS[..., :2], LABELS, r"shape \(5, 8, 2\)"),
        (ZEROS[0], LABELS, r"shape \(8, 3\)"),
        (ZEROS, LABELS[:4], r"'label' \(4, 1\)"),
        (ZEROS[:, :4], LABELS, "has 4 points per cloud, 8 were asked for"),
        (np.where(np.arange(5)[:, None, None] == 3, np.nan, ZEROS), LABELS, "cloud 3 is not finite"),
        (ZEROS, LABELS.astype(np.float32), "labels must be whole numbers"),
        (ZEROS, LABELS.astype(np.int8) - 1, "labels start at -1"),
        (ZEROS, LABELS + 3, "names 3 classes, but a label is 3"),
    ],
)
def test_wrong_content_is_named(tmp_path, data, label, reason):
    write(tmp_path / "ply_data_train0.h5", data, label)
    (tmp_path / "shape_names.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match=reason):
        load_modelnet40(tmp_path, "train", points=8)


def test_a_truncated_file_is_named(tmp_path):
    write_modelnet40(tmp_path, "train", clouds(50))
    path = tmp_path / FOLDER / "ply_data_train0.h5"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"ply_data_train0\.h5: not a readable h5 file"):
        load_modelnet40(tmp_path, "train", points=20)


def test_writing_never_mixes_with_what_is_there(tmp_path):
    write_modelnet40(tmp_path, "train", clouds())
    write_modelnet40(tmp_path, "train", clouds(3))
    assert len(load_modelnet40(tmp_path, "train", points=20).labels) == 3
    with pytest.raises(ValueError, match="names other classes"):
        write_modelnet40(tmp_path, "test", clouds()._replace(class_names=("a", "b", "c")))
    write(tmp_path / FOLDER / "ply_data_train1.h5", ZEROS, LABELS)
    with pytest.raises(FileExistsError, match=r"already holds ply_data_train1\.h5"):
        write_modelnet40(tmp_path, "train", clouds())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "expected points"),
        ({"class_names": ("a",)}, "of which there are 1"),
        ({"points": torch.zeros(6, 20, 2)}, "expected points"),
    ],
)
def test_writing_checks_the_clouds(tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        write_modelnet40(tmp_path, "train", clouds()._replace(**change))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        load_modelnet40(tmp_path, "val")
    write_modelnet40(tmp_path, "train", clouds())
    with pytest.raises(ValueError, match="points must be at least 1"):
        load_modelnet40(tmp_path, "train", points=0)
