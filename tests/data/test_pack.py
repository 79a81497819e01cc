"""Packed pairs: the items of what was packed, and what happens when a shard or the packing is cut short."""

import errno
import io
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crosspoint import cli
from crosspoint.data import PackedPairs, PairDataset
from crosspoint.data import pack as pack_module
from crosspoint.data.pack import PackConfig, pack
from crosspoint.data.ply import write_points

SHAPES = 7


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Seven shapes with one to three views of other sizes than are packed."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for i in range(SHAPES):
        name = f"{('chair', 'table')[i % 2]}/shape{i}"
        cloud, views = root / "ShapeNet" / f"{name}.ply", root / "ShapeNetRendering" / name / "rendering"
        cloud.parent.mkdir(parents=True, exist_ok=True)
        views.mkdir(parents=True)
        write_points(cloud, rng.normal(size=(20, 3)).astype(np.float32))
        for view in range(1 + i % 3):
            pixels = rng.integers(0, 256, (20, 24, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(views / f"{view:02}.png")
    return root


def config(pairs: Path, out: Path, **changes) -> PackConfig:
    return PackConfig(str(pairs), str(out), **{"points": 16, "image_size": 12, "shard_size": 3, **changes})


@pytest.fixture(scope="module")
def packed(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "pack"
    done = pack(config(pairs, out))
    assert done == {"out": str(out), "shapes": SHAPES, "views": 13, "shards": 3, "made": 3}
    return out


def assert_same(found: PairDataset, expected: PairDataset) -> None:
    assert found.names == expected.names and found.classes == expected.classes
    assert found.views_per_shape == expected.views_per_shape
    for epoch in range(3):
        found.set_epoch(epoch)
        expected.set_epoch(epoch)
        for i in range(-1, SHAPES):
            a, b = found[i], expected[i]
            assert a.keys() == b.keys() and a["index"] == b["index"]
            assert torch.equal(a["points"], b["points"]) and torch.equal(a["image"], b["image"])
            assert a["image"].dtype == torch.uint8 and a["points"].dtype == torch.float32


@pytest.mark.parametrize("points", [16, 5])
def test_items_are_those_of_the_files(pairs, packed, points):
    """The same views in the same epochs, bit by bit, also after a loader process has got the set by pickling."""
    options = {"points": points, "image_size": 12, "seed": 4}
    found = PackedPairs(packed, **options)
    assert_same(found, PairDataset(pairs, **options))
    assert_same(pickle.loads(pickle.dumps(found)), PairDataset(pairs, **options))
    assert len(pickle.dumps(found)) < 4000, "shards travel with it"
    for i in range(SHAPES):
        arrays = [np.load(path)[int(row)] for path, row in map(row_of, found.sources(i))]
        assert np.array_equal(arrays[0][:points], found[i]["points"])
        assert np.array_equal(np.moveaxis(arrays[1], -1, 0), found[i]["image"])
    item = found[0]["points"]
    item.zero_()
    assert found[0]["points"].any(), "an item shares memory with the shard"


def test_options_that_were_not_packed(packed, pairs):
    for options, message in (
        ({"image_size": 24}, "holds images of 12 pixels, 24 were asked for"),
        ({"points": 17}, "holds 16 points per cloud, 17 were asked for"),
        ({"views": 2}, "shapes under .* have fewer than 2 views"),
        ({"points": 0}, "points must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedPairs(packed, **{"points": 16, "image_size": 12, **options})
    with pytest.raises(ValueError, match="holds a pack of other shapes or with other options"):
        pack(config(pairs, packed, image_size=8))
    with pytest.raises(ValueError, match="shard_size must be at least 1"):
        pack(config(pairs, packed, shard_size=0))


@pytest.mark.parametrize("kind", ["clouds", "images", "checksums"])
def test_a_truncated_shard_is_named(pairs, packed, tmp_path, kind):
    out = copied(packed, tmp_path)
    path = out / f"shard-00001.{kind}.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"shard-00001\.{kind}\.npy is missing or cut short .*pack again"):
        PackedPairs(out, points=16, image_size=12)
    path.unlink()
    assert pack(config(pairs, out))["made"] == 1
    assert_same(PackedPairs(out, points=16, image_size=12), PairDataset(pairs, points=16, image_size=12))


@pytest.mark.parametrize("kind, draw", [("clouds", "cloud"), ("images", "view")])
def test_a_damaged_byte_is_found_when_drawn(packed, tmp_path, kind, draw):
    out = copied(packed, tmp_path)
    path = out / f"shard-00002.{kind}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    dataset = PackedPairs(out, points=16, image_size=12)
    last = (SHAPES - 1, dataset.views_per_shape[-1] - 1)
    with pytest.raises(ValueError, match=rf"shard-00002\.{kind}\.npy is damaged"):
        getattr(dataset, draw)(*(last if draw == "view" else last[:1]))
    dataset[0]


@pytest.mark.parametrize("where", ["shard-00001.images.npy", "shard-00001.checksums.npy", "pack.json"])
def test_interrupted_packing_goes_on(pairs, packed, tmp_path, monkeypatch, where):
    """The disk fills up in the middle of a file: what was complete stays, the rest is made again."""
    out, original = tmp_path / "pack", pack_module.replace_file

    def replace(path, write):
        def write_half(file):
            content = io.BytesIO()
            write(content)
            file.write(content.getvalue()[: content.tell() // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        original(path, write_half if Path(path).name == where else write)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "replace_file", replace)
        with pytest.raises(OSError, match="No space left"):
            pack(config(pairs, out))
    assert not list(out.glob("*.tmp"))
    with pytest.raises(FileNotFoundError, match="was interrupted: run `crosspoint pack` again"):
        PackedPairs(out, points=16, image_size=12)
    assert pack(config(pairs, out))["made"] == (0 if where == "pack.json" else 2)
    for path in packed.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_data_check(packed, tmp_path, capsys):
    """Every cloud and image is read; a damaged file is named once."""
    check = ["data", "check", "--points", "16"]
    assert cli.main([*check, str(packed)]) == 0
    said = capsys.readouterr().out
    assert "7 of 7 shapes in 2 classes are whole, 1 to 3 images of 12 pixels each" in said
    out = copied(packed, tmp_path)
    path = out / "shard-00001.images.npy"
    images = np.load(path)
    np.save(path, 255 - images)
    clouds = np.load(out / "shard-00002.clouds.npy")
    clouds[0, 3] = np.nan
    np.save(out / "shard-00002.clouds.npy", clouds)
    sums = np.load(out / "shard-00002.checksums.npy")
    sums[0] = zlib.crc32(clouds[0])
    np.save(out / "shard-00002.checksums.npy", sums)
    assert cli.main([*check, str(out)]) == 1
    said = capsys.readouterr().out
    assert "3 of 7 shapes" in said and said.count("wrong: ") == 2
    assert f"wrong: {path} is damaged" in said
    assert "shard-00002.clouds.npy[0]: table/shape5 is not finite" in said
    (out / "pack.json").unlink()
    assert cli.main([*check, str(out)]) == 1
    assert "was interrupted: run `crosspoint pack` again" in capsys.readouterr().out


def test_no_pack(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the pack in .* is not there"):
        PackedPairs(tmp_path)
    (tmp_path / "pack.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="another version"):
        PackedPairs(tmp_path)


def test_command(pairs, tmp_path):
    out = tmp_path / "pack"
    arguments = ["pack", str(pairs), str(out), "--points", "16", "--image-size", "12"]
    assert cli.main(arguments) == 0
    assert (out / "pack.json").exists()


def row_of(source: str) -> tuple[str, str]:
    path, row = source.removesuffix("]").rsplit("[", 1)
    return path, row


def copied(packed: Path, tmp_path: Path) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for path in packed.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out
