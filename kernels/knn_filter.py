"""k nearest neighbours among many channels: tensor cores sort out candidates, float32 differences decide.

Let x, y be points, x", y" the same centred and rounded to bfloat16, which is what tensor cores multiply. The product
gives s = |y"|^2 / 2 - x" y", so |x" - y"|^2 = 2 s + |x"|^2. Each point moves by no more than its own loss, so |x" - y"|
is within e = loss(x) + max_j loss(y_j) of |x - y|. With reach = |x"| + max_j |y_j"|, an error of s is at most
E = (2 C + 16) 2^-22 reach^2: products of bfloat16 are exact, and a tensor core that adds 16 of them to a float32 sum,
cutting off what lies 2^-23 below the largest, loses (1.125 C + 2) 2^-23 reach^2 / 4; norms lose (C + 4) 2^-24 reach^2.
So if k points have s <= t, none of the k nearest is farther than root = sqrt(2 (t + E) + |x"|^2) + e, but for the
rounding of direct differences, a factor 1 + (C + 3) 2^-24; and they all have s <= ((root + e)^2 - |x"|^2) / 2 + E.
Everything up to there is compared by direct differences: the answer is exact, whatever the product was rounded to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import INTERPRETED, MISSING, dot, sort_rows
from crosspoint.kernels.knn_direct import OTHER_SET, SELF_FIRST, _locate, _write

__all__ = [
    "CENTRE",
    "FILTER",
    "ROUND_ROWS",
    "WIDTHS",
    "centre_kernel",
    "filter_kernel",
    "fits",
    "rerank_kernel",
    "round_kernel",
    "search",
]


class Filter(NamedTuple):
    """Launch parameters for k up to `k`."""

    k: int
    tile: int  # points at a time
    groups: int  # whose minima bound the k-th distance
    capacity: int  # candidates that a query keeps
    warps: int
    rerank_rows: int

    def constants(self) -> dict[str, int]:
        return {"ROWS": FILTER_ROWS, "TILE": self.tile, "GROUPS": self.groups, "CAPACITY": self.capacity}

    def rerank_constants(self) -> dict[str, int]:
        return {"ROWS": self.rerank_rows, "CAPACITY": self.capacity, "CHUNK": RERANK_CHUNK}


FILTER_ROWS = 64  # the least that tensor cores of sm_90 and sm_100 take from one warp group
FILTER = (Filter(20, 64, 64, 64, 4, 4), Filter(40, 64, 64, 128, 4, 2))
WIDTHS = (64, 128, 256)  # channels, padded with zeros
RERANK_CHUNK = 8
CENTRE = {"ROWS": 32, "CHUNK": 16}
ROUND_ROWS = 32
LEAST_CHANNELS = 16


def fits(x: Tensor, k: int) -> bool:
    """Whether the filter takes clouds like x (B, N, C): enough channels, and not too many neighbours."""
    return LEAST_CHANNELS <= x.shape[2] <= WIDTHS[-1] and k <= FILTER[-1].k


@triton.jit(do_not_specialize=["N"])
def centre_kernel(p_points, p_lengths_points, p_centre, N, C, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The mean of each cloud, (B, C): any point near its middle would do."""
    i_cloud = (tl.program_id(0) // tl.cdiv(C, CHUNK)).to(tl.int64)
    o_channel = (tl.program_id(0) % tl.cdiv(C, CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    n_point = N
    if p_lengths_points is not None:
        n_point = tl.minimum(tl.maximum(tl.load(p_lengths_points + i_cloud), 0), N).to(tl.int32)
    m_channel = o_channel < C
    b_sum = tl.zeros([ROWS, CHUNK], tl.float32)
    for i_row in range(0, n_point, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        o_point = (i_cloud * N + o_row)[:, None] * C + o_channel[None, :]
        b_sum += tl.load(p_points + o_point, mask=(o_row < n_point)[:, None] & m_channel[None, :], other=0.0)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(n_point, 1).to(tl.float32)
    tl.store(p_centre + i_cloud * C + o_channel, b_mean, mask=m_channel)


@triton.jit(do_not_specialize=["N"])
def round_kernel(
    p_points,
    p_lengths_points,
    p_centre,
    p_rounded,
    p_norm2,
    p_lost2,
    p_extent,
    N,
    C,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Points as they are multiplied, (B, N, WIDTH) bfloat16; their squared norms, those of what rounding lost, and of
    each cloud the largest of both, as the bits of float32. What is not finite, or may overflow, counts as +inf."""
    i_cloud, i_first, n_point, _ = _locate(tl.program_id(0), N, N, p_lengths_points, None, ROWS)
    o_row, o_channel = i_first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    m_row, m_channel = o_row < n_point, o_channel < C
    o_all = i_cloud * N + o_row
    m_value = m_row[:, None] & m_channel[None, :]
    b_centre = tl.load(p_centre + i_cloud * C + o_channel, mask=m_channel, other=0.0)
    b_point = tl.load(p_points + o_all[:, None] * C + o_channel[None, :], mask=m_value, other=0.0)
    b_point = tl.where(m_value, b_point - b_centre[None, :], 0.0)
    b_rounded = b_point.to(tl.bfloat16)
    b_kept = b_rounded.to(tl.float32)
    b_norm2 = tl.sum(b_kept * b_kept, 1)
    b_lost2 = tl.sum((b_point - b_kept) * (b_point - b_kept), 1)
    m_finite = (b_norm2 < 5e36) & (b_lost2 < 5e36)
    b_norm2 = tl.where(m_finite, b_norm2, float("inf"))
    b_lost2 = tl.where(m_finite, b_lost2, float("inf"))
    tl.store(p_rounded + o_all[:, None] * WIDTH + o_channel[None, :], b_rounded, mask=(o_row < N)[:, None])
    tl.store(p_norm2 + o_all, b_norm2, mask=m_row)
    tl.store(p_lost2 + o_all, b_lost2, mask=m_row)
    if p_extent is not None:
        tl.atomic_max(p_extent + 2 * i_cloud, tl.max(b_norm2, 0).to(tl.int32, bitcast=True))
        tl.atomic_max(p_extent + 2 * i_cloud + 1, tl.max(b_lost2, 0).to(tl.int32, bitcast=True))


@triton.jit
def _order(b_bits):
    """Between the bits of float32 and integers of the same order; its own inverse."""
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(
    b_query,
    p_rounded,
    p_norm2,
    i_tile,
    o_row,
    n_point,
    SELF: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """s (ROWS, TILE) of points [i_tile, i_tile + TILE); +inf where there is none, and for the point itself."""
    o_column = i_tile + tl.arange(0, TILE)
    m_column = o_column < n_point
    p_tile = p_rounded + o_column.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    b_points = tl.load(p_tile, mask=m_column[:, None], other=0.0)
    b_half = 0.5 * tl.load(p_norm2 + o_column, mask=m_column, other=float("inf"))
    b_score = b_half[None, :] - dot(b_query, tl.trans(b_points))
    if SELF != OTHER_SET:
        b_score = tl.where(o_row[:, None] == o_column[None, :], float("inf"), b_score)
    return b_score


@triton.jit
def _cut(b_t, b_norm2, b_lost2, norm2, lost2, C):
    """No s of a point that may be among the k nearest exceeds the result, given that k points have s <= b_t."""
    unit = 2.384185791015625e-07  # 2^-22
    b_norm2 = b_norm2.to(tl.float64)
    b_reach = tl.sqrt(b_norm2) + tl.sqrt(norm2.to(tl.float64))
    b_moved = 1.001 * (tl.sqrt(b_lost2.to(tl.float64)) + tl.sqrt(lost2.to(tl.float64)) + unit * b_reach)
    tiny = (2 * C + 16).to(tl.float64) * 1.1754943508222875e-38
    b_error = (2 * C + 16).to(tl.float64) * unit * b_reach * b_reach + 4 * tiny
    b_near2 = 2 * (b_t.to(tl.float64) + b_error) + b_norm2
    b_root = tl.sqrt(tl.where(b_near2 > 0, b_near2, 0)) + b_moved
    b_far = tl.sqrt(b_root * b_root * (1 + (2 * C + 16).to(tl.float64) * unit) + tiny) + b_moved
    return ((b_far * b_far - b_norm2) / 2 + b_error).to(tl.float32)


@triton.jit(do_not_specialize=["M", "N", "k"])
def filter_kernel(
    p_query,
    p_points,
    p_norm2_query,
    p_lost2_query,
    p_norm2,
    p_extent,
    p_lengths_query,
    p_lengths_points,
    p_candidates,
    p_count,
    p_wanted,
    M,
    N,
    k,
    C,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Candidates of each query, (B, M, CAPACITY), and how many; `wanted` where they are too many or have no bound. The
    first scan bounds the k-th score by minima of groups of points, the second keeps what may lie within."""
    i_cloud, i_first, n_row, n_point = _locate(
        tl.program_id(0), M, N, p_lengths_query, p_lengths_points, ROWS
    )
    o_row = i_first + tl.arange(0, ROWS)
    m_row = o_row < n_row
    o_all = i_cloud * M + o_row
    p_points += i_cloud * N * WIDTH
    p_norm2 += i_cloud * N
    p_own = p_query + o_all[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    b_query = tl.load(p_own, mask=m_row[:, None], other=0.0)

    b_least = tl.full([ROWS, TILE], float("inf"), tl.float32)
    for i_tile in range(0, n_point, TILE):
        b_least = tl.minimum(
            b_least, _scores(b_query, p_points, p_norm2, i_tile, o_row, n_point, SELF, TILE, WIDTH)
        )
    b_least = tl.min(tl.reshape(b_least, [ROWS, TILE // GROUPS, GROUPS]), 1)
    b_sorted = sort_rows(_order(b_least.to(tl.int32, bitcast=True)), ROWS, GROUPS)
    near = k
    if SELF == SELF_FIRST:
        near = k - 1
    b_t = tl.max(tl.where((tl.arange(0, GROUPS) < near)[None, :], b_sorted, _order(-8388608)), 1)
    b_norm2 = tl.load(p_norm2_query + o_all, mask=m_row, other=0.0)
    b_lost2 = tl.load(p_lost2_query + o_all, mask=m_row, other=0.0)
    norm2 = tl.load(p_extent + 2 * i_cloud).to(tl.float32, bitcast=True)
    lost2 = tl.load(p_extent + 2 * i_cloud + 1).to(tl.float32, bitcast=True)
    b_cut = _cut(_order(b_t).to(tl.float32, bitcast=True), b_norm2, b_lost2, norm2, lost2, C)

    b_count = tl.zeros([ROWS], tl.int32)
    for i_tile in range(0, n_point, TILE):
        b_score = _scores(b_query, p_points, p_norm2, i_tile, o_row, n_point, SELF, TILE, WIDTH)
        m_kept = (b_score <= b_cut[:, None]) & (b_score < float("inf"))
        b_place = b_count[:, None] + tl.cumsum(m_kept.to(tl.int32), 1) - 1
        p_place = p_candidates + o_all[:, None] * CAPACITY + b_place
        o_column = (i_tile + tl.arange(0, TILE))[None, :] + tl.zeros([ROWS, 1], tl.int32)
        tl.store(p_place, o_column, mask=m_kept & m_row[:, None] & (b_place < CAPACITY))
        b_count += tl.sum(m_kept.to(tl.int32), 1)
    m_bounded = b_norm2 + norm2 < float("inf")
    tl.store(p_wanted + o_all, ((b_count > CAPACITY) | (m_bounded == 0)).to(tl.int32), mask=m_row)
    tl.store(p_count + o_all, tl.where(m_bounded, tl.minimum(b_count, CAPACITY), 0), mask=m_row)


@triton.jit(do_not_specialize=["M", "N", "k"])
def rerank_kernel(
    p_query,
    p_points,
    p_lengths_query,
    p_candidates,
    p_count,
    p_idx,
    p_dist2,
    M,
    N,
    k,
    C,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compares the candidates of each query by direct differences."""
    i_cloud, i_first, n_row, _ = _locate(tl.program_id(0), M, N, p_lengths_query, None, ROWS)
    o_row, o_kept = i_first + tl.arange(0, ROWS), tl.arange(0, CAPACITY)
    m_row = o_row < n_row
    o_all = i_cloud * M + o_row
    b_count = tl.load(p_count + o_all, mask=m_row, other=0)
    m_kept = o_kept[None, :] < b_count[:, None]
    b_column = tl.load(p_candidates + o_all[:, None] * CAPACITY + o_kept[None, :], mask=m_kept, other=0)
    p_candidate = p_points + (i_cloud * N + b_column) * C
    b_sum = tl.zeros([ROWS, CAPACITY], tl.float32)
    for i_channel in range(0, C, CHUNK):
        o_channel = i_channel + tl.arange(0, CHUNK)
        m_channel = o_channel < C
        b_query = tl.load(
            p_query + o_all[:, None] * C + o_channel[None, :],
            mask=m_row[:, None] & m_channel[None, :],
            other=0.0,
        )
        b_point = tl.load(
            p_candidate[:, :, None] + o_channel[None, None, :],
            mask=m_kept[:, :, None] & m_channel[None, None, :],
            other=0.0,
        )
        b_difference = b_query[:, None, :] - b_point
        b_sum += tl.sum(b_difference * b_difference, 2)
    b_keys = (b_sum.to(tl.int32, bitcast=True).to(tl.int64) << 32) | b_column.to(tl.int64)
    b_keys = sort_rows(tl.where(m_kept, b_keys, MISSING), ROWS, CAPACITY)
    o_place = o_kept
    if SELF == SELF_FIRST:
        o_place = o_kept + 1
        b_own = tl.where(m_row, o_row, -1).to(tl.int64)
        tl.store(p_idx + o_all * k, b_own, mask=o_row < M)
    _write(p_idx, p_dist2, b_keys, i_cloud, o_row, o_place, n_row, M, k)


def search(
    query: Tensor,
    points: Tensor,
    k: int,
    lengths_query: Tensor | None,
    lengths_points: Tensor | None,
    own: int,
    idx: Tensor,
    dist2: Tensor | None,
) -> Tensor:
    """Fills idx and dist2 (B, M, k) but for some queries: returns which, (B, M) int32, valid within their lengths."""
    (B, M, C), N = query.shape, points.shape[1]
    entry = next(entry for entry in FILTER if k <= entry.k)
    width = next(width for width in WIDTHS if width >= C)
    centre = points.new_empty((B, C))
    centre_kernel[(B * triton.cdiv(C, CENTRE["CHUNK"]),)](points, lengths_points, centre, N, C, **CENTRE)
    extent = torch.zeros((B, 2), dtype=torch.int32, device=points.device)

    def rounded(x: Tensor, lengths: Tensor | None, extent: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        n = x.shape[1]
        out = x.new_empty((B, n, width), dtype=torch.bfloat16)
        norm2, lost2 = x.new_empty((B, n)), x.new_empty((B, n))
        if n:
            round_kernel[(B * triton.cdiv(n, ROUND_ROWS),)](
                x, lengths, centre, out, norm2, lost2, extent, n, C, ROWS=ROUND_ROWS, WIDTH=width
            )
        return out, norm2, lost2

    right, norm2, lost2 = rounded(points, lengths_points, extent)
    left, norm2_query, lost2_query = right, norm2, lost2
    if own == OTHER_SET.value:
        left, norm2_query, lost2_query = rounded(query, lengths_query, None)
    candidates = idx.new_empty((B, M, entry.capacity), dtype=torch.int32)
    count, wanted = (idx.new_empty((B, M), dtype=torch.int32) for _ in range(2))
    filter_kernel[(B * triton.cdiv(M, FILTER_ROWS),)](
        *(left, right, norm2_query, lost2_query, norm2, extent, lengths_query, lengths_points),
        *(candidates, count, wanted, M, N, k, C),
        SELF=own,
        WIDTH=width,
        num_warps=entry.warps,
        **entry.constants(),
    )
    constants = entry.rerank_constants()
    if INTERPRETED:
        constants["ROWS"] = 32
    rerank_kernel[(B * triton.cdiv(M, constants["ROWS"]),)](
        *(query, points, lengths_query, candidates, count, idx, dist2, M, N, k, C), SELF=own, **constants
    )
    return wanted
