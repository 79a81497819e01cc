"""The model card of a run: a README.md that says what the weights are, what made them and how to load them."""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from crosspoint._files import replace_file
from crosspoint._version import __version__
from crosspoint.models.registry import POINT_ENCODERS
from crosspoint.train.config import PretrainConfig, config_to_dict, flatten

__all__ = ["write_card"]


def write_card(
    folder: Path,
    config: PretrainConfig,
    *,
    shapes: list[str],
    device: torch.device,
    step: int,
    total: int,
    metrics: dict[str, float],
    seconds: float,
) -> Path:
    """Write FOLDER/README.md, by rename; returns it.

    shapes: "<class>/<id>" of every shape. step, total: steps taken, and steps of the whole run. metrics: of the last
    step. seconds: spent training.
    """
    path = folder / "README.md"
    classes = len({name.split("/")[0] for name in shapes})
    width = POINT_ENCODERS[config.model.point_encoder].feature_dim
    state = "finished" if step == total else f"stopped or still running: {step:,} of {total:,} steps"
    losses = "".join(f"| {name} | {value:.6g} |\n" for name, value in metrics.items())
    options = "".join(f"| {name} | {value} |\n" for name, value in flatten(config_to_dict(config)).items())
    text = f"""# {folder.resolve().name}: {config.model.point_encoder}, pre-trained with CrossPoint

Self-supervised by CrossPoint (arXiv 2203.00680) on point clouds and rendered images of the same shapes, without labels.
This run: {state}.

## Use

```python
from crosspoint.models import from_pretrained

encoder = from_pretrained({str(folder)!r}).eval()
# points (B, N, 3) float32, {config.up} up -> features (B, {width})
```

Pre-training moves every cloud to the unit sphere and turns it about {config.up}. `crosspoint evaluate` scores the
encoder, `crosspoint embed` writes features of files. What it has learnt holds for shapes like those below; how it does
on others, and the licence of the data, this card does not know.

## Data

{len(shapes):,} shapes in {classes:,} folders of {config.data}, {config.points:,} points each, {config.views} of the
rendered views of a shape per step.

## Losses at step {step:,}

| | |
|---|---|
{losses}
log.jsonl has all steps. Trained for {seconds:,.0f} s.

## Options

config.yaml repeats the run: `crosspoint pretrain --config config.yaml`.

| option | value |
|---|---|
{options}
## Environment

| | |
|---|---|
| crosspoint | {__version__}{_commit()} |
| torch | {torch.__version__} |
| numpy | {np.__version__} |
| Python | {platform.python_version()} |
| device | {_device(device)} |
"""
    replace_file(path, lambda file: file.write(text.encode()))
    return path


def _device(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


@functools.cache
def _commit() -> str:
    """ ", commit ..." where the package lies in a git checkout of its own, else nothing."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f", commit {done.stdout.strip()}" if done.returncode == 0 else ""
