"""Exact k-nearest-neighbour graphs and searches.

`knn_graph(x, k)` gives, for each point of a cloud, the points of the same cloud that come first by (squared
distance, index); `knn(query, points, k)` does it between two sets and gives the squared distances too, which
are twice differentiable. Both take batches of clouds, padded to a common size where `lengths` says so.

*Distances* are squared differences summed in float32 (float64 for float64 input; half types are widened), so
that nothing is lost far from the origin. Faster forms only sort out candidates, with a proven bound on their
error. A NaN distance counts as +inf: a neighbour of last resort.

*Order.* Equal distances go by index. Distances that are exactly representable (duplicates, lattices) are
equal on every backend; otherwise two backends may exchange neighbours whose distances differ by less than
their rounding: `crosspoint.testing.assert_same_graph` holds the rule. Results are bitwise equal over runs and
thread counts.

*Memory.* Beyond the outputs, the CPU kernels hold the clouds up to three times more (16 MB at a time, or one
cloud) and, per thread, at most 600 kB, 600 bytes per channel and 500 bytes per k (float64: twice that); no N x N
matrix. The backward pass of `knn` gathers (B, M, k, C) neighbours.

*In plain PyTorch*, for clouds without padding:

    dist2 = (query[:, :, None] - points[:, None]).square().sum(-1)  # (B, M, N)
    dist2, idx = dist2.sort(-1, stable=True)
    dist2, idx = dist2[..., :k], idx[..., :k]

`crosspoint.ops.reference` holds the whole of it. The graph is DGCNN's (Wang et al., Dynamic Graph CNN for
Learning on Point Clouds, ACM Transactions on Graphics 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosspoint import _check
from crosspoint.ops import _dispatch, _library, reference
from crosspoint.ops._checks import check_lengths

__all__ = ["knn", "knn_graph"]


def knn_graph(
    x: Tensor, k: int, *, lengths: Tensor | None = None, include_self: bool = True, impl: str = "auto"
) -> Tensor:
    """The k nearest neighbours of each point within its own cloud.

    Args:
        x: points or features, (B, N, C), floating point.
        k: neighbours per point, at least 1; it may exceed N.
        lengths: valid points of each cloud, (B,), integers in [0, N]; all of them by default.
        include_self: True puts the point itself first, then the nearest others; False leaves it out. Either
            way the point is known by its index, so that its duplicates are ordinary neighbours.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        idx, (B, N, k) int64, ordered by (squared distance, index); -1 where there is no such neighbour and in
        the rows past `lengths`. It carries no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
        IndexError: a length is negative or exceeds N (compiled CPU backend; CUDA clamps lengths, and checks them
            where the environment sets CROSSPOINT_CHECK=1, at the price of waiting for the device).
    """
    _check_points("knn_graph", "x", x)
    _check_k("knn_graph", k)
    lengths = check_lengths("knn_graph", "lengths", lengths, "x", x)
    backend = _dispatch.choose("knn_graph", impl, x.device)
    if backend == "reference":
        return reference.knn_graph(x.detach(), k, lengths=lengths, include_self=include_self)
    return _dispatch.operator("knn_graph", backend)(x.detach(), k, lengths, include_self)


def knn(
    query: Tensor,
    points: Tensor,
    k: int,
    *,
    lengths_query: Tensor | None = None,
    lengths_points: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k nearest `points` of each `query`, and the squared distances to them.

    Args:
        query: (B, M, C), floating point.
        points: (B, N, C), of the same dtype.
        k: neighbours per query, at least 1; it may exceed N.
        lengths_query, lengths_points: valid rows of each cloud, (B,), integers in [0, M] and [0, N]; all of
            them by default.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        dist2, (B, M, k), ascending; float64 for float64 input, else float32. +inf where there is no such
        neighbour, with zero gradient. Differentiable twice in `query` and `points`.
        idx, (B, M, k) int64, ordered by (squared distance, index); -1 where there is no such neighbour.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
        IndexError: a length is negative or too large (as for `knn_graph`).
    """
    _check_points("knn", "query", query)
    _check_points("knn", "points", points)
    _check.same_batch(query.shape, points.shape)
    if query.dtype != points.dtype or query.device != points.device:
        raise ValueError(
            f"knn: query is {query.dtype} on {query.device}, points are {points.dtype} on {points.device}; "
            "convert one of them"
        )
    _check_k("knn", k)
    lengths_query = check_lengths("knn", "lengths_query", lengths_query, "query", query)
    lengths_points = check_lengths("knn", "lengths_points", lengths_points, "points", points)
    if query.dtype != torch.float64:
        query, points = query.float(), points.float()
    if points is query:
        points = query.view_as(query)  # torch.compile traces no Function that is given one tensor twice
    with torch.autocast(query.device.type, enabled=False):
        backend = _dispatch.choose("knn", impl, query.device)
        if backend == "reference":
            return reference.knn(query, points, k, lengths_query=lengths_query, lengths_points=lengths_points)
        return _Knn.apply(query, points, k, lengths_query, lengths_points, backend)


def _check_points(op: str, name: str, x: Tensor) -> None:
    _check.points_shape(op, name, x.shape)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}; convert it with .float()")


def _check_k(op: str, k: int) -> None:
    _check.count(op, "k", k, (int, torch.SymInt))


def _knn_graph_fake(x: Tensor, k: int, lengths: Tensor | None, include_self: bool) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], k), dtype=torch.int64)


def _knn_fake(
    query: Tensor, points: Tensor, k: int, lengths_query: Tensor | None, lengths_points: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], k)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


def _triton_kernels():
    from crosspoint.kernels import knn

    return knn


_library.define(
    "knn_graph(Tensor x, SymInt k, Tensor? lengths, bool include_self) -> Tensor", _knn_graph_fake
)
_library.define(
    "knn(Tensor query, Tensor points, SymInt k, Tensor? lengths_query, Tensor? lengths_points)"
    " -> (Tensor dist2, Tensor idx)",
    _knn_fake,
)
_library.define_like("knn_graph", "triton")
_library.define_like("knn", "triton")
_library.implement_triton("knn_graph_triton", lambda *args: _triton_kernels().knn_graph(*args))
_library.implement_triton("knn_triton", lambda *args: _triton_kernels().knn(*args))


class _Knn(torch.autograd.Function):
    @staticmethod
    def forward(query, points, k, lengths_query, lengths_points, backend):
        return _dispatch.operator("knn", backend)(query, points, k, lengths_query, lengths_points)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, points = inputs[:2]
        dist2, idx = output
        ctx.mark_non_differentiable(idx)
        ctx.save_for_backward(query, points, idx, dist2.isfinite())

    @staticmethod
    def backward(ctx, grad_dist2, _):
        # In differentiable operations, which is what makes the second derivative right.
        query, points, idx, finite = ctx.saved_tensors
        if points.shape[1] == 0:
            return torch.zeros_like(query), torch.zeros_like(points), None, None, None, None
        cloud = torch.arange(idx.shape[0], device=idx.device)[:, None, None].expand_as(idx)
        place = idx.clamp_min(0)
        difference = torch.where(
            finite[..., None], query[:, :, None] - points[cloud, place], 0
        )  # (B, M, k, C)
        grad = 2 * torch.where(finite, grad_dist2, 0)[..., None] * difference
        grad_points = torch.zeros_like(points).index_put((cloud, place), -grad, accumulate=True)
        return grad.sum(2), grad_points, None, None, None, None


_dispatch.register("knn_graph", "knn_graph")
_dispatch.register("knn", "knn")
