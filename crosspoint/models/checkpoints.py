"""Weights on disk: one safetensors file that carries the configuration of its model, a CrossPoint or an encoder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosspoint._files import replace_file
from crosspoint._optional import require
from crosspoint._version import __version__
from crosspoint.models.crosspoint import CrossPoint, CrossPointConfig, build
from crosspoint.models.registry import POINT_ENCODERS, create

__all__ = [
    "EncoderConfig",
    "load_config",
    "load_encoder",
    "load_encoder_config",
    "load_model",
    "save_encoder",
    "save_model",
]

_FILE = "weights.safetensors"
_METADATA = "crosspoint"


@dataclass(frozen=True)
class EncoderConfig:
    """What `create` makes an encoder from: `create(config.name, **config.options)`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def create(self, *, impl: str = "auto") -> nn.Module:
        """The encoder with fresh weights; `impl` is the operators' backend, where it has any."""
        options = {"impl": impl} if self.name in POINT_ENCODERS else {}
        return create(self.name, **self.options, **options)


def save_model(
    path: str | os.PathLike, model: nn.Module | Mapping[str, Tensor], config: CrossPointConfig
) -> Path:
    """Write the model's weights and `config`; return the file.

    Args:
        path: the file, or an existing run folder, which gets `weights.safetensors`. The file appears by
            rename: a reader finds the old one or the new one, never half of one. Missing folders are made.
        model: the model that `load_model` will restore, without wrappers (pass `ddp.module`), or its state dict, of
            whole tensors.
        config: what `build` made the model from.
    """
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return _write(path, tensors, {"config": config.to_dict()})


def save_encoder(path: str | os.PathLike, encoder: nn.Module, config: EncoderConfig) -> Path:
    """Write an encoder's weights, its heads included, and what `create` made it from; else as `save_model`."""
    return _write(path, encoder.state_dict(), {"encoder": dataclasses.asdict(config)})


def load_model(
    path: str | os.PathLike,
    model: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> CrossPoint:
    """The model of a file that `save_model` wrote.

    Args:
        path: the file, or the run folder that holds `weights.safetensors`.
        model: load into this model (for encoders of your own); None builds one from the file's configuration.
        device: where the model goes.
        impl: backend of the operators, if the model is built here.

    Raises FileNotFoundError if there is no such file, ValueError if it is not one of ours or does not fit the
    model, listing every tensor that is missing, unexpected, or of another shape or dtype. A model that was
    passed is then unchanged.
    """
    path = _file(path)
    tensors, header = _read(path)
    if model is None:
        # What the image encoder started from is not downloaded once more.
        model = build(dataclasses.replace(_config(path, header), image_weights="random"), impl=impl)
    _check_fit(path, tensors, model.state_dict())
    model.load_state_dict(tensors, strict=True)
    return model.to(device)


def load_config(path: str | os.PathLike) -> CrossPointConfig:
    """The configuration in a file that `save_model` wrote; raises as `load_model` does."""
    path = _file(path)
    return _config(path, _read(path, header_only=True)[1])


def load_encoder(
    path: str | os.PathLike, *, device: torch.device | str = "cpu", impl: str = "auto"
) -> nn.Module:
    """The point encoder, its heads included, of a run folder or of a file that `save_model` or `save_encoder` wrote.

    Raises as `load_model` does.
    """
    path = _file(path)
    tensors, header = _read(path)
    if "encoder" not in header:
        prefix = "point_encoder."
        tensors = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
    encoder = _encoder_config(path, header).create(impl=impl)
    _check_fit(path, tensors, encoder.state_dict())
    encoder.load_state_dict(tensors, strict=True)
    return encoder.to(device)


def load_encoder_config(path: str | os.PathLike) -> EncoderConfig:
    """What `create` makes the encoder from that `load_encoder` loads; raises as `load_model` does."""
    path = _file(path)
    return _encoder_config(path, _read(path, header_only=True)[1])


def _write(path: str | os.PathLike, state: Mapping[str, Tensor], about: dict[str, Any]) -> Path:
    safetensors = require("safetensors.torch", extra="train")
    path = _file(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    header = json.dumps({"version": __version__, **about})
    # one key alone: safetensors writes several in random order, and equal weights should be equal files
    content = safetensors.save(tensors, metadata={_METADATA: header})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(content))
    return path


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path / _FILE if path.is_dir() else path


def _read(path: Path, *, header_only: bool = False) -> tuple[dict[str, Tensor], dict]:
    safetensors = require("safetensors", extra="train")
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: expected a safetensors file, or a run folder that holds {_FILE}"
        )
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            tensors = {} if header_only else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    if header is None:
        raise ValueError(
            f"{path} carries no crosspoint configuration: it was not written by crosspoint's save_model"
        )
    return tensors, header


def _encoder_config(path: Path, header: dict) -> EncoderConfig:
    if "encoder" in header:
        return EncoderConfig(**header["encoder"])
    config = _config(path, header)
    return EncoderConfig(config.point_encoder, config.point_options)


def _config(path: Path, header: dict) -> CrossPointConfig:
    if "config" not in header:
        raise ValueError(
            f"{path} holds an encoder alone ({header['encoder']['name']}), not a CrossPoint: load_encoder reads it"
        )
    try:
        return CrossPointConfig.from_dict(header["config"])
    except ValueError as error:
        raise ValueError(
            f"{path} was written by crosspoint {header['version']}; this is {__version__}, and it cannot use "
            f"its configuration: {error}"
        ) from error


def _check_fit(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    differing = [
        f"{name} ({_form(found[name])} in the file, {_form(expected[name])} in the model)"
        for name in sorted(found.keys() & expected.keys())
        if _form(found[name]) != _form(expected[name])
    ]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape or dtype": differing,
    }
    text = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names)
    if text:
        raise ValueError(f"the tensors in {path} do not fit the model: {text}")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
