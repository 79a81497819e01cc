"""Weights of the authors' code (MohamedAfham/CrossPoint): read, checked by name, and written back.

Their files are bare state dicts of three kinds: the classification DGCNN (64 tensors), the part segmentation DGCNN
(137 in pre-training, 162 fine-tuned) and the image network. Most batch norms stand in them under two names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from crosspoint._files import replace_file
from crosspoint.models import checkpoints
from crosspoint.models.checkpoints import EncoderConfig
from crosspoint.models.dgcnn import DGCNN
from crosspoint.models.registry import POINT_ENCODERS
from crosspoint.models.resnet import ResNet
from crosspoint.models.segmentation import DGCNNPart

__all__ = ["ConvertConfig", "convert", "export_official", "load_official"]

log = logging.getLogger(__name__)

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Norms of the segmentation head, which their pre-training model has and never uses, with their widths.
_UNUSED_NORMS = {"bn7": 64, "bn8": 256, "bn9": 256, "bn10": 128}


class _Entry(NamedTuple):
    """One tensor: its name here, all its names there, and how many axes of size 1 theirs has behind ours."""

    ours: str
    theirs: tuple[str, ...]
    extra_axes: int = 0


def load_official(path: str | os.PathLike, *, k: int | None = None, impl: str = "auto") -> nn.Module:
    """The encoder, its heads included, of a file that the authors' code wrote, with or without `module.` prefixes.

    Args:
        path: a bare state dict, read with `weights_only=True`.
        k: neighbours of the graphs, which the file does not tell; by default 40 for a fine-tuned part segmentation
            model, 15 else, as in the authors' scripts.
        impl: backend of the operators.

    Returns:
        A `DGCNN`, `DGCNNPart` (with a segmentation head if the file has one) or `ResNet` in training mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no state dict, of none of these kinds, or its tensors do not fit: each one that is missing,
            unexpected, of another shape, or different under its two names is listed.
    """
    state = _read(Path(path))
    config = _recognise(path, state, k)
    model = config.create(impl=impl)
    model.load_state_dict(_translate(path, state, model), strict=True)
    return model


def export_official(path: str | os.PathLike, model: nn.Module) -> Path:
    """Write the weights of a `DGCNN`, `DGCNNPart` or `ResNet` as the authors' code saves and loads them.

    Raises TypeError for another model, ValueError for a DGCNN with a classifier, which their layout has no place for.
    """
    ours, theirs = model.state_dict(), {}
    for entry in _entries(model):
        value = ours.pop(entry.ours).detach().cpu()
        value = value.reshape((*value.shape, *(1,) * entry.extra_axes))
        theirs.update((name, value.clone()) for name in entry.theirs)
    if ours:
        raise ValueError(
            f"the official layout has no place for {', '.join(ours)}; make the model without them"
        )
    theirs.update(_unused(model))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: torch.save(theirs, file))
    return path


@dataclass
class ConvertConfig:
    """Convert weights between crosspoint's files and those of the authors' code."""

    source: Path
    """Weights to read: a file of the authors' code (.pth), a run folder, or a crosspoint file (.safetensors)."""
    out: Path
    """File to write."""
    to: Literal["crosspoint", "official"] = "crosspoint"
    """Layout to write."""
    k: int | None = None
    """Neighbours in the graphs, which the authors' files do not tell: 15 by default, 40 for a fine-tuned part
    segmentation model."""
    encoder: Literal["point", "image"] = "point"
    """Which encoder of a run to write in the official layout, where each has a file of its own."""


def convert(config: ConvertConfig) -> Path:
    """Do what `config` says; returns the file written."""
    if config.to == "crosspoint":
        model = load_official(config.source, k=config.k)
        path = checkpoints.save_encoder(config.out, model, _config_of(model))
    else:
        if config.encoder == "image":
            model = checkpoints.load_model(config.source).image_encoder
        else:
            model = checkpoints.load_encoder(config.source)
        path = export_official(config.out, model)
    log.info("written: %s (%s)", path, type(model).__name__)
    return path


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: expected a state dict that the authors' code saved")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a file of tensors that torch.load can read: {error}") from error
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        kind = f"keys {sorted(map(str, state))[:5]}" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{path}: expected a state dict, names and tensors; got {kind}")
    prefixed = [name.startswith("module.") for name in state]
    return {name.removeprefix("module.") if all(prefixed) else name: value for name, value in state.items()}


def _recognise(path: str | os.PathLike, state: Mapping[str, Tensor], k: int | None) -> EncoderConfig:
    head = state.get("inv_head.3.weight")
    options = {"projection_dim": None if head is None else len(head)}
    if "resnet.conv1.weight" in state:
        return EncoderConfig("resnet50" if "resnet.layer1.0.conv3.weight" in state else "resnet18", options)
    if "transform_net.transform.weight" in state:
        parts = state.get("conv11.weight")
        options["k"] = k or (15 if parts is None else 40)
        if parts is not None:
            options["num_parts"] = len(parts)
            options["num_categories"] = state["conv7.0.weight"].shape[1] if "conv7.0.weight" in state else 16
        return EncoderConfig("dgcnn_part", options)
    if "conv5.0.weight" in state and "bn5.weight" in state:
        return EncoderConfig("dgcnn", {**options, "k": k or 15})
    raise ValueError(
        f"{path}: its {len(state)} tensors ({', '.join(list(state)[:4])}, ...) are those of none of the authors' models"
    )


