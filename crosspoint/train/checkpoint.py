"""The full state of a run: what it takes to continue as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosspoint._files import replace_file
from crosspoint.train.config import flatten

__all__ = ["Progress", "TrainState", "check_same_run", "load_state", "not_written", "save_state"]

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
    "parallel",
    "activation_checkpointing",
    "channels_last",
    "compile",
    "cuda_graph",
    "checkpoint_every",
    "log_every",
}


@dataclass
class Progress:
    """A run after `step` steps, but for its tensors.

    There is no random state in it: every random decision is a function of the seed and the step.
    """

    step: int
    config: dict[str, Any]
    shapes: str  # fingerprint of the data set
    metrics: dict[str, float]  # of the last step
    seconds: float  # spent training so far


@dataclass
class TrainState(Progress):
    """A run after `step` steps."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill the model and its optimizer; where parameters are sharded, this rank's parts."""
        targets = model.state_dict()
        model.load_state_dict({name: _like(value, targets.get(name)) for name, value in self.model.items()})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            i: {
                name: _like(value, parameters[i]) if value.shape == parameters[i].shape else value
                for name, value in values.items()
            }
            for i, values in self.optimizer["state"].items()
        }
        optimizer.load_state_dict({**self.optimizer, "state": moments})


def _like(value: Tensor, target: Tensor | None) -> Tensor:
    """This rank's part, where the target is sharded (a DTensor); else in the target's order in memory."""
    if target is None:
        return value
    if not hasattr(target, "device_mesh"):
        return torch.empty_like(target, dtype=value.dtype, device=value.device).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).clone()


def save_state(path: str | Path, state: TrainState) -> None:
    """Write `state` in the place of `path`; if that fails, `path` keeps its former content."""
    values = {"format": _FORMAT, **{name: getattr(state, name) for name in TrainState.__dataclass_fields__}}
    try:
        replace_file(path, lambda file: torch.save(values, file))
    except (OSError, RuntimeError) as error:
        raise OSError(not_written(state.step, path, error)) from error


def not_written(step: int, path: str | Path, reason: object) -> str:
    return (
        f"the checkpoint of step {step} could not be written to {path} ({reason}); "
        "the former one, if any, is intact: make room, then continue with --resume"
    )


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
