"""The full state of a run: what it takes to continue as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crosspoint._files import replace_file
from crosspoint.train.config import flatten

__all__ = ["TrainState", "check_same_run", "load_state", "save_state"]

_FORMAT = 1

# What may differ when a run continues: no weight depends on it but by rounding, or `TrainState.shapes` checks what
# matters.
_MAY_CHANGE = {
    "out",
    "data",
    "resume",
    "workers",
    "device",
    "exchange",
    "activation_checkpointing",
    "checkpoint_every",
    "log_every",
}


@dataclass
class TrainState:
    """A run after `step` steps.

    There is no random state in it: every random decision is a function of the seed and the step.
    """

    step: int
    config: dict[str, Any]
    shapes: str  # fingerprint of the data set
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    metrics: dict[str, float]  # of the last step
    seconds: float  # spent training so far


def save_state(path: str | Path, state: TrainState) -> None:
    """Write `state` in the place of `path`; if that fails, `path` keeps its former content."""
    values = {"format": _FORMAT, **{name: getattr(state, name) for name in TrainState.__dataclass_fields__}}
    try:
        replace_file(path, lambda file: torch.save(values, file))
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the checkpoint of step {state.step} could not be written to {path} ({error}); "
            "the former one, if any, is intact: make room, then continue with --resume"
        ) from error


def load_state(path: str | Path) -> TrainState:
    """Read a state; tensors come to the CPU. Raises ValueError for a file that is not one."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values.pop("format") != _FORMAT:
            raise ValueError("written by another version")
        return TrainState(**values)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a state.pt of this version of crosspoint: {error}") from error


def check_same_run(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, naming each difference, unless config `now` continues the run of config `saved`."""
    saved, now = flatten(saved), flatten(now)
    differing = [
        f"{key}: {saved.get(key)!r} in the run, {now.get(key)!r} now"
        for key in {**saved, **now}
        if key not in _MAY_CHANGE and saved.get(key) != now.get(key)
    ]
    if differing:
        raise ValueError(
            "a run can only continue with the options it was started with; "
            f"{'; '.join(differing)}. Give the run's own options (its config.yaml has them), or another --out"
        )
