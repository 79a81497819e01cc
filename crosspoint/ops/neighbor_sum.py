"""Sums over neighbours: out_i = the sum of x_j over the neighbours j of i.

Neither direction stores anything of the size of the edges times the channels. Sums are formed in float64 and
rounded once. The gradient is the same sum over the graph turned around, where every row is summed by one
thread in a fixed order: bitwise repeatable, without atomic additions.

Memory beside inputs and results: nothing forward; backward, the turned graph, 4 B M k + 8 B (N + 1)
bytes; on a GPU, also what sorting the edges takes, 16 B M k bytes in CUDA C++ and some times that through torch.sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosspoint.ops import _dispatch, _library, reference
from crosspoint.ops._checks import check_graph, check_neighbours

__all__ = ["neighbor_sum"]


def neighbor_sum(x: Tensor, idx: Tensor, *, impl: str = "auto") -> Tensor:
    """The sum of the rows of x that each node's neighbours name: out[b, i] = sum over s of x[b, idx[b, i, s]].

    Args:
        x: (B, N, C), float64, float32, float16 or bfloat16.
        idx: (B, M, k) int64: neighbours of M nodes, rows of the same cloud of x, or -1 for none. A row that is
            named twice counts twice.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        (B, M, C) in the dtype of x; 0 for a node without neighbours. Differentiable any number of times in x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
        IndexError: for an entry of idx that is neither -1 nor in [0, N), from compiled backends on the CPU. On
            the GPU, which is not waited for, it counts as -1; CROSSPOINT_CHECK=1 makes it an error there.
    """
    check_neighbours("neighbor_sum", x, idx)
    backend = _dispatch.choose("neighbor_sum", impl, x.device)
    if backend == "reference":
        return reference.neighbor_sum(x, idx)
    return _NeighborSum.apply(x, idx, backend)


_library.define(
    "neighbor_sum(Tensor x, Tensor idx) -> Tensor",
    lambda x, idx: x.new_empty((*idx.shape[:2], x.shape[2])),
)
_library.define(
    "neighbor_sum_backward(Tensor grad, Tensor idx, SymInt n) -> Tensor",
    lambda grad, idx, n: grad.new_empty((grad.shape[0], n, grad.shape[2])),
)


def _triton(x: Tensor, idx: Tensor):
    from crosspoint.kernels.neighbor_sum import neighbor_sum

    check_graph("neighbor_sum", idx, x.shape[1])
    return neighbor_sum(x, idx)


def _triton_backward(*args) -> Tensor:
    from crosspoint.kernels.neighbor_sum import neighbor_sum_backward

    return neighbor_sum_backward(*args)


_library.define_like("neighbor_sum", "triton")
_library.define_like("neighbor_sum_backward", "triton")
_library.implement_triton("neighbor_sum_triton", _triton)
_library.implement_triton("neighbor_sum_backward_triton", _triton_backward)


class _NeighborSum(torch.autograd.Function):
    @staticmethod
    def forward(x, idx, backend):
        return _dispatch.operator("neighbor_sum", backend)(x, idx)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, idx, ctx.backend = inputs
        ctx.save_for_backward(idx)
        ctx.n = x.shape[1]

    @staticmethod
    def backward(ctx, grad):
        (idx,) = ctx.saved_tensors
        return _NeighborSumBackward.apply(grad, idx, ctx.n, ctx.backend), None, None


class _NeighborSumBackward(torch.autograd.Function):
    """The transpose; its own transpose is the forward sum."""

    @staticmethod
    def forward(grad, idx, n, backend):
        return _dispatch.operator("neighbor_sum_backward", backend)(grad, idx, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, idx, _, ctx.backend = inputs
        ctx.save_for_backward(idx)

    @staticmethod
    def backward(ctx, grad):
        (idx,) = ctx.saved_tensors
        return _NeighborSum.apply(grad, idx, ctx.backend), None, None, None


_dispatch.register("neighbor_sum", "neighbor_sum", "neighbor_sum_backward")
