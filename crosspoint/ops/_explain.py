"""Why a call runs where it runs."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from crosspoint.ops import _dispatch, _library

__all__ = ["Explanation", "explain"]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` is a table for people.

    Attributes:
        op, device, impl: the operator, the tensors' device type, what was asked for.
        runs: the backend that the call would run on; None if it would be refused.
        backends: backend -> None, or why it cannot run this call.
        notes: what makes this call slower, or needs to be known of it.
    """

    op: str
    device: str
    impl: str
    runs: str | None
    backends: dict[str, str | None]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        outcome = f"runs {self.runs}" if self.runs else "is refused"
        lines = [f"{self.op} on {self.device} with impl={self.impl!r} {outcome}"]
        for backend, why in self.backends.items():
            lines.append(f"  {backend:<10} {'can run this call' if why is None else f'no: {why}'}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def explain(op: str | Callable, *args: object, **kwargs: object) -> Explanation:
    """Which backend would run `op(*args, **kwargs)`, whether each of the others could, and why not.

    Nothing is computed. The call goes through the function's own checks, so that arguments it would refuse raise
    here what they raise there.

    Args:
        op: one of the functions in `crosspoint.ops`, or its name.
        args, kwargs: the call's arguments, as they would be given to it.

    Returns:
        An `Explanation`; print it.

    Raises:
        ValueError: `op` is no operator of this package; and whatever the call itself would raise.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    public = importlib.import_module("crosspoint.ops")
    known = sorted({row.op for row in _dispatch.describe_backends()})
    if name not in known or (callable(op) and op is not getattr(public, name)):
        raise ValueError(
            f"explain: op must be one of crosspoint.ops.{{{', '.join(known)}}} or its name, got {name!r}"
        )
    _dispatch.asking.active = True
    try:
        getattr(public, name)(*args, **kwargs)
    except _dispatch.Question as question:
        asked = question
    else:
        raise RuntimeError(f"explain: {name} asked for no backend, so there is nothing to explain")
    finally:
        _dispatch.asking.active = False

    device = asked.device.type
    backends = {
        backend: _dispatch.why_not(name, backend, asked.device, asked.traits)
        for backend in _dispatch.backends(name, device)
    }
    try:
        runs = _dispatch.choose(name, asked.impl, asked.device, **asked.traits)
    except RuntimeError:
        runs = None
    notes = (*_backend_notes(device, runs), *_tensor_notes(runs, [*args, *kwargs.values()]))
    return Explanation(name, device, asked.impl, runs, backends, notes)


def _backend_notes(device: str, runs: str | None) -> list[str]:
    if runs == "reference":
        return ["the reference is plain PyTorch: slower, and it stores what the kernels avoid"]
    if runs == "native" and device == "cpu":
        return [f"{_library.cpu_variant()} kernels on {torch.get_num_threads()} threads"]
    return []


def _tensor_notes(runs: str | None, values: list[object]) -> list[str]:
    if runs in (None, "reference"):
        return []
    notes = []
    for tensor in (value for value in values if isinstance(value, Tensor)):
        shape = tuple(tensor.shape)
        if not tensor.is_contiguous():
            notes.append(f"the tensor of shape {shape} is not contiguous: every call copies it")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            notes.append(f"the {tensor.dtype} tensor of shape {shape} is widened to float32")
    return notes
