"""ModelNet40 as the h5 files in which it is shared."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from crosspoint._files import replace_file
from crosspoint._optional import require

__all__ = ["LabelledClouds", "load_modelnet40", "write_modelnet40"]

_FOLDER = "modelnet40_ply_hdf5_2048"
_NAMES = "shape_names.txt"
_LAYOUT = (
    f"expected layout: ply_data_train*.h5 and ply_data_test*.h5 in ROOT or ROOT/{_FOLDER}, "
    "each with 'data' (n, >= points, 3) and 'label' (n, 1)"
)


class LabelledClouds(NamedTuple):
    """points: float32 (n, points, 3); labels: int64 (n,), indices into class_names."""

    points: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]


def load_modelnet40(root: str | Path, split: str, *, points: int = 1024) -> LabelledClouds:
    """Read a split, "train" or "test": the first `points` of every cloud, as they are (no normalisation).

    `root` is the folder of the h5 files or its parent. Files are read in the order of their names. Without a
    shape_names.txt the classes are called "0", "1", ...

    Raises FileNotFoundError that says where it looked, and ValueError for files that do not hold what they
    should.
    """
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    files = _split_files(Path(root), split)
    clouds, labels = zip(*(_read(path, points) for path in files), strict=True)
    label = np.concatenate(labels)
    class_names = _class_names(files[0].parent / _NAMES, label)
    return LabelledClouds(torch.from_numpy(np.concatenate(clouds)), torch.from_numpy(label), class_names)


def write_modelnet40(root: str | Path, split: str, clouds: LabelledClouds) -> None:
    """Write `clouds` as ROOT/modelnet40_ply_hdf5_2048/ply_data_{split}0.h5, with shape_names.txt beside it.

    Clouds may have any number of points. Files appear whole or not at all. A file of this name is replaced;
    other files of the split, or other class names than another split has, are errors.
    """
    h5py = require("h5py", extra="train")
    _check_split(split)
    points, labels = np.asarray(clouds.points, np.float32), np.asarray(clouds.labels)
    names = tuple(clouds.class_names)
    if points.ndim != 3 or points.shape[2] != 3 or labels.shape != points.shape[:1]:
        raise ValueError(
            f"expected points (n, points, 3) and labels (n,), got {points.shape} and {labels.shape}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names) <= 256:
        raise ValueError(
            f"labels must be indices into the (at most 256) class names, of which there are {len(names)}"
        )
    folder = _home(Path(root))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"ply_data_{split}0.h5"
    others = [path.name for path in folder.glob(f"ply_data_{split}*.h5") if path != target]
    if others:
        raise FileExistsError(
            f"{folder} already holds {', '.join(sorted(others))}; write into an empty folder"
        )
    listing = folder / _NAMES
    if listing.exists() and _read_names(listing) != names:
        raise ValueError(
            f"{listing} names other classes than the clouds to be written; write into an empty folder"
        )

    def fill(file: object) -> None:
        with h5py.File(file, "w") as h5:
            h5.create_dataset("data", data=points)
            h5.create_dataset("label", data=labels.astype(np.uint8)[:, None])

    replace_file(listing, lambda file: file.write("".join(f"{name}\n" for name in names).encode()))
    replace_file(target, fill)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")


def _home(root: Path) -> Path:
    return root if root.name == _FOLDER else root / _FOLDER


def _split_files(root: Path, split: str) -> list[Path]:
    _check_split(split)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; {_LAYOUT}")
    for folder in (root, root / _FOLDER):
        if files := sorted(folder.glob(f"ply_data_{split}*.h5")):
            return files
    raise FileNotFoundError(f"no ply_data_{split}*.h5 in {root} or {root / _FOLDER}; {_LAYOUT}")


def _read(path: Path, points: int) -> tuple[np.ndarray, np.ndarray]:
    h5py = require("h5py", extra="train")
    try:
        with h5py.File(path, "r") as h5:
            missing = [key for key in ("data", "label") if key not in h5]
            if missing:
                raise ValueError(f"{path}: has no {' and no '.join(map(repr, missing))}; {_LAYOUT}")
            shape, label = h5["data"].shape, np.asarray(h5["label"])
            if len(shape) != 3 or shape[2] != 3 or label.size != shape[0] or label.shape[0] != shape[0]:
                raise ValueError(
                    f"{path}: 'data' has shape {shape} and 'label' {label.shape}; "
                    "expected (n, points, 3) and (n, 1)"
                )
            if shape[1] < points:
                raise ValueError(
                    f"{path}: has {shape[1]} points per cloud, {points} were asked for; ask for fewer"
                )
            data = np.asarray(h5["data"][:, :points], dtype=np.float32)
    except OSError as error:
        raise ValueError(f"{path}: not a readable h5 file ({error})") from error
    if label.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels must be whole numbers, got {label.dtype}")
    if not np.isfinite(data).all():
        raise ValueError(
            f"{path}: cloud {int(np.flatnonzero(~np.isfinite(data).all((1, 2)))[0])} is not finite"
        )
    return data, label.reshape(-1).astype(np.int64)


def _class_names(listing: Path, labels: np.ndarray) -> tuple[str, ...]:
    if len(labels) and labels.min() < 0:
        raise ValueError(f"{listing.parent}: labels start at {labels.min()}; expected 0 or more")
    needed = int(labels.max(initial=-1)) + 1
    if not listing.exists():
        return tuple(map(str, range(needed)))
    names = _read_names(listing)
    if len(names) < needed:
        raise ValueError(f"{listing}: names {len(names)} classes, but a label is {needed - 1}")
    return names


def _read_names(listing: Path) -> tuple[str, ...]:
    return tuple(name.strip() for name in listing.read_text(encoding="utf-8").splitlines() if name.strip())
