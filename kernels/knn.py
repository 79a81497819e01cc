"""k nearest neighbours, exact: which kernels run, and what they work on.

* up to 128 neighbours, up to 3 channels, many points: `knn_tree`, which opens only boxes of points that come near
* up to 128 neighbours: `direct_kernel`, two scans and a short sort
* up to 40 neighbours, 16 to 256 channels: `knn_filter`, a matrix product that sorts out candidates
* more neighbours: `merge_kernel`, one pass over the points per 128 of them
* float64: `sweep_kernel`, one pass per neighbour: right, and slow
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from crosspoint.kernels import knn_filter, knn_tree
from crosspoint.kernels._checks import check_length_values
from crosspoint.kernels._common import device_of, programs, rows_of_block, widened
from crosspoint.kernels.knn_direct import (
    DIRECT,
    MERGE,
    OTHER_SET,
    SELF_FIRST,
    SELF_LEFT_OUT,
    SWEEP,
    channels_constant,
    direct_kernel,
    merge_kernel,
    sweep_kernel,
)

__all__ = ["knn", "knn_graph"]


def knn_graph(x: Tensor, k: int, lengths: Tensor | None, include_self: bool) -> Tensor:
    """idx (B, N, k) of crosspoint::knn_graph_triton."""
    check_length_values("lengths", lengths, x.shape[1])
    x = widened(x)
    idx = x.new_empty((x.shape[0], x.shape[1], k), dtype=torch.int64)
    own = SELF_FIRST if include_self else SELF_LEFT_OUT
    _search(x, x, k, lengths, lengths, own.value, idx, None)
    return idx


def knn(
    query: Tensor, points: Tensor, k: int, lengths_query: Tensor | None, lengths_points: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dist2, idx (B, M, k) of crosspoint::knn_triton."""
    check_length_values("lengths_query", lengths_query, query.shape[1])
    check_length_values("lengths_points", lengths_points, points.shape[1])
    query, points = widened(query), widened(points)
    shape = (query.shape[0], query.shape[1], k)
    dist2, idx = query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)
    _search(query, points, k, lengths_query, lengths_points, OTHER_SET.value, idx, dist2)
    return dist2, idx


def _search(
    query: Tensor,
    points: Tensor,
    k: int,
    lengths_query: Tensor | None,
    lengths_points: Tensor | None,
    own: int,
    idx: Tensor,
    dist2: Tensor | None,
) -> None:
    """Fills idx and dist2 (B, M, k) with the neighbours of query (B, M, C) among points (B, N, C)."""
    if idx.numel() == 0:
        return
    (B, M, C), N = query.shape, points.shape[1]
    lengths = [None if t is None else t.contiguous() for t in (lengths_query, lengths_points)]
    with device_of(query):
        if query.dtype == torch.float32 and knn_filter.fits(query, k):
            wanted = knn_filter.search(query, points, k, *lengths, own, idx, dist2)
            _direct(query, points, N, (C, 1), k, lengths, own, idx, dist2, wanted)
            return
        if query.dtype == torch.float32 and knn_tree.fits(query, points, k):
            knn_tree.search(query, points, k, *lengths, own, idx, dist2)
            return
        columns = points.transpose(1, 2).contiguous()  # (B, C, N): lanes read neighbouring points
        if query.dtype == torch.float32 and k <= DIRECT[-1].k:
            _direct(query, columns, N, (1, N), k, lengths, own, idx, dist2, None)
            return
        entry, kernel = (SWEEP, sweep_kernel) if query.dtype == torch.float64 else (MERGE, merge_kernel)
        constants = entry.constants()
        constants["ROWS"] = rows_of_block(entry.rows)
        kernel[(B * triton.cdiv(M, constants["ROWS"]),)](
            *(query, columns, *lengths, idx, dist2, M, N, k, 1, N, C),
            CHANNELS=channels_constant(C),
            SELF=own,
            num_warps=entry.warps,
            **constants,
        )


def _direct(
    query: Tensor,
    points: Tensor,
    N: int,
    strides: tuple[int, int],
    k: int,
    lengths: list[Tensor | None],
    own: int,
    idx: Tensor,
    dist2: Tensor | None,
    wanted: Tensor | None,
) -> None:
    """`strides`: from point to point and from channel to channel. `wanted` (B, M): which queries, all by default."""
    B, M, C = query.shape
    entry = next(entry for entry in DIRECT if k <= entry.k)
    constants = entry.constants()
    constants["ROWS"] = rows = rows_of_block(entry.rows)
    blocks = B * triton.cdiv(M, rows)
    grid = programs(blocks, query, per_processor=8)
    space = idx.new_empty((grid, rows, entry.capacity))
    direct_kernel[(grid,)](
        *(query, points, *lengths, idx, dist2, space, wanted, blocks, M, N, k, *strides, C),
        CHANNELS=channels_constant(C),
        SELF=own,
        **constants,
        **entry.options(),
    )
