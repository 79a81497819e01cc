"""The data set of clouds and views."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from crosspoint.data import PairDataset
from crosspoint.data.ply import read_points, write_points


def points_of(number, count=20):
    return np.random.default_rng(number).normal(size=(count, 3)).astype(np.float32)


def add_shape(root, name, number=0, views=3, count=20, suffix="png", size=(12, 10)):
    """A shape whose view v is plain grey of value 10 * number + v."""
    cloud = root / "ShapeNet" / f"{name}.ply"
    cloud.parent.mkdir(parents=True, exist_ok=True)
    write_points(cloud, points_of(number, count))
    folder = root / "ShapeNetRendering" / name / "rendering"
    folder.mkdir(parents=True, exist_ok=True)
    for view in range(views):
        grey = np.full((size[1], size[0], 3), 10 * number + view, np.uint8)
        Image.fromarray(grey).save(folder / f"{view:02d}.{suffix}")
    return cloud, folder


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(["table/b", "chair/z", "chair/a", "lamp/c"]):
        add_shape(tmp_path, name, number)
    return tmp_path


def dataset(root, **options):
    return PairDataset(root, **{"points": 16, "image_size": 8, **options})


def test_items_names_classes(root):
    data = dataset(root)
    assert data.names == ["chair/a", "chair/z", "lamp/c", "table/b"]
    assert data.classes == ["chair", "lamp", "table"]
    assert len(data) == 4
    item = data[1]
    assert item["points"].shape == (16, 3) and item["points"].dtype == torch.float32
    assert torch.equal(item["points"], torch.from_numpy(points_of(1)[:16]))
    assert item["image"].shape == (3, 8, 8) and item["image"].dtype == torch.uint8
    assert item["index"] == 1
    assert (item["image"] // 10 == 1).all()  # the picture belongs to the shape
    with pytest.raises(IndexError, match="out of range for 4"):
        data[4]


def test_items_may_be_changed_in_place(root):
    data = dataset(root)
    data[0]["points"].zero_()
    assert torch.equal(data[0]["points"], torch.from_numpy(points_of(2)[:16]))


def views(data, epochs=8):
    drawn = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        drawn.append([int(data[index]["image"][0, 0, 0]) % 10 for index in range(len(data))])
    return np.array(drawn)


def test_the_view_depends_on_seed_epoch_and_index_alone(root):
    drawn = views(dataset(root))
    assert set(drawn.ravel()) == {0, 1, 2}
    torch.manual_seed(1)
    np.random.seed(1)
    again = dataset(root)
    again.set_epoch(5)
    assert int(again[2]["image"][0, 0, 0]) % 10 == drawn[5, 2]
    assert (views(again) == drawn).all()
    assert (views(dataset(root, seed=1)) != drawn).any()
    assert all(len(set(column)) > 1 for column in drawn.T)
    assert any(len(set(row)) > 1 for row in drawn)


def test_several_views_are_different_ones_of_the_shape(root):
    data = dataset(root, views=2)
    drawn = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        for index in range(len(data)):
            image = data[index]["image"]
            assert image.shape == (2, 3, 8, 8)
            first, second = (int(view[0, 0, 0]) for view in image)
            assert (
                first != second
                and first // 10 == second // 10 == int(dataset(root)[index]["image"][0, 0, 0]) // 10
            )
            drawn.add((index, first % 10, second % 10))
            cloud, *files = data.sources(index)
            assert np.array_equal(read_points(cloud)[:16], data[index]["points"])
            assert [np.asarray(Image.open(file))[0, 0, 0] for file in files] == [first, second]
    assert len(drawn) > 12  # of 4 x 6: pairs change from epoch to epoch
    data.set_epoch(3)
    again = dataset(root, views=2)
    again.set_epoch(3)
    assert torch.equal(data[2]["image"], again[2]["image"])
    with pytest.raises(
        ValueError, match=r"4 shapes under .* have fewer than 4 views: chair/a, .*; ask for fewer"
    ):
        dataset(root, views=4)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_change_nothing(root, context):
    expected = views(dataset(root), 3)
    data = dataset(root)
    loader = DataLoader(
        data, batch_size=2, num_workers=2, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in range(3):  # the same processes see every epoch
        data.set_epoch(epoch)
        batches = list(loader)
        assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2, 3]
        images = torch.cat([batch["image"] for batch in batches])
        assert (images[:, 0, 0, 0].numpy() % 10 == expected[epoch]).all()
        points = torch.cat([batch["points"] for batch in batches])
        assert torch.equal(points[3], torch.from_numpy(points_of(0)[:16]))


def test_pickle_keeps_the_epoch(root):
    data = dataset(root)
    data.set_epoch(6)
    copy = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(data[index]["image"], copy[index]["image"]) for index in range(4))


def test_transparent_becomes_white(tmp_path):
    _, folder = add_shape(tmp_path, "a/b", views=0)
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (200, 0, 0, 255)
    rgba[:, 4:6] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(folder / "00.png")
    image = dataset(tmp_path)[0]["image"]
    assert (image[:, :, :4] == torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]).all()
    assert ((image[:, :, 4:6].int() - 127).abs() <= 1).all()
    assert (image[:, :, 6:] == 255).all()


def test_transparent_palette_and_grey(tmp_path):
    _, folder = add_shape(tmp_path, "a/palette", views=0)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (0, 0, 8, 4))
    palette.save(folder / "00.png", transparency=0)
    _, folder = add_shape(tmp_path, "b/grey", views=0)
    Image.new("L", (8, 8), 77).save(folder / "00.png")
    data = dataset(tmp_path)
    assert data[0]["image"][:, 0, 0].tolist() == [40, 50, 60]
    assert data[0]["image"][:, 7, 0].tolist() == [255, 255, 255]
    assert (data[1]["image"] == 77).all()


def test_images_are_resized_to_a_square(tmp_path):
    _, folder = add_shape(tmp_path, "a/b", views=0)
    wide = np.zeros((24, 48, 3), np.uint8)
    wide[:, 24:] = 255
    Image.fromarray(wide).save(folder / "00.jpg", quality=100)
    image = dataset(tmp_path, image_size=16)[0]["image"]
    assert image.shape == (3, 16, 16)
    assert (image[:, :, :6] < 10).all() and (image[:, :, 10:] > 245).all()


def test_files_that_are_none_of_ours_are_passed_over(root):
    for path in ("ShapeNet/chair/._a.ply", "ShapeNet/chair/new.ply.tmp", "ShapeNet/notes.txt"):
        (root / path).write_text("x")
    rendering = root / "ShapeNetRendering/chair/a/rendering"
    (rendering / "rendering_metadata.txt").write_text("x")
    (rendering / "._00.png").write_text("x")
    (root / "ShapeNetRendering/sofa").mkdir()
    data = dataset(root)
    assert data.names == ["chair/a", "chair/z", "lamp/c", "table/b"]
    assert set(views(data).ravel()) == {0, 1, 2}


def test_a_missing_or_empty_folder_is_named_with_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; expected layout: .*rendering"):
        dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no folder .*ShapeNet; expected layout"):
        dataset(tmp_path)
    (tmp_path / "ShapeNet" / "chair").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no .ply file under .*ShapeNet; expected layout"):
        dataset(tmp_path)


def test_shapes_without_a_view_are_named(root):
    for number, name in enumerate(["chair/m", "lamp/n"]):
        _, folder = add_shape(root, name, number, views=0)
    folder.rmdir()
    with pytest.raises(FileNotFoundError, match=r"2 shapes .* have no image .*: chair/m, lamp/n; expected"):
        dataset(root)


def truncate(path, keep=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    _, folder = add_shape(tmp_path, "a/b", views=0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"00.{suffix}")
    data = dataset(tmp_path)
    data[0]
    truncate(folder / f"00.{suffix}")
    with pytest.raises(ValueError, match=rf"rendering.00\.{suffix}: the image cannot be read"):
        data[0]


def test_an_image_of_more_than_8_bits_is_refused(tmp_path):
    _, folder = add_shape(tmp_path, "a/b", views=0)
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / "00.png")
    with pytest.raises(ValueError, match=r"00\.png: .*mode I;16 are not supported"):
        dataset(tmp_path)[0]


def test_broken_and_short_clouds_are_named(root):
    add_shape(root, "chair/short", count=9)
    with pytest.raises(ValueError, match=r"short\.ply: has 9 points, 16 were asked for"):
        dataset(root)
    assert len(dataset(root, points=9)) == 5
    truncate(root / "ShapeNet" / "chair" / "short.ply", 0.9)
    with pytest.raises(ValueError, match=r"short\.ply: cut short"):
        dataset(root)


def test_skip_leaves_out_what_is_broken_and_says_so(root):
    add_shape(root, "chair/short", count=9)
    add_shape(root, "chair/viewless", views=0)
    _, one_bad = add_shape(root, "lamp/d", 5)
    _, all_bad = add_shape(root, "lamp/e", 6)
    for path in (one_bad / "01.png", *all_bad.iterdir()):
        truncate(path)
    with pytest.warns(UserWarning, match=r"left out under .*: 6 files .*short\.ply: has 9 points"):
        data = dataset(root, on_error="skip")
    assert data.names == ["chair/a", "chair/z", "lamp/c", "lamp/d", "table/b"]
    skipped = {path.relative_to(root).as_posix() for path, _ in data.skipped}
    views_of_e = {f"ShapeNetRendering/lamp/e/rendering/{view:02d}.png" for view in range(3)}
    assert skipped == views_of_e | {
        "ShapeNet/chair/short.ply",
        "ShapeNet/chair/viewless.ply",
        "ShapeNetRendering/lamp/d/rendering/01.png",
    }
    assert set(views(data, 20)[:, 3]) == {0, 2}
    assert torch.equal(data[4]["points"], torch.from_numpy(points_of(0)[:16]))


def test_skip_with_nothing_left_is_an_error(tmp_path):
    add_shape(tmp_path, "chair/short", count=9)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no usable shape under"):
        dataset(tmp_path, on_error="skip")


@pytest.mark.parametrize("options", [{"points": 0}, {"image_size": 0}, {"on_error": "ignore"}])
def test_bad_options(root, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dataset(root, **options)


def test_a_negative_epoch_is_refused(root):
    with pytest.raises(ValueError, match="epoch must not be negative"):
        dataset(root).set_epoch(-1)


def test_importing_needs_torch_and_numpy_alone():
    code = (
        "import sys\n"
        "for name in ('PIL', 'h5py', 'trimesh', 'embreex', 'tqdm', 'scipy', 'kornia'):\n"
        "    sys.modules[name] = None\n"
        "import crosspoint.data as data\n"
        "assert 'torch' not in sys.modules\n"
        "assert {'PairDataset', 'load_modelnet40'} <= set(dir(data))\n"
        "from crosspoint.data import LabelledClouds, PairDataset, load_modelnet40, write_modelnet40\n"
        "from crosspoint.data import prepare\n"
        "try: PairDataset('.')\n"
        "except ImportError as error: assert 'crosspoint[train]' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_export_is_an_attribute_error():
    import crosspoint.data

    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = crosspoint.data.Nonsense
