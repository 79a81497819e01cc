"""ModelNet40 as the h5 files in which it is shared, and in its normal-resampled text form."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from crosspoint._files import replace_file
from crosspoint._optional import require
from crosspoint.data.h5 import check_labels, find_files, read_clouds, read_names

__all__ = ["LabelledClouds", "load_modelnet40", "load_modelnet40_text", "write_modelnet40"]

_FOLDER = "modelnet40_ply_hdf5_2048"
_NAMES = "shape_names.txt"
_LAYOUT = (
    f"expected layout: ply_data_train*.h5 and ply_data_test*.h5 in ROOT or ROOT/{_FOLDER}, "
    "each with 'data' (n, >= points, 3) and 'label' (n, 1)"
)
_TEXT_LAYOUT = (
    "expected layout: ROOT/modelnet40_shape_names.txt, ROOT/modelnet40_train.txt, ROOT/modelnet40_test.txt and "
    "ROOT/<class>/<id>.txt with x,y,z,nx,ny,nz a line"
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
    files = _split_files(Path(root), split)
    clouds, labels = zip(*(_read(path, points) for path in files), strict=True)
    label = np.concatenate(labels)
    class_names = read_names(files[0].parent / _NAMES, int(label.max(initial=-1)) + 1)
    return LabelledClouds(torch.from_numpy(np.concatenate(clouds)), torch.from_numpy(label), class_names)


def load_modelnet40_text(root: str | Path, split: str, *, points: int = 1024) -> LabelledClouds:
    """Read a split of modelnet40_normal_resampled: a text file a shape, x,y,z,nx,ny,nz a line; normals are left out.

    `root` holds modelnet40_shape_names.txt, modelnet40_train.txt, modelnet40_test.txt and <class>/<id>.txt. Shapes
    come in the order of the listing. Raises as `load_modelnet40` does.
    """
    _check_split(split)
    root = Path(root)
    listing, names_file = root / f"modelnet40_{split}.txt", root / "modelnet40_shape_names.txt"
    for path in (listing, names_file):
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; {_TEXT_LAYOUT}")
    names, ids = read_names(names_file, 0), read_names(listing, 0)
    clouds, labels = np.empty((len(ids), points, 3), np.float32), np.empty(len(ids), np.int64)
    for i, shape in enumerate(ids):
        name = shape.rpartition("_")[0]
        if name not in names:
            raise ValueError(f"{listing}: {shape!r} is of no class in {names_file.name}")
        clouds[i], labels[i] = _read_text(root / name / f"{shape}.txt", points), names.index(name)
    return LabelledClouds(torch.from_numpy(clouds), torch.from_numpy(labels), names)


def _read_text(path: Path, points: int) -> np.ndarray:
    try:
        values = np.loadtxt(path, np.float32, delimiter=",", max_rows=points, ndmin=2)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}, which the listing names; {_TEXT_LAYOUT}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_TEXT_LAYOUT}") from error
    if values.shape[0] < points or values.shape[1] not in (3, 6):
        raise ValueError(
            f"{path}: has {values.shape[0]} lines of {values.shape[1]} numbers, expected at least {points} of 6 (or 3)"
        )
    if not np.isfinite(values[:, :3]).all():
        raise ValueError(
            f"{path}: point {int(np.flatnonzero(~np.isfinite(values[:, :3]).all(1))[0])} is not finite"
        )
    return values[:, :3]


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
    if listing.exists() and read_names(listing, 0) != names:
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
    return find_files([root, root / _FOLDER], [f"ply_data_{split}*.h5"], _LAYOUT)


def _read(path: Path, points: int) -> tuple[np.ndarray, np.ndarray]:
    data, label = read_clouds(path, points, ["label"], _LAYOUT)
    return data, check_labels(path, "label", label, (len(data),), _LAYOUT)
