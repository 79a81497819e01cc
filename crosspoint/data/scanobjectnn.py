"""ScanObjectNN (arXiv 1908.04616) as the h5 files in which it is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from crosspoint.data.h5 import check_labels, find_files, read_clouds
from crosspoint.data.modelnet import LabelledClouds

__all__ = ["SCANOBJECTNN_CLASSES", "load_scanobjectnn"]

SCANOBJECTNN_CLASSES = (
    *("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door"),
    *("shelf", "table", "bed", "pillow", "sink", "sofa", "toilet"),
)
# variant -> folder, and what follows "objectdataset" in the names of the files
_VARIANTS = {
    "OBJ_BG": ("main_split", ""),
    "OBJ_ONLY": ("main_split_nobg", ""),
    "PB_T50_RS": ("main_split", "_augmentedrot_scale75"),
}
_SPLITS = {"train": "training", "test": "test"}


def load_scanobjectnn(
    root: str | Path,
    split: str,
    *,
    variant: Literal["OBJ_BG", "OBJ_ONLY", "PB_T50_RS"] = "OBJ_BG",
    points: int = 1024,
) -> LabelledClouds:
    """Read a split, "train" or "test": the first `points` of every cloud, as they are.

    `root` holds main_split/ (and main_split_nobg/ for OBJ_ONLY) with training_objectdataset*.h5 and
    test_objectdataset*.h5; `root` may be that folder itself. For OBJ_BG, train.h5 and test.h5 are accepted too.

    Raises FileNotFoundError that says where it looked, ValueError for files that do not hold what they should.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(_VARIANTS)}, got {variant!r}")
    folder, suffix = _VARIANTS[variant]
    name = f"{_SPLITS[split]}_objectdataset{suffix}.h5"
    layout = (
        f"expected layout of {variant}: ROOT/{folder}/{name} with 'data' (n, >= points, 3) and 'label' (n,)"
    )
    names = [name, f"{split}.h5"] if variant == "OBJ_BG" else [name]
    root = Path(root)
    # A folder given by its own name must be the variant's: the other has files of the same names.
    wrong = root.name in {place for place, _ in _VARIANTS.values()} - {folder}
    path = find_files([root / folder] if wrong else [root, root / folder], names, layout)[0]
    data, label = read_clouds(path, points, ["label"], layout)
    labels = check_labels(path, "label", label, (len(data),), layout)
    if len(labels) and labels.max() >= len(SCANOBJECTNN_CLASSES):
        raise ValueError(
            f"{path}: has label {labels.max()}, but there are {len(SCANOBJECTNN_CLASSES)} classes"
        )
    return LabelledClouds(torch.from_numpy(data), torch.from_numpy(labels), SCANOBJECTNN_CLASSES)
