"""Encoders by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from torch import nn

from crosspoint.models.dgcnn import DGCNN
from crosspoint.models.pointnet import PointNet
from crosspoint.models.resnet import resnet18, resnet50
from crosspoint.models.segmentation import DGCNNPart, DGCNNSemantic

__all__ = ["IMAGE_ENCODERS", "POINT_ENCODERS", "create", "list_models"]

POINT_ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "dgcnn": DGCNN,
    "dgcnn_part": DGCNNPart,
    "dgcnn_semantic": DGCNNSemantic,
    "pointnet": PointNet,
}
IMAGE_ENCODERS: dict[str, Callable[..., nn.Module]] = {"resnet18": resnet18, "resnet50": resnet50}


def list_models() -> list[str]:
    """The names that `create` knows."""
    return [*POINT_ENCODERS, *IMAGE_ENCODERS]


def create(name: str, **options: object) -> nn.Module:
    """The encoder `name` with fresh weights; `options` are its class's arguments.

    Raises ValueError for a name or an option that does not exist, saying which do.
    """
    makers = {**POINT_ENCODERS, **IMAGE_ENCODERS}
    if name not in makers:
        close = difflib.get_close_matches(name, makers, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no model is named {name!r}; {hint}The models are: {', '.join(makers)}")
    known = accepted(makers[name])
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{name} takes {', '.join(known)}; got {', '.join(unknown)}")
    return makers[name](**options)


def accepted(maker: Callable[..., nn.Module]) -> list[str]:
    """The options of an encoder's class."""
    return list(inspect.signature(maker).parameters)
