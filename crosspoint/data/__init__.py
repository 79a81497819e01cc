"""Point clouds with images of them, labelled clouds, augmentations, and what makes pairs from meshes.

Names load on first use: a process that only prepares meshes never imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosspoint.data.augment import CloudAugmentation, ImageAugmentation, ScaleShift
    from crosspoint.data.modelnet import (
        LabelledClouds,
        load_modelnet40,
        load_modelnet40_text,
        write_modelnet40,
    )
    from crosspoint.data.pack import PackedPairs
    from crosspoint.data.pairs import PairDataset
    from crosspoint.data.parts import PartClouds, load_parts
    from crosspoint.data.s3dis import RoomBlocks, load_s3dis
    from crosspoint.data.scanobjectnn import load_scanobjectnn

__all__ = [
    "CloudAugmentation",
    "ImageAugmentation",
    "LabelledClouds",
    "PackedPairs",
    "PairDataset",
    "PartClouds",
    "RoomBlocks",
    "ScaleShift",
    "load_modelnet40",
    "load_modelnet40_text",
    "load_parts",
    "load_s3dis",
    "load_scanobjectnn",
    "write_modelnet40",
]

_MODULES = {
    "CloudAugmentation": "augment",
    "ImageAugmentation": "augment",
    "LabelledClouds": "modelnet",
    "PackedPairs": "pack",
    "PairDataset": "pairs",
    "PartClouds": "parts",
    "RoomBlocks": "s3dis",
    "ScaleShift": "augment",
    "load_modelnet40": "modelnet",
    "load_modelnet40_text": "modelnet",
    "load_parts": "parts",
    "load_s3dis": "s3dis",
    "load_scanobjectnn": "scanobjectnn",
    "write_modelnet40": "modelnet",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
