"""What the h5 data sets of this field share: files of a split, arrays with checks, errors that name the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crosspoint._optional import require

__all__ = ["check_labels", "find_files", "read_clouds", "read_names"]


def find_files(folders: Sequence[Path], patterns: Sequence[str], layout: str) -> list[Path]:
    """The files of the first folder that has any, by the first pattern that fits; sorted by name.

    Raises FileNotFoundError that says where it looked, and `layout`.
    """
    if not folders[0].is_dir():
        raise FileNotFoundError(f"no folder {folders[0]}; {layout}")
    for folder in folders:
        for pattern in patterns:
            if files := sorted(folder.glob(pattern)):
                return files
    raise FileNotFoundError(f"no {' or '.join(patterns)} in {' or '.join(map(str, folders))}; {layout}")


def read_clouds(
    path: Path, points: int | None, fields: Sequence[str], layout: str, *, channels: int = 3
) -> tuple[np.ndarray, ...]:
    """`data`, the first `points` (None: all) of each cloud, float32 (n, points, channels), and `fields` as stored.

    Raises ValueError that names the file: not h5 or cut short, a field that is missing or counts other clouds, too few
    points, a coordinate that is not finite.
    """
    if points is not None and points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    h5py = require("h5py", extra="train")
    try:
        with h5py.File(path, "r") as h5:
            if missing := [key for key in ("data", *fields) if key not in h5]:
                raise ValueError(f"{path}: has no {' and no '.join(map(repr, missing))}; {layout}")
            shape, others = h5["data"].shape, [np.asarray(h5[name]) for name in fields]
            for name, values in zip(fields, others, strict=True):
                if len(shape) != 3 or shape[2] != channels or values.ndim == 0 or len(values) != shape[0]:
                    raise ValueError(
                        f"{path}: 'data' has shape {shape} and {name!r} {values.shape}; {layout}"
                    )
            if points is not None and shape[1] < points:
                raise ValueError(
                    f"{path}: has {shape[1]} points per cloud, {points} were asked for; ask for fewer"
                )
            data = np.asarray(h5["data"][:, :points], dtype=np.float32)
    except OSError as error:
        raise ValueError(f"{path}: not a readable h5 file ({error})") from error
    if not np.isfinite(data).all():
        first = int(np.flatnonzero(~np.isfinite(data).all((1, 2)))[0])
        raise ValueError(f"{path}: cloud {first} is not finite")
    return data, *others


def check_labels(
    path: Path, name: str, labels: np.ndarray, shape: tuple[int, ...], layout: str
) -> np.ndarray:
    """Labels as int64 of `shape`; ValueError for other sizes, fractions and numbers below 0."""
    if labels.size != int(np.prod(shape)):
        raise ValueError(f"{path}: {name!r} has shape {labels.shape}, expected {shape}; {layout}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: {name!r}: labels must be whole numbers, got {labels.dtype}")
    if labels.size and labels.min() < 0:
        raise ValueError(f"{path}: {name!r}: labels start at {labels.min()}; expected 0 or more")
    return labels.reshape(shape).astype(np.int64)


def read_names(listing: Path, needed: int) -> tuple[str, ...]:
    """A name a line; "0", "1", ... without the file. ValueError where a label has no name."""
    if not listing.exists():
        return tuple(map(str, range(needed)))
    lines = listing.read_text(encoding="utf-8").splitlines()
    names = tuple(name.strip() for name in lines if name.strip())
    if len(names) < needed:
        raise ValueError(f"{listing}: names {len(names)} classes, but a label is {needed - 1}")
    return names
