"""Features of clouds in files."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from crosspoint._device import resolve_device
from crosspoint._files import replace_file
from crosspoint._optional import require
from crosspoint.data.clouds import read_clouds_of, resample
from crosspoint.evaluate.features import embed, turn_upright
from crosspoint.evaluate.protocol import up_axis
from crosspoint.models import checkpoints

__all__ = ["EmbedConfig", "embed_files"]

log = logging.getLogger(__name__)


@dataclass
class EmbedConfig:
    """Write one feature a cloud, with the clouds' names, to .npz or .safetensors."""

    run: Path
    """Run folder, or weights file."""
    out: Path
    """File to write: FILE.npz with `features` (n, d) float32 and `names` (n,), or FILE.safetensors with `features`
    and the names as JSON in its metadata."""
    clouds: tuple[Path, ...]
    """Files: .ply, .pcd, .npy, .h5, .off."""
    points: int = 1024
    """Points per cloud: so many of a larger one, drawn once; a smaller one repeats some."""
    normalize: bool = True
    """Move every cloud to the unit sphere, as pre-training does."""
    up: Literal["y", "z"] = "y"
    """Axis that points up in these clouds; they are turned to the one about which the run was pre-trained."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do about a file that cannot be read: stop and name it, or name it and go on."""
    seed: int = 0
    """Of the points that are drawn."""
    batch_size: int = 32
    """Clouds per forward pass."""
    device: str = "auto"
    """Where the encoder runs: "auto" (the first GPU, else the CPU) or a torch device."""


def embed_files(config: EmbedConfig) -> Path:
    """Embed the clouds of all files, write the features, return the file."""
    if config.out.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"out must end in .npz or .safetensors, got {config.out}")
    if config.points < 1:
        raise ValueError(f"points must be at least 1, got {config.points}")
    names, clouds = [], []
    for path in config.clouds:
        try:
            found = read_clouds_of(path)
        except (OSError, ValueError) as error:
            if config.on_error == "raise":
                raise
            log.warning("left out: %s", error)
            continue
        for name, cloud in found:
            names.append(name)
            clouds.append(resample(cloud, config.points, config.seed))
    if not clouds:
        raise ValueError(f"none of the {len(config.clouds)} files holds a cloud that can be embedded")
    points = turn_upright(np.stack(clouds), config.up, up_axis(config.run))
    if config.normalize:
        points = points - points.mean(1, keepdims=True)
        points = points / np.maximum(np.linalg.norm(points, axis=2).max(1), 1e-12)[:, None, None]
    features = embed(
        checkpoints.load_encoder(config.run),
        np.ascontiguousarray(points, np.float32),
        batch_size=config.batch_size,
        device=resolve_device(config.device),
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(config.out, lambda file: file.write(_pack(config.out.suffix, names, features)))
    log.info("written: %s, %d features of %d numbers", config.out, *features.shape)
    return config.out


def _pack(suffix: str, names: list[str], features: np.ndarray) -> bytes:
    if suffix == ".safetensors":
        safetensors = require("safetensors.numpy", extra="train")
        return safetensors.save({"features": features}, metadata={"names": json.dumps(names)})
    buffer = io.BytesIO()
    np.savez(buffer, features=features, names=np.array(names))
    return buffer.getvalue()
