"""Maxima over neighbours: out_ic = the largest x_jc over the neighbours j of i, and the slot that holds it.

Nothing of the size of the edges times the channels is stored. Kept for the backward pass: the slots (4 bytes
per output), which are a result anyway. The gradient goes to the rows that won; each is summed by one thread in
a fixed order, in float64, and rounded once: bitwise repeatable, without atomic additions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosspoint.ops import _dispatch, _library, reference
from crosspoint.ops._checks import check_graph, check_neighbours

__all__ = ["gather_max"]


def gather_max(x: Tensor, idx: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The largest of each node's neighbours, channel by channel: max over s of x[b, idx[b, i, s], c].

    Of neighbours that tie, the lowest slot wins. NaN wins over every number, as in `torch.max`.

    Args:
        x: (B, N, C), float64, float32, float16 or bfloat16.
        idx: (B, M, k) int64: neighbours of M nodes, rows of the same cloud of x, or -1 for none.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        values, (B, M, C) in the dtype of x; 0 for a node without neighbours. Differentiable any number of
        times in x.
        slots, (B, M, C) int32: where in idx[b, i] the winner stands, so that values[b, i, c] is
        x[b, idx[b, i, slots[b, i, c]], c]; -1 for a node without neighbours.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
        IndexError: for an entry of idx that is neither -1 nor in [0, N), from compiled backends on the CPU. On
            the GPU, which is not waited for, it counts as -1; CROSSPOINT_CHECK=1 makes it an error there.
    """
    check_neighbours("gather_max", x, idx)
    backend = _dispatch.choose("gather_max", impl, x.device)
    if backend == "reference":
        return reference.gather_max(x, idx)
    return _GatherMax.apply(x, idx, backend)


def _fake_forward(x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*idx.shape[:2], x.shape[2])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


_library.define("gather_max(Tensor x, Tensor idx) -> (Tensor values, Tensor slots)", _fake_forward)
_library.define(
    "gather_max_backward(Tensor grad, Tensor idx, Tensor slots, SymInt n) -> Tensor",
    lambda grad, idx, slots, n: grad.new_empty((grad.shape[0], n, grad.shape[2])),
)


def _triton(x: Tensor, idx: Tensor):
    from crosspoint.kernels.gather_max import gather_max

    check_graph("gather_max", idx, x.shape[1])
    return gather_max(x, idx)


def _triton_backward(*args) -> Tensor:
    from crosspoint.kernels.gather_max import gather_max_backward

    return gather_max_backward(*args)


_library.define_like("gather_max", "triton")
_library.define_like("gather_max_backward", "triton")
_library.implement_triton("gather_max_triton", _triton)
_library.implement_triton("gather_max_backward_triton", _triton_backward)


class _GatherMax(torch.autograd.Function):
    @staticmethod
    def forward(x, idx, backend):
        return _dispatch.operator("gather_max", backend)(x, idx)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, idx, ctx.backend = inputs
        _, slots = output
        ctx.mark_non_differentiable(slots)
        ctx.save_for_backward(idx, slots)
        ctx.n = x.shape[1]

    @staticmethod
    def backward(ctx, grad, _):
        idx, slots = ctx.saved_tensors
        return _GatherMaxBackward.apply(grad, idx, slots, ctx.n, ctx.backend), None, None


class _GatherMaxBackward(torch.autograd.Function):
    """Linear in grad; its transpose takes each winner's row."""

    @staticmethod
    def forward(grad, idx, slots, n, backend):
        return _dispatch.operator("gather_max_backward", backend)(grad, idx, slots, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, idx, slots, *_ = inputs
        ctx.save_for_backward(idx, slots)

    @staticmethod
    def backward(ctx, grad):
        idx, slots = ctx.saved_tensors
        if slots.numel() == 0 or grad.shape[1] == 0 or idx.shape[2] == 0:
            return grad.new_zeros(slots.shape), None, None, None, None
        winners = idx.gather(2, slots.clamp_min(0).long()).clamp_min(0)  # (B, M, C)
        return torch.where(slots < 0, 0, grad.gather(1, winners)), None, None, None, None


_dispatch.register("gather_max", "gather_max", "gather_max_backward")
