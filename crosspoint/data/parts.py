"""Objects with labelled parts: ShapeNetPart's h5 files, and others of that layout."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from crosspoint.data.h5 import check_labels, find_files, read_clouds, read_names

__all__ = ["PartClouds", "load_parts"]

_LAYOUT = (
    "expected layout: *train*.h5, *test*.h5 and perhaps *val*.h5 in ROOT or ROOT/hdf5_data, each with 'data' "
    "(n, >= points, 3), 'label' (n, 1), the category, and 'pid' (n, >= points), the part of every point"
)
_SHAPENET_CATEGORIES = (
    *("airplane", "bag", "cap", "car", "chair", "earphone", "guitar", "knife"),
    *("lamp", "laptop", "motorbike", "mug", "pistol", "rocket", "skateboard", "table"),
)
_SHAPENET_COUNTS = (4, 2, 2, 4, 4, 3, 3, 2, 4, 2, 6, 2, 3, 3, 3, 3)  # parts of each


class PartClouds(NamedTuple):
    """points: float32 (n, points, 3); categories: int64 (n,); parts: int64 (n, points), numbered over all categories;
    parts_of: of each category, the parts that its shapes can have."""

    points: torch.Tensor
    categories: torch.Tensor
    parts: torch.Tensor
    category_names: tuple[str, ...]
    part_names: tuple[str, ...]
    parts_of: tuple[tuple[int, ...], ...]


def load_parts(root: str | Path, split: str, *, points: int = 2048) -> PartClouds:
    """Read a split, "train", "val", "trainval" (both) or "test": the first `points` of every cloud, as they are.

    categories.txt and parts.txt in the folder name categories and parts, a name a line. Without them, at most 16
    categories and 50 parts are ShapeNetPart's; others are named "0", "1", ... Of other sets than ShapeNetPart, the
    parts of a category are those that occur in the files of all splits.

    Raises FileNotFoundError that says where it looked, ValueError for files that do not hold what they should: a part
    that the category does not have is named with its shape.
    """
    splits = {"train": ("train",), "val": ("val",), "trainval": ("train", "val"), "test": ("test",)}
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}")
    root = Path(root)
    folders = [root, root / "hdf5_data"]
    wanted: list[Path] = []
    for part in splits[split]:
        if part != "val" or split == "val" or _has(folders, "*val*.h5"):
            wanted += find_files(folders, [f"*{part}*.h5"], _LAYOUT)
    everything = {path: _read(path, points) for path in sorted(wanted[0].parent.glob("*.h5"))}
    pairs = np.concatenate([_pairs(categories, parts) for _, categories, parts in everything.values()])
    pairs = np.unique(pairs, axis=0)
    folder = wanted[0].parent
    category_names, part_names, parts_of = _names(folder, pairs)
    for path, (_, categories, parts) in everything.items():
        for c, p in _pairs(categories, parts):
            if p not in parts_of[c]:
                shape = int(np.flatnonzero((categories == c) & (parts == p).any(1))[0])
                raise ValueError(
                    f"{path}: shape {shape}, a {category_names[c]}, has part {p}; its parts are {parts_of[c]}"
                )
    data, categories, parts = (
        np.concatenate(each) for each in zip(*(everything[p] for p in wanted), strict=True)
    )
    tensors = map(torch.from_numpy, (data, categories, parts))
    return PartClouds(*tensors, category_names, part_names, parts_of)


def _has(folders: list[Path], pattern: str) -> bool:
    return any(any(folder.glob(pattern)) for folder in folders)


def _read(path: Path, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data, label, pid = read_clouds(path, points, ["label", "pid"], _LAYOUT)
    categories = check_labels(path, "label", label, (len(data),), _LAYOUT)
    if pid.ndim != 2 or pid.shape[1] < points:
        raise ValueError(f"{path}: 'pid' has shape {pid.shape}; {_LAYOUT}")
    return data, categories, check_labels(path, "pid", pid[:, :points], (len(data), points), _LAYOUT)


def _pairs(categories: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The (category, part) pairs that occur, (m, 2)."""
    return np.unique(np.stack([np.repeat(categories, parts.shape[1]), parts.ravel()], 1), axis=0)


def _names(
    folder: Path, pairs: np.ndarray
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[int, ...], ...]]:
    needed_categories, needed_parts = (int(each) + 1 for each in pairs.max(0, initial=-1))
    listed = (folder / "categories.txt").exists()
    if not listed and needed_categories <= 16 and needed_parts <= 50:
        first = np.cumsum((0, *_SHAPENET_COUNTS))
        parts_of = tuple(
            tuple(range(a, b)) for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)
        )
        named = (
            (name, i)
            for name, count in zip(_SHAPENET_CATEGORIES, _SHAPENET_COUNTS, strict=True)
            for i in range(count)
        )
        return _SHAPENET_CATEGORIES, tuple(f"{name} {i}" for name, i in named), parts_of
    category_names = read_names(folder / "categories.txt", needed_categories)
    part_names = read_names(folder / "parts.txt", needed_parts)
    parts_of = tuple(tuple(pairs[pairs[:, 0] == c, 1].tolist()) for c in range(len(category_names)))
    return category_names, part_names, parts_of
