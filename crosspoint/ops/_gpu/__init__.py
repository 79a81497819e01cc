"""Operators on a GPU that need matrix products: one orchestrator each, for every backend's kernels.

An orchestrator, `_gpu/OP.py`, runs products and the small algebra through torch, and calls the *leaves* it is given for
the rest: the functions of `crosspoint.kernels.OP` (Triton), or operators of the same names and arguments that
csrc/torch/cuda binds (CUDA C++, schemas in `_cuda`). Leaves fill contiguous tensors that the orchestrator allocated.
Nothing here waits for the device, and no decision depends on a value.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from crosspoint.ops import _library
from crosspoint.ops._gpu import _cuda

__all__ = ["implement"]


def implement(op: str, *operators: str, leaves: str | None = None) -> None:
    """Let `_gpu/OP.py` implement `operators`, by its functions "forward" and, for the second one, "backward": on CUDA
    tensors where the compiled library has the leaves, and as NAME_triton. `leaves`: of which operator they are, if not
    of `op`."""
    leaves = leaves or op
    for name, which in zip(operators, ("forward", "backward"), strict=False):
        triton = _caller(op, which, lambda _: importlib.import_module(f"crosspoint.kernels.{leaves}"))
        _library.implement_triton(f"{name}_triton", triton)
        if _cuda.has_leaves(leaves):
            _library.implement(name, _caller(op, which, lambda x: _cuda.leaves_for(leaves, x)), "CUDA")


def _caller(op: str, which: str, leaves: Callable[[Tensor], object]) -> Callable:
    """Calls an orchestrator with the leaves for the operator's first input, which is the second where a gradient comes
    before it; it and Triton are imported at the first call."""

    def run(*args):
        orchestrator = importlib.import_module(f"crosspoint.ops._gpu.{op}")
        return getattr(orchestrator, which)(leaves(args[which == "backward"]), *args)

    return run
