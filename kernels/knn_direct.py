"""k nearest neighbours: float32 distances by direct differences, order by (distance, index), exact.

A neighbour is one 64-bit key: the bits of its squared distance (which order as integers, being positive), then its
index. So ties, duplicates and NaN (counted as +inf) need no second comparison, and a sort gives the answer.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from crosspoint.kernels._common import MISSING, merge_rows, sort_rows

__all__ = [
    "DIRECT",
    "MERGE",
    "OTHER_SET",
    "SELF_FIRST",
    "SELF_LEFT_OUT",
    "SWEEP",
    "channels_constant",
    "direct_kernel",
    "merge_kernel",
    "sweep_kernel",
]

OTHER_SET = tl.constexpr(0)
SELF_FIRST = tl.constexpr(1)
SELF_LEFT_OUT = tl.constexpr(2)
BEFORE_ALL = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # less than any key


class Direct(NamedTuple):
    """Launch parameters of the direct kernel for k up to `k`."""

    k: int
    rows: int  # queries of a block
    groups: int  # whose minima bound the k-th distance
    capacity: int  # points within the bound that a query keeps
    warps: int

    def constants(self) -> dict[str, int]:
        tile = max(self.groups, 64)
        return {"ROWS": self.rows, "TILE": tile, "GROUPS": self.groups, "CAPACITY": self.capacity}

    def options(self) -> dict[str, int]:
        # Left to itself, ptxas aims at fewer registers and keeps some values in memory instead.
        return {"num_warps": self.warps, "num_stages": 1, "maxnreg": 255}


class Merge(NamedTuple):
    """Launch parameters of the merging kernel, which finds k neighbours at a time."""

    k: int
    rows: int
    warps: int

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "K": self.k}


class Sweep(NamedTuple):
    """Launch parameters of the sweeping kernel."""

    rows: int
    tile: int
    warps: int

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "TILE": self.tile}


# By k. Measured on surfaces, in random and in sorted order, about 1 query in 100 overflows at most.
DIRECT = (
    Direct(8, 8, 32, 32, 4),
    Direct(20, 8, 32, 64, 4),
    Direct(40, 4, 64, 128, 4),
    Direct(128, 4, 256, 256, 4),
)
MERGE = Merge(128, 8, 4)
SWEEP = Sweep(8, 64, 4)

UNROLLED_CHANNELS = 4


def channels_constant(C: int) -> int:
    """CHANNELS of a kernel: few channels are unrolled, one kernel each; more are a run-time value."""
    return C if 1 <= C <= UNROLLED_CHANNELS else 0


# ---- keys


@triton.jit
def _tile(
    p_query,
    p_points,
    o_row,
    i_tile,
    n_row,
    n_point,
    s_point,
    s_channel,
    C,
    CHANNELS: tl.constexpr,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Squared distances (ROWS, TILE) of the queries o_row, (M, C), to points [i_tile, i_tile + TILE), with NaN made
    +inf, and -1 to itself where that comes first; where those points are; their indices. Differences are summed
    channel by channel; CHANNELS is C, or 0 to read C at run time."""
    o_column = i_tile + tl.arange(0, TILE)
    m_row, m_column = o_row < n_row, o_column < n_point
    p_row = p_query + o_row.to(tl.int64) * C
    p_column = p_points + o_column.to(tl.int64) * s_point
    b_sum = tl.zeros([ROWS, TILE], p_points.dtype.element_ty)
    for c in tl.static_range(CHANNELS):
        b_query = tl.load(p_row + c, mask=m_row, other=0.0)
        b_difference = b_query[:, None] - tl.load(p_column, mask=m_column, other=0.0)[None, :]
        b_sum = tl.fma(b_difference, b_difference, b_sum)
        p_column += s_channel
    if CHANNELS == 0:
        for c in range(C):
            b_query = tl.load(p_row + c, mask=m_row, other=0.0)
            b_difference = b_query[:, None] - tl.load(p_column, mask=m_column, other=0.0)[None, :]
            b_sum = tl.fma(b_difference, b_difference, b_sum)
            p_column += s_channel
    b_sum = tl.where(b_sum == b_sum, b_sum, float("inf"))
    m_there = m_column[None, :]
    if SELF == SELF_FIRST:
        b_sum = tl.where(o_row[:, None] == o_column[None, :], -1.0, b_sum)
    if SELF == SELF_LEFT_OUT:
        m_there = m_there & (o_row[:, None] != o_column[None, :])
    return b_sum, m_there, o_column[None, :]


