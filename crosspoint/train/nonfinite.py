"""A step whose loss or gradient was not finite: its batch in files, and the step once more.

RUN/nonfinite_stepN holds what each rank fed to its model (rank0.pt, rank1.pt, ...) and weights.safetensors, the model
before the step.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosspoint._device import resolve_device
from crosspoint._files import replace_file
from crosspoint.models import CrossPoint, checkpoints
from crosspoint.train.repeatable import isolated

__all__ = ["FailedBatch", "Replay", "load_batch", "replay", "save_batch"]

_FORMAT = 1
_WEIGHTS = "weights.safetensors"


@dataclass
class FailedBatch:
    """What one rank fed to its model in a step, and where it came from."""

    step: int
    """Counted from 1."""
    rank: int
    world: int
    """Number of ranks."""
    metrics: dict[str, float]
    """loss, intra_modal, cross_modal, grad_norm: the same on all ranks."""
    config: dict[str, Any]
    """Of the run."""
    seeds: dict[str, int]
    """"augment": of the generator of both augmentations; "step": of PyTorch's own before the forward pass."""
    names: list[str]
    """<class>/<id> of each shape."""
    sources: list[list[str]]
    """The files that each shape was read from: of its cloud, then of each view."""
    points: Tensor
    """Clouds as they were read, (B, N, 3)."""
    view1: Tensor
    """Clouds as the model got them, (B, N, 3)."""
    view2: Tensor
    """The same under the second augmentation."""
    images: Tensor
    """Images as the model got them, (B, [views,] 3, H, W)."""

    def bad_inputs(self) -> dict[str, str]:
        """The shapes whose inputs hold NaN or infinity -> which of them, and the files."""
        found = {}
        of_cloud = [_bad_rows(tensor) for tensor in (self.points, self.view1, self.view2)]
        of_images = _bad_rows(self.images)
        for i, (name, (cloud, *views)) in enumerate(zip(self.names, self.sources, strict=True)):
            said = []
            if of_cloud[0][i]:
                said.append(f"its cloud, {cloud}")
            elif of_cloud[1][i] or of_cloud[2][i]:
                said.append(f"its cloud after augmentation, finite in {cloud}")
            if of_images[i]:
                said.append(f"its image after augmentation, {', '.join(views)}")
            if said:
                found[name] = " and ".join(said)
        return found


def _bad_rows(tensor: Tensor) -> list[bool]:
    return (~tensor.isfinite().flatten(1).all(1)).tolist()


def save_batch(run: Path, batch: FailedBatch) -> Path:
    """Write this rank's batch, and the first rank a copy of the run's weights; returns the folder."""
    folder = _folder(run, batch.step)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"format": _FORMAT, **{name: getattr(batch, name) for name in FailedBatch.__dataclass_fields__}}
    replace_file(folder / f"rank{batch.rank}.pt", lambda file: torch.save(values, file))
    if batch.rank == 0:
        with open(run / _WEIGHTS, "rb") as weights:
            replace_file(folder / _WEIGHTS, lambda file: shutil.copyfileobj(weights, file))
    return folder


def _folder(run: Path, step: int) -> Path:
    return run / f"nonfinite_step{step}"


def load_batch(path: str | Path) -> FailedBatch:
    """Read what a rank has left (rankN.pt); tensors come to the CPU. Raises ValueError for another file."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values.pop("format") != _FORMAT:
            raise ValueError("written by another version")
        return FailedBatch(**values)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not a batch that this version of crosspoint has left: {error}"
        ) from error


@dataclass
class Replay:
    """What a step did when it was taken again."""

    metrics: dict[str, float]
    """loss, intra_modal, cross_modal, grad_norm."""
    bad_inputs: dict[str, str]
    """Shapes of all ranks whose inputs hold NaN or infinity -> which of them, and the files."""
    module: str | None
    """The first module, in the order of the forward pass, whose output holds NaN or infinity."""
    gradients: list[str]
    """Parameters whose gradients do."""


def replay(folder: str | Path, *, model: CrossPoint | None = None, device: str = "cpu") -> Replay:
    """Take the forward and backward pass of RUN/nonfinite_stepN again, and say where numbers stop being finite.

    One process takes the batches of all ranks together, which computes what they did, to rounding; with several ranks
    dropout draws other numbers, and with `part_size` batch norm sees the whole batch.

    model: for encoders of your own, one that the weights fit. device: as for pre-training.

    Raises FileNotFoundError where a rank's batch or the weights are missing, ValueError where they are no such files.
    """
    folder = Path(folder)
    batches = [load_batch(folder / "rank0.pt")]
    batches += [load_batch(folder / f"rank{rank}.pt") for rank in range(1, batches[0].world)]
    target = resolve_device(device)
    with isolated(target):
        model = checkpoints.load_model(folder, model, device=target).train()
        first, *_ = batches
        inputs = [
            torch.cat([getattr(batch, name) for batch in batches]).to(target)
            for name in ("view1", "view2", "images")
        ]
        torch.manual_seed(first.seeds["step"])
        bad_modules: list[str] = []
        with (
            _watched(model, bad_modules),
            torch.autocast(target.type, dtype=torch.bfloat16, enabled=first.config["amp"]),
        ):
            output = model(*inputs)
        output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = nn.utils.get_total_norm(list(gradients.values()))
    values = torch.stack([output.loss, output.intra_modal, output.cross_modal, norm])
    return Replay(
        metrics=dict(zip(first.metrics, values.tolist(), strict=True)),
        bad_inputs={name: what for batch in batches for name, what in batch.bad_inputs().items()},
        module=bad_modules[0] if bad_modules else None,
        gradients=[name for name, gradient in gradients.items() if not gradient.isfinite().all()],
    )


@contextlib.contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Within, the names of modules whose outputs are not finite go to `found`, innermost first."""

    def watch(name: str):
        def look(module: nn.Module, inputs: object, output: object) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
            if not all(bool(each.isfinite().all()) for each in tensors):
                found.append(name or "the losses")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
