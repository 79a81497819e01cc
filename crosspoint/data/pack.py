"""Training pairs packed once into memory-mapped shards: nothing is opened, parsed, decoded or resized while training.

OUT/pack.json says what is packed, and is written last. A shard of some hundred shapes is three arrays, each of which
appears whole or not at all: NAME.clouds.npy float32 (shapes, points, 3), NAME.images.npy uint8 (views of all its
shapes, image_size, image_size, 3), NAME.checksums.npy uint32, the CRC-32 of every cloud, then of every image.
"""

from __future__ import annotations

import json
import logging
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crosspoint._files import replace_file
from crosspoint.data.pairs import PairDataset, check_sizes

__all__ = ["PackConfig", "PackedPairs", "is_packed", "open_pairs", "pack", "read_index"]

log = logging.getLogger(__name__)

_INDEX, _FORMAT = "pack.json", 1
_KINDS = ("clouds", "images", "checksums")


@dataclass
class PackConfig:
    """Pack pairs of clouds and rendered views into memory-mapped shards, which `crosspoint pretrain OUT` reads.

    Images are stored as they are trained on, uint8 at `image_size`: 150 kB a view at 224. Run again after an
    interruption, it goes on where it was.
    """

    data: str
    """Folder with ShapeNet/ and ShapeNetRendering/."""
    out: str
    """Folder to write."""
    points: int = 2048
    """Points per cloud: the first ones of each file."""
    image_size: int = 224
    """Height and width of the images, in pixels."""
    shard_size: int = 256
    """Shapes per shard."""
    workers: int = 4
    """Threads that read and resize images. Changes no result."""

    def validate(self) -> None:
        """Raise ValueError, naming the option, if a value cannot work."""
        for name in ("points", "image_size", "shard_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def pack(config: PackConfig) -> dict[str, Any]:
    """Pack `config.data` into `config.out`; returns the number of shapes, of views, of shards, and of those made now.

    Raises:
        FileNotFoundError, ValueError: there is nothing to pack, or a file is broken, which is named; OUT holds a pack
            of other shapes or options.
        OSError: the disk is full; what is there already stays.
    """
    config.validate()
    dataset = PairDataset(config.data, points=config.points, image_size=config.image_size)
    out, names = Path(config.out), dataset.names
    views = dataset.views_per_shape
    index = {
        "format": _FORMAT,
        "points": config.points,
        "image_size": config.image_size,
        "shard_size": config.shard_size,
        "names": names,
        "views": views,
    }
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, index)
    made = 0
    starts = range(0, len(names), config.shard_size)
    with ThreadPoolExecutor(config.workers) as threads:
        for number, start in enumerate(starts):
            if all(_path(out, number, kind).exists() for kind in _KINDS):
                continue
            shapes = range(start, min(start + config.shard_size, len(names)))
            clouds = np.stack([dataset.cloud(shape) for shape in shapes])
            wanted = [(shape, view) for shape in shapes for view in range(views[shape])]
            images = np.stack(list(threads.map(lambda pair: dataset.view(*pair), wanted)))
            checksums = np.array([_checksum(array) for array in (*clouds, *images)], np.uint32)
            # The checksums last: with them a shard is complete.
            for kind, array in zip(_KINDS, (clouds, images, checksums), strict=True):
                replace_file(_path(out, number, kind), lambda file, array=array: np.save(file, array))
            made += 1
            log.info("%d of %d shapes packed", shapes.stop, len(names))
    replace_file(out / _INDEX, lambda file: file.write(json.dumps(index).encode()))
    return {"out": str(out), "shapes": len(names), "views": sum(views), "shards": len(starts), "made": made}


def is_packed(root: str | Path) -> bool:
    """Whether a folder holds a pack, complete or not."""
    return (Path(root) / _INDEX).exists() or (Path(root) / f"{_INDEX}.started").exists()


def open_pairs(
    root: str | Path, *, points: int = 2048, image_size: int = 224, seed: int = 0, views: int = 1
) -> PairDataset:
    """The pairs of a folder, packed or not."""
    kind = PackedPairs if is_packed(root) else PairDataset
    return kind(root, points=points, image_size=image_size, seed=seed, views=views)


