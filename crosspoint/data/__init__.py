"""Point clouds with images of them, labelled clouds, augmentations, and what makes pairs from meshes.

Names load on first use: a process that only prepares meshes never imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosspoint.data.augment import CloudAugmentation, ImageAugmentation
    from crosspoint.data.modelnet import LabelledClouds, load_modelnet40, write_modelnet40
    from crosspoint.data.pairs import PairDataset

__all__ = [
    "CloudAugmentation",
    "ImageAugmentation",
    "LabelledClouds",
    "PairDataset",
    "load_modelnet40",
    "write_modelnet40",
]

_MODULES = {
    "CloudAugmentation": "augment",
    "ImageAugmentation": "augment",
    "LabelledClouds": "modelnet",
    "PairDataset": "pairs",
    "load_modelnet40": "modelnet",
    "write_modelnet40": "modelnet",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