@triton.jit
def _tile_keys(
    p_query,
    p_points,
    o_row,
    i_tile,
    n_row,
    n_point,
    s_point,
    s_channel,
    C,
    CHANNELS: tl.constexpr,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The same as keys (ROWS, TILE), MISSING where there is no point."""
    b_sum, m_there, o_column = _tile(
        p_query, p_points, o_row, i_tile, n_row, n_point, s_point, s_channel, C, CHANNELS, SELF, ROWS, TILE
    )
    b_keys = (b_sum.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_column.to(tl.int64)
    return tl.where(m_there, b_keys, MISSING)


@triton.jit
def _locate(i_block, M, N, p_lengths_query, p_lengths_points, ROWS: tl.constexpr):
    """The cloud of a block, its first query, and how many queries and points that cloud has."""
    i_cloud = (i_block // tl.cdiv(M, ROWS)).to(tl.int64)
    i_first = (i_block % tl.cdiv(M, ROWS)) * ROWS
    n_row, n_point = M, N
    if p_lengths_query is not None:
        n_row = tl.minimum(tl.maximum(tl.load(p_lengths_query + i_cloud), 0), M).to(tl.int32)
    if p_lengths_points is not None:
        n_point = tl.minimum(tl.maximum(tl.load(p_lengths_points + i_cloud), 0), N).to(tl.int32)
    return i_cloud, i_first, n_row, n_point


@triton.jit
def _kth(b_sorted, k, WIDTH: tl.constexpr):
    """The k-th key of each row (ROWS, WIDTH); the last if there are fewer."""
    return tl.max(tl.where((tl.arange(0, WIDTH) < k)[None, :], b_sorted, BEFORE_ALL), 1)


@triton.jit
def _write(p_idx, p_dist2, b_keys, i_cloud, o_row, o_place, n_row, M, k):
    """Stores (ROWS, WIDTH) keys as the neighbours o_place of the queries o_row; none for the rows of padding."""
    o_out = (i_cloud * M + o_row)[:, None] * k + o_place[None, :]
    m_out = (o_row < M)[:, None] & (o_place < k)[None, :]
    m_found = (b_keys != MISSING) & (o_row < n_row)[:, None]
    tl.store(p_idx + o_out, tl.where(m_found, b_keys & 0xFFFFFFFF, -1), mask=m_out)
    if p_dist2 is not None:
        b_distance = (b_keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(p_dist2 + o_out, tl.where(m_found, b_distance, float("inf")), mask=m_out)


# ---- every k: the best so far, merged with one sorted tile after the other


@triton.jit
def _merge_scan(
    p_query,
    p_points,
    o_row,
    n_row,
    n_point,
    b_floor,
    s_point,
    s_channel,
    C,
    CHANNELS: tl.constexpr,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
):
    """The first K keys of each query that come after b_floor, in order."""
    b_best = tl.full([ROWS, K], MISSING, tl.int64)
    for i_tile in range(0, n_point, K):
        b_keys = _tile_keys(
            p_query, p_points, o_row, i_tile, n_row, n_point, s_point, s_channel, C, CHANNELS, SELF, ROWS, K
        )
        b_keys = tl.where(b_keys > b_floor[:, None], b_keys, MISSING)
        b_keys = sort_rows(b_keys, ROWS, K, DOWN=1)
        b_best = merge_rows(tl.minimum(b_best, b_keys), ROWS, K)
    return b_best


@triton.jit(do_not_specialize=["M", "N", "k", "s_channel"])
def merge_kernel(
    p_query,
    p_points,
    p_lengths_query,
    p_lengths_points,
    p_idx,
    p_dist2,
    M,
    N,
    k,
    s_point,
    s_channel,
    C,
    CHANNELS: tl.constexpr,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
):
    """Exact for every k: ceil(k / K) passes over the points, each for the next K neighbours."""
    i_cloud, i_first, n_row, n_point = _locate(
        tl.program_id(0), M, N, p_lengths_query, p_lengths_points, ROWS
    )
    o_row = i_first + tl.arange(0, ROWS)
    p_query += i_cloud * M * C
    p_points += i_cloud * N * C
    b_floor = tl.full([ROWS], BEFORE_ALL, tl.int64)
    for i_pass in range(0, k, K):
        b_best = _merge_scan(
            p_query, p_points, o_row, n_row, n_point, b_floor, s_point, s_channel, C, CHANNELS, SELF, ROWS, K
        )
        _write(p_idx, p_dist2, b_best, i_cloud, o_row, i_pass + tl.arange(0, K), n_row, M, k)
        b_floor = tl.max(b_best, 1)


# ---- few neighbours: a bound on the k-th distance, then only what lies within it


@triton.jit(do_not_specialize=["M", "N", "k", "s_channel", "n_block"])
def direct_kernel(
    p_query,
    p_points,
    p_lengths_query,
    p_lengths_points,
    p_idx,
    p_dist2,
    p_space,
    p_wanted,
    n_block,
    M,
    N,
    k,
    s_point,
    s_channel,
    C,
    CHANNELS: tl.constexpr,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Two scans. The first takes the least key of each of GROUPS groups of points: the k-th of these minima is no
    less than the k-th key, as k groups hold one key each that is no greater. The second keeps the keys up to there, of
    which there are few, whatever the number of points, and sorts them. Should it meet more than CAPACITY, then the
    k-th of those it kept is a closer bound, and it scans again; it drops CAPACITY - k of them at least. With p_wanted,
    only blocks that hold a wanted query run."""
    o_kept = tl.arange(0, CAPACITY)
    p_space += (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None] * CAPACITY
    for i_block in range(tl.program_id(0), n_block, tl.num_programs(0)):
        i_cloud, i_first, n_row, n_point = _locate(i_block, M, N, p_lengths_query, p_lengths_points, ROWS)
        o_row = i_first + tl.arange(0, ROWS)
        wanted = True
        if p_wanted is not None:
            b_wanted = tl.load(p_wanted + i_cloud * M + o_row, mask=o_row < n_row, other=0)
            wanted = tl.max(b_wanted, 0) > 0
        if wanted:
            p_q = p_query + i_cloud * M * C
            p_p = p_points + i_cloud * N * C
            b_least = tl.full([ROWS, TILE], MISSING, tl.int64)
            for i_tile in range(0, n_point, TILE):
                b_keys = _tile_keys(
                    p_q, p_p, o_row, i_tile, n_row, n_point, s_point, s_channel, C, CHANNELS, SELF, ROWS, TILE
                )
                b_least = tl.minimum(b_least, b_keys)
            b_least = tl.min(tl.reshape(b_least, [ROWS, TILE // GROUPS, GROUPS]), 1)
            b_bound = _kth(sort_rows(b_least, ROWS, GROUPS), k, GROUPS)

            b_kept = tl.full([ROWS, CAPACITY], MISSING, tl.int64)
            excess = True
            while excess:
                b_count = tl.zeros([ROWS], tl.int32)
                for i_tile in range(0, n_point, TILE):
                    b_keys = _tile_keys(
                        p_q,
                        p_p,
                        o_row,
                        i_tile,
                        n_row,
                        n_point,
                        s_point,
                        s_channel,
                        C,
                        CHANNELS,
                        SELF,
                        ROWS,
                        TILE,
                    )
                    m_kept = (b_keys <= b_bound[:, None]) & (b_keys != MISSING)
                    b_place = b_count[:, None] + tl.cumsum(m_kept.to(tl.int32), 1) - 1
                    tl.store(p_space + b_place, b_keys, mask=m_kept & (b_place < CAPACITY))
                    b_count += tl.sum(m_kept.to(tl.int32), 1)
                tl.debug_barrier()  # what one thread of the block wrote, another reads
                m_kept = o_kept[None, :] < b_count[:, None]
                b_kept = tl.load(p_space + o_kept[None, :], mask=m_kept, other=MISSING)
                tl.debug_barrier()  # before the workspace is written again
                b_kept = sort_rows(b_kept, ROWS, CAPACITY)
                b_bound = _kth(b_kept, k, CAPACITY)
                excess = tl.max(b_count, 0) > CAPACITY
            _write(p_idx, p_dist2, b_kept, i_cloud, o_row, o_kept, n_row, M, k)


# ---- float64: distance and index do not fit one key


@triton.jit(do_not_specialize=["M", "N", "k", "s_channel"])
def sweep_kernel(
    p_query,
    p_points,
    p_lengths_query,
    p_lengths_points,
    p_idx,
    p_dist2,
    M,
    N,
    k,
    s_point,
    s_channel,
    C,
    CHANNELS: tl.constexpr,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One neighbour after the other, each by a scan for the first (distance, index) after the last: k scans."""
    i_cloud, i_first, n_row, n_point = _locate(
        tl.program_id(0), M, N, p_lengths_query, p_lengths_points, ROWS
    )
    o_row = i_first + tl.arange(0, ROWS)
    p_query += i_cloud * M * C
    p_points += i_cloud * N * C
    NONE: tl.constexpr = 0x7FFFFFFF
    INFINITY: tl.constexpr = float("inf")
    b_last = tl.full([ROWS], -INFINITY, p_points.dtype.element_ty)
    b_last_at = tl.full([ROWS], -1, tl.int32)
    for i_place in range(k):
        b_best = tl.full([ROWS], INFINITY, p_points.dtype.element_ty)
        b_best_at = tl.full([ROWS], NONE, tl.int32)
        for i_tile in range(0, n_point, TILE):
            b_distance, m_there, o_column = _tile(
                p_query,
                p_points,
                o_row,
                i_tile,
                n_row,
                n_point,
                s_point,
                s_channel,
                C,
                CHANNELS,
                SELF,
                ROWS,
                TILE,
            )
            m_later = (b_distance == b_last[:, None]) & (o_column > b_last_at[:, None])
            m_there = m_there & ((b_distance > b_last[:, None]) | m_later)
            b_least = tl.min(tl.where(m_there, b_distance, INFINITY), 1)
            m_least = m_there & (b_distance == b_least[:, None])
            b_least_at = tl.min(tl.where(m_least, o_column, NONE), 1)
            # Later tiles hold larger indices, so that equal distances leave the first where it is.
            m_better = (b_least < b_best) | ((b_best_at == NONE) & (b_least_at != NONE))
            b_best = tl.where(m_better, b_least, b_best)
            b_best_at = tl.where(m_better, b_least_at, b_best_at)
        m_found = (b_best_at != NONE) & (o_row < n_row)
        o_out = (i_cloud * M + o_row) * k + i_place
        tl.store(p_idx + o_out, tl.where(m_found, b_best_at, -1).to(tl.int64), mask=o_row < M)
        if p_dist2 is not None:
            tl.store(p_dist2 + o_out, tl.where(m_found, b_best, INFINITY), mask=o_row < M)
        b_last, b_last_at = b_best, b_best_at