def _translate(path: str | os.PathLike, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors under our names and in our shapes."""
    left, expected, found = dict(state), model.state_dict(), {}
    problems: dict[str, list[str]] = {"missing": [], "of another shape": [], "different under two names": []}
    for entry in _entries(model):
        shape = (*expected[entry.ours].shape, *(1,) * entry.extra_axes)
        values = {name: left.pop(name) for name in entry.theirs if name in left}
        problems["missing"] += [name for name in entry.theirs if name not in values]
        for name, value in values.items():
            if value.shape != shape:
                problems["of another shape"].append(f"{name} ({tuple(value.shape)}, expected {shape})")
        if len({value.shape for value in values.values()}) == 1:
            first, *others = values.values()
            if not all(torch.equal(first, other) for other in others):
                problems["different under two names"].append(" and ".join(values))
            found[entry.ours] = first.reshape(expected[entry.ours].shape) if first.shape == shape else first
    for name in _unused(model):
        left.pop(name, None)
    problems["unexpected"] = list(left)
    text = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names)
    if text:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {text}")
    return found


def _config_of(model: nn.Module) -> EncoderConfig:
    if isinstance(model, ResNet):
        head = None if model.projection is None else model.projection[-1].out_features
        return EncoderConfig(f"resnet{model.depth}", {"projection_dim": head})
    options = {"projection_dim": model.projection_dim, "k": model.k}
    if isinstance(model, DGCNNPart) and model.num_parts is not None:
        options.update(num_parts=model.num_parts, num_categories=model.num_categories)
    return EncoderConfig(next(name for name, kind in POINT_ENCODERS.items() if type(model) is kind), options)


# ---- the three layouts


def _entries(model: nn.Module) -> Iterator[_Entry]:
    """Every tensor of a model that their layout has a place for."""
    if type(model) is DGCNN:
        yield from _classification()
    elif type(model) is DGCNNPart:
        yield from _part_segmentation(fine_tuned=model.num_parts is not None)
    elif isinstance(model, ResNet):
        encoder = (name for name in model.state_dict() if not name.startswith("projection."))
        yield from (_Entry(name, (f"resnet.{name}",)) for name in encoder)
    else:
        raise TypeError(
            f"the authors' code has no {type(model).__name__}: only DGCNN, DGCNNPart and ResNet have official layouts"
        )
    if model.projection is not None:
        for name in model.projection.state_dict():
            yield _Entry(f"projection.{name}", (f"inv_head.{name}",))


def _norm(ours: str, *theirs: str) -> Iterator[_Entry]:
    for key in _NORM:
        yield _Entry(f"{ours}.{key}", tuple(f"{name}.{key}" for name in theirs))


def _layer(weight: str, norm: str, number: int, extra_axes: int, prefix: str = "") -> Iterator[_Entry]:
    """Convolution `number` there, with its norm, which has two names."""
    yield _Entry(weight, (f"{prefix}conv{number}.0.weight",), extra_axes)
    yield from _norm(norm, f"{prefix}bn{number}", f"{prefix}conv{number}.1")


def _classification() -> Iterator[_Entry]:
    for i in range(1, 5):
        yield from _layer(f"conv{i}.weight", f"conv{i}.bn", i, 2)
    yield from _layer("conv5.weight", "bn5", 5, 1)


def _part_segmentation(fine_tuned: bool) -> Iterator[_Entry]:
    net = "transform_net."
    yield from _layer(f"{net}conv1.weight1", f"{net}conv1.bn1", 1, 2, net)
    yield from _layer(f"{net}conv1.weight2", f"{net}conv1.bn2", 2, 2, net)
    yield _Entry(f"{net}conv2.weight", (f"{net}conv3.0.weight",), 1)
    # Their bn3 names another norm, the one after linear1; conv3's own stands under one name.
    yield from _norm(f"{net}conv2.bn", f"{net}conv3.1")
    for i in (1, 2):
        yield _Entry(f"{net}linear{i}.weight", (f"{net}linear{i}.weight",))
        yield from _norm(f"{net}bn{i}", f"{net}bn{i + 2}")
    for key in ("weight", "bias"):
        yield _Entry(f"{net}transform.{key}", (f"{net}transform.{key}",))
    for block, first in (("conv1", 1), ("conv2", 3)):
        yield from _layer(f"{block}.weight1", f"{block}.bn1", first, 2)
        yield from _layer(f"{block}.weight2", f"{block}.bn2", first + 1, 2)
    yield from _layer("conv3.weight", "conv3.bn", 5, 2)
    yield from _layer("conv4.weight", "conv4.bn", 6, 1)
    if fine_tuned:
        for number, module in ((7, "category"), (8, "head.layer"), (9, "layers.0"), (10, "layers.1")):
            yield from _layer(f"{module}.weight", f"{module}.bn", number, 1)
        yield _Entry("parts.weight", ("conv11.weight",), 1)


def _unused(model: nn.Module) -> dict[str, Tensor]:
    """What their file of this model holds besides, as it is before training."""
    if not isinstance(model, DGCNNPart) or model.num_parts is not None:
        return {}
    return {
        f"{name}.{key}": value
        for name, width in _UNUSED_NORMS.items()
        for key, value in nn.BatchNorm1d(width).state_dict().items()
    }