class PackedPairs(PairDataset):
    """What `pack` wrote, item by item the same as the `PairDataset` of what it packed.

    root: folder that `pack` has written. points: at most as many as were packed. image_size: that which was packed.
    seed, views: as for `PairDataset`.

    Shards are mapped, not read: processes on a machine share the memory of what they have touched. Every cloud and
    image is compared with its checksum when it is drawn; sizes are checked here.

    Raises:
        FileNotFoundError: the pack is missing or was interrupted.
        ValueError: a shard is cut short or damaged, which is named; other options than those packed.
    """

    def __init__(
        self, root: str | Path, *, points: int = 2048, image_size: int = 224, seed: int = 0, views: int = 1
    ) -> None:
        check_sizes(points, image_size, views)
        self.root = Path(root)
        index = read_index(self.root)
        if image_size != index["image_size"]:
            raise ValueError(
                f"{root} holds images of {index['image_size']} pixels, {image_size} were asked for; pass image_size="
                f"{index['image_size']}, or pack again"
            )
        if points > index["points"]:
            raise ValueError(
                f"{root} holds {index['points']} points per cloud, {points} were asked for; ask for fewer"
            )
        self.points, self.image_size = points, image_size
        self._set_up(index["names"], index["views"], seed, views)
        self._size = index["shard_size"]
        self._first = np.concatenate([[0], np.cumsum(index["views"])])  # view of each shape, of all
        self._shards = [self._open(number) for number in range(-(-len(self.names) // self._size))]

    def cloud(self, index: int) -> np.ndarray:
        number, row = divmod(index, self._size)
        clouds, _, checksums = self._shards[number]
        return self._checked(clouds[row], checksums[row], number, "clouds")[: self.points]

    def view(self, index: int, view: int) -> np.ndarray:
        number = index // self._size
        clouds, images, checksums = self._shards[number]
        row = self._row(index, view)
        return self._checked(images[row], checksums[len(clouds) + row], number, "images")

    def sources(self, index: int) -> list[str]:
        number, row = divmod(index, self._size)
        rows = [("clouds", row), *(("images", self._row(index, view)) for view in self._draws(index))]
        return [f"{_path(self.root, number, kind)}[{row}]" for kind, row in rows]

    def _row(self, index: int, view: int) -> int:
        """Of a view, in its shard."""
        return int(self._first[index] + view - self._first[index // self._size * self._size])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shards = [self._open(number) for number in range(-(-len(self.names) // self._size))]

    def _open(self, number: int) -> tuple[np.ndarray, ...]:
        arrays = []
        for kind in _KINDS:
            path = _path(self.root, number, kind)
            try:
                arrays.append(np.load(path, mmap_mode="r"))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{path} is missing or cut short ({error}); remove it and pack again"
                ) from error
        return tuple(arrays)

    def _checked(self, array: np.ndarray, checksum: int, number: int, kind: str) -> np.ndarray:
        if _checksum(array) != checksum:
            raise ValueError(f"{_path(self.root, number, kind)} is damaged; remove it and pack again")
        return np.array(array)


def _claim(out: Path, index: dict[str, Any]) -> None:
    """Note what is being packed, or refuse a folder where something else is."""
    started = out / f"{_INDEX}.started"
    for path in (started, out / _INDEX):
        if path.exists() and json.loads(path.read_text()) != index:
            raise ValueError(
                f"{out} holds a pack of other shapes or with other options; choose another --out"
            )
    replace_file(started, lambda file: file.write(json.dumps(index).encode()))


def read_index(root: Path) -> dict[str, Any]:
    """What a folder says of its pack. Raises FileNotFoundError if it is missing or was interrupted."""
    path = root / _INDEX
    if not path.exists():
        what = "was interrupted: run `crosspoint pack` again" if is_packed(root) else "is not there"
        raise FileNotFoundError(f"the pack in {root} {what}")
    index = json.loads(path.read_text())
    if index.get("format") != _FORMAT:
        raise ValueError(f"{path} was written by another version of crosspoint; pack again")
    return index


def _path(out: Path, number: int, kind: str) -> Path:
    return out / f"shard-{number:05}.{kind}.npy"


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array))
