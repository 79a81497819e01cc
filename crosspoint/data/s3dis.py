"""S3DIS (Stanford indoor spaces) as the h5 files of blocks in which it is shared."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from crosspoint.data.h5 import check_labels, find_files, read_clouds

__all__ = ["S3DIS_CLASSES", "RoomBlocks", "load_s3dis"]

S3DIS_CLASSES = (
    *("ceiling", "floor", "wall", "beam", "column", "window", "door"),
    *("table", "chair", "sofa", "bookcase", "board", "clutter"),
)
_FOLDER = "indoor3d_sem_seg_hdf5_data"
_LAYOUT = (
    f"expected layout: ply_data_all_*.h5 and room_filelist.txt in ROOT or ROOT/{_FOLDER}, each with 'data' "
    "(n, >= points, 9): position in the block, colour, position in the room, and 'label' (n, >= points)"
)


class RoomBlocks(NamedTuple):
    """points: float32 (n, points, 9); labels: int64 (n, points), indices into class_names."""

    points: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]


def load_s3dis(root: str | Path, split: str, *, test_area: int = 5, points: int = 4096) -> RoomBlocks:
    """Read the blocks of area `test_area` ("test") or of all others ("train"): the first `points` of each.

    room_filelist.txt names the room of every block, in the order of the files by name and the blocks in them.

    Raises FileNotFoundError that says where it looked, ValueError for files that do not hold what they should.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if test_area not in range(1, 7):
        raise ValueError(f"test_area must be between 1 and 6, got {test_area}")
    root = Path(root)
    files = find_files([root, root / _FOLDER], ["ply_data_all_*.h5"], _LAYOUT)
    files.sort(key=lambda path: (len(path.name), path.name))  # ..._9 before ..._10, as the listing has them
    listing = files[0].parent / "room_filelist.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"no {listing}; {_LAYOUT}")
    rooms = listing.read_text(encoding="utf-8").split()
    data, labels = zip(*(_read(path, points) for path in files), strict=True)
    data, labels = np.concatenate(data), np.concatenate(labels)
    if len(rooms) != len(data):
        raise ValueError(f"{listing} names {len(rooms)} blocks, but the files hold {len(data)}")
    chosen = np.array([f"Area_{test_area}" in room for room in rooms]) == (split == "test")
    if not chosen.any():
        raise ValueError(f"{listing} names no block of the {split} split with test area {test_area}")
    return RoomBlocks(torch.from_numpy(data[chosen]), torch.from_numpy(labels[chosen]), S3DIS_CLASSES)


def _read(path: Path, points: int) -> tuple[np.ndarray, np.ndarray]:
    data, label = read_clouds(path, points, ["label"], _LAYOUT, channels=9)
    if label.ndim != 2 or label.shape[1] < points:
        raise ValueError(f"{path}: 'label' has shape {label.shape}; {_LAYOUT}")
    labels = check_labels(path, "label", label[:, :points], (len(data), points), _LAYOUT)
    if labels.size and labels.max() >= len(S3DIS_CLASSES):
        raise ValueError(f"{path}: has label {labels.max()}, but there are {len(S3DIS_CLASSES)} classes")
    return data, labels
