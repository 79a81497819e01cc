"""k nearest neighbours in large clouds of up to three coordinates, float32: exact, without comparing all pairs.

Points go by a space-filling curve through cells that hold about as many points each along every axis, whatever the
cloud looks like. 32 consecutive ones make a leaf, 32 leaves a group, 32 groups a region, each with a box around it. A
program takes a few queries that are neighbours on the curve: the points around them bound their distances, and only
boxes whose first possible key is within the bound of a query are opened. The distance to a box takes the same
operations in the same order as the distance to a point, each of them monotone under rounding, so that it never exceeds
the computed distance to a point inside: nothing is missed. A box also knows its lowest index, so that of many points
at one distance only the first are looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from crosspoint.kernels._common import MISSING, programs, rows_of_block
from crosspoint.kernels.knn_direct import BEFORE_ALL, OTHER_SET, SELF_FIRST, _locate

__all__ = [
    "ENCODE",
    "TREE",
    "enclose_kernel",
    "encode_kernel",
    "fits",
    "plant_kernel",
    "search",
    "tree_kernel",
]


class Tree(NamedTuple):
    """Launch parameters for k up to `k`."""

    k: int
    rows: int  # queries of a program
    groups: int  # of the points around them, whose minima bound the k-th distance
    near: int  # points around them
    capacity: int  # points within the bound that a query keeps: at least k and a leaf
    registers: int  # of a thread: fewer would not do without a stack

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "GROUPS": self.groups, "NEAR": self.near, "CAPACITY": self.capacity}

    def options(self) -> dict[str, int]:
        return {"num_warps": 1, "num_stages": 1, "maxnreg": self.registers}


# One warp each: programs whose queries open different boxes do not wait for each other.
TREE = (
    Tree(20, 4, 32, 256, 64, 184),
    Tree(40, 4, 64, 256, 128, 232),
    Tree(128, 2, 256, 1024, 256, 255),
)
ENCODE = {"BLOCK": 256, "STEPS": 10}
AXES = 3
AXIS_BITS = ENCODE["STEPS"]
SAMPLE = 1 << AXIS_BITS  # points whose coordinates divide an axis
FAN = tl.constexpr(32)  # points of a leaf, leaves of a group, groups of a region
GROUP = tl.constexpr(32 * 32)  # points
REGION = tl.constexpr(32 * 32 * 32)

# Building the tree pays from here on, guessed as in csrc/cuda/knn_paths.h: it takes about 90 us.
LEAST = 8192
LEAST_OF_MANY, MANY_QUERIES = 4096, 65536


def fits(query: Tensor, points: Tensor, k: int) -> bool:
    """Whether the tree takes a search of query (B, M, C) among points (B, N, C): few coordinates, many points."""
    N = points.shape[1]
    large = N > LEAST or (N >= LEAST_OF_MANY and query.shape[0] * query.shape[1] >= MANY_QUERIES)
    return large and N < 1 << 30 and 1 <= points.shape[2] <= AXES and k <= TREE[-1].k


# ---- build


@triton.jit
def _spread(b_x):
    """10 bits, each to every third place."""
    b_x = (b_x | b_x << 16) & 0x030000FF
    b_x = (b_x | b_x << 8) & 0x0300F00F
    b_x = (b_x | b_x << 4) & 0x030C30C3
    return (b_x | b_x << 2) & 0x09249249


@triton.jit(do_not_specialize=["N"])
def encode_kernel(p_points, p_lengths, p_divisions, p_code, N, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Where points (B, N, 3) stand on the curve, (B, N): by how many of the divisions (B, 3, 2^STEPS), ascending, are
    less than each coordinate. What is beyond the length comes after all others."""
    i_cloud, i_first, n_point, _ = _locate(tl.program_id(0), N, N, p_lengths, None, BLOCK)
    o_point = i_first + tl.arange(0, BLOCK)
    m_point = o_point < n_point
    b_code = tl.zeros([BLOCK], tl.int32)
    for axis in tl.static_range(3):
        b_x = tl.load(p_points + (i_cloud * N + o_point) * 3 + axis, mask=m_point, other=0.0)
        p_axis = p_divisions + ((i_cloud * 3 + axis) << STEPS)
        b_below = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(STEPS):
            b_division = tl.load(p_axis + b_below + ((1 << (STEPS - 1 - i)) - 1))
            b_below += tl.where(b_division < b_x, 1 << (STEPS - 1 - i), 0)
        b_code |= _spread(b_below) << axis
    tl.store(p_code + i_cloud * N + o_point, tl.where(m_point, b_code, 0x7FFFFFFF), mask=o_point < N)


@triton.jit
def _boxes(N):
    """How many leaves, and boxes of all kinds, a cloud has room for: leaves first, then groups, then regions."""
    n_leaf = tl.cdiv(N, FAN)
    return n_leaf, n_leaf + tl.cdiv(N, GROUP) + tl.cdiv(N, REGION)


@triton.jit(do_not_specialize=["N"])
def plant_kernel(p_points, p_lengths, p_order, p_sorted, p_index, p_sides, p_lowest, N):
    """The points (B, N, 3) of one group in the order of the curve, (B, 3, N), and their indices, (B, N); boxes of the
    group and its leaves: sides (B, 6, boxes), lower then upper of each axis, and lowest index, (B, boxes). NaN stands
    at infinity and widens no box."""
    i_cloud, i_first, n_point, _ = _locate(tl.program_id(0), N, N, p_lengths, None, GROUP)
    n_leaf, n_box = _boxes(N)
    i_group = i_first // GROUP
    o_leaf = i_group * FAN + tl.arange(0, FAN)
    o_place = o_leaf[:, None] * FAN + tl.arange(0, FAN)[None, :]
    m_place, m_leaf = o_place < n_point, o_leaf < n_leaf
    b_order = tl.load(p_order + i_cloud * N + o_place, mask=m_place, other=0x7FFFFFFF).to(tl.int32)
    tl.store(p_index + i_cloud * N + o_place, b_order, mask=m_place)
    p_lowest += i_cloud * n_box
    b_lowest = tl.min(b_order, 1)
    tl.store(p_lowest + o_leaf, b_lowest, mask=m_leaf)
    tl.store(p_lowest + n_leaf + i_group, tl.min(b_lowest, 0))
    for axis in tl.static_range(3):
        p_x = p_points + (i_cloud * N + b_order) * 3 + axis
        b_x = tl.load(p_x, mask=m_place, other=0.0)
        tl.store(p_sorted + (i_cloud * 3 + axis) * N + o_place, b_x, mask=m_place)
        m_there = m_place & (b_x == b_x)
        p_low = p_sides + (i_cloud * 6 + axis * 2) * n_box
        p_high = p_low + n_box
        b_low = tl.min(tl.where(m_there, b_x, float("inf")), 1)
        b_high = tl.max(tl.where(m_there, b_x, float("-inf")), 1)
        tl.store(p_low + o_leaf, b_low, mask=m_leaf)
        tl.store(p_high + o_leaf, b_high, mask=m_leaf)
        tl.store(p_low + n_leaf + i_group, tl.min(b_low, 0))
        tl.store(p_high + n_leaf + i_group, tl.max(b_high, 0))


@triton.jit(do_not_specialize=["N"])
def enclose_kernel(p_sides, p_lowest, N):
    """The box of one region from those of its groups."""
    n_region, n_group = tl.cdiv(N, REGION), tl.cdiv(N, GROUP)
    n_leaf, n_box = _boxes(N)
    i_cloud, i_region = (tl.program_id(0) // n_region).to(tl.int64), tl.program_id(0) % n_region
    o_group = i_region * FAN + tl.arange(0, FAN)
    m_group = o_group < n_group
    p_lowest += i_cloud * n_box + n_leaf
    tl.store(
        p_lowest + n_group + i_region, tl.min(tl.load(p_lowest + o_group, mask=m_group, other=0x7FFFFFFF), 0)
    )
    p_sides += i_cloud * 6 * n_box + n_leaf
    for axis in tl.static_range(3):
        p_low = p_sides + 2 * axis * n_box
        b_low = tl.load(p_low + o_group, mask=m_group, other=float("inf"))
        b_high = tl.load(p_low + n_box + o_group, mask=m_group, other=float("-inf"))
        tl.store(p_low + n_group + i_region, tl.min(b_low, 0))
        tl.store(p_low + n_box + n_group + i_region, tl.max(b_high, 0))


def _build(
    points: Tensor, lengths_points: Tensor | None, query: Tensor | None, lengths_query: Tensor | None
) -> tuple[Tensor, ...]:
    """Points (B, N, 3) as `tree_kernel` wants them: sorted, index, sides, lowest, order of the queries, and for each
    of them the place that it would have among the points (None: the queries are the points)."""
    (B, N, _), device = points.shape, points.device
    steps = torch.arange(SAMPLE, device=device)
    taken = (
        steps * N // SAMPLE
        if lengths_points is None
        else steps * lengths_points.clamp(0, N)[:, None] // SAMPLE
    )
    sample = points.gather(1, taken.expand(B, SAMPLE)[..., None].expand(B, SAMPLE, AXES)).transpose(1, 2)
    divisions = torch.where(sample.isnan(), float("inf"), sample).sort(2).values.contiguous()

    def along_curve(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        n = x.shape[1]
        code = torch.empty((B, n), dtype=torch.int32, device=device)
        encode_kernel[(B * triton.cdiv(n, ENCODE["BLOCK"]),)](x, lengths, divisions, code, n, **ENCODE)
        return torch.sort(code, dim=1, stable=True)

    codes, order = along_curve(points, lengths_points)
    n_group, n_region = (triton.cdiv(N, size.value) for size in (GROUP, REGION))
    n_box = triton.cdiv(N, FAN.value) + n_group + n_region
    ordered = points.new_empty((B, AXES, N))
    index, lowest = (torch.empty((B, n), dtype=torch.int32, device=device) for n in (N, n_box))
    sides = points.new_empty((B, 2 * AXES, n_box))
    plant_kernel[(B * n_group,)](points, lengths_points, order, ordered, index, sides, lowest, N)
    enclose_kernel[(B * n_region,)](sides, lowest, N, num_warps=1)
    if query is None:
        return ordered, index, sides, lowest, order, None
    codes_query, order_query = along_curve(query, lengths_query)
    return ordered, index, sides, lowest, order_query, torch.searchsorted(codes, codes_query)


# ---- search


@triton.jit
def _square(b_sum, b_difference):
    """b_sum + b_difference^2, rounded once: what points, and boxes, are compared by."""
    return tl.fma(b_difference, b_difference, b_sum)


@triton.jit
def _keys(b_sum, b_index):
    """Keys of squared distances, with NaN made +inf, and indices."""
    b_sum = tl.where(b_sum == b_sum, b_sum, float("inf"))
    return (b_sum.to(tl.int32, bitcast=True).to(tl.int64) << 32) | b_index.to(tl.int64)


@triton.jit
def _distances(b_x, b_y, b_z, p_sorted, N, o_point, m_point):
    """Squared, of the queries (ROWS) to the points o_point of the sorted cloud."""
    b_sum = b_x[:, None] - tl.load(p_sorted + o_point, mask=m_point, other=0.0)[None, :]
    b_sum *= b_sum
    b_sum = _square(b_sum, b_y[:, None] - tl.load(p_sorted + N + o_point, mask=m_point, other=0.0)[None, :])
    return _square(
        b_sum, b_z[:, None] - tl.load(p_sorted + 2 * N + o_point, mask=m_point, other=0.0)[None, :]
    )


@triton.jit
def _outside(b_x, p_side, n_box, o_box, m_box):
    """How far each query lies from each box along one axis, (ROWS, 32)."""
    b_under = tl.load(p_side + o_box, mask=m_box, other=0.0)[None, :] - b_x[:, None]
    b_over = b_x[:, None] - tl.load(p_side + n_box + o_box, mask=m_box, other=0.0)[None, :]
    b_far = tl.where(b_under > b_over, b_under, b_over)
    return tl.where(b_far > 0, b_far, 0.0)


@triton.jit
def _open(b_x, b_y, b_z, b_bound, p_sides, p_lowest, n_box, i_base, i_first, i_end, i_least):
    """Which of the boxes [i_first, i_first + 32) of a kind, whose first is box i_base of all, may hold a key within
    the bound of some query: bit by bit, none before i_least, none from i_end on."""
    o_place = tl.arange(0, FAN)
    o_box = i_first + o_place
    m_box = (o_box < i_end) & (o_box >= i_least)
    p_side = p_sides + i_base
    b_sum = _outside(b_x, p_side, n_box, o_box, m_box)
    b_sum *= b_sum
    b_sum = _square(b_sum, _outside(b_y, p_side + 2 * n_box, n_box, o_box, m_box))
    b_sum = _square(b_sum, _outside(b_z, p_side + 4 * n_box, n_box, o_box, m_box))
    b_lowest = tl.load(p_lowest + i_base + o_box, mask=m_box, other=0)
    m_open = (_keys(b_sum, b_lowest[None, :]) <= b_bound[:, None]) & m_box[None, :]
    return tl.sum(tl.where(tl.max(m_open.to(tl.int32), 0) > 0, 1 << o_place, 0), 0)


@triton.jit
def _ranks(p_space, b_keys, b_count):
    """How many of the first b_count keys in the space of each query precede each of b_keys, (ROWS, any)."""
    b_rank = tl.zeros(b_keys.shape, tl.int32)
    for i in range(0, tl.max(b_count, 0), 4):
        for j in tl.static_range(4):
            b_key = tl.load(p_space + i + j, mask=(i + j < b_count)[:, None], other=MISSING)
            b_rank += (b_key < b_keys).to(tl.int32)
    return b_rank


@triton.jit
def _lowest_bit(word):
    """The place of the lowest bit of a word that has one: from the exponent of its value as a number."""
    return (((word & -word).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit(do_not_specialize=["M", "N", "k", "n_block"])
def tree_kernel(
    p_query,
    p_sorted,
    p_index,
    p_sides,
    p_lowest,
    p_order,
    p_near,
    p_lengths_query,
    p_lengths_points,
    p_idx,
    p_dist2,
    p_space,
    n_block,
    M,
    N,
    k,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    NEAR: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Leaves are gone through in order, those within the bound of no query left out; what is within a query's bound is
    kept. Where that is more than CAPACITY, the k-th of what was kept is a closer bound, and the search goes on from
    there with the first k. Without p_near (B, M) the queries are the points, and p_order (B, M) is theirs."""
    o_kept, o_lane = tl.arange(0, CAPACITY)[None, :], tl.arange(0, FAN)
    p_space += (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None] * CAPACITY
    n_leaf_room, n_box = _boxes(N)
    n_group_room = tl.cdiv(N, GROUP)
    first = 0
    if SELF == SELF_FIRST:
        first = 1
    near = k - first
    for i_block in range(tl.program_id(0), n_block, tl.num_programs(0)):
        i_cloud, i_first, n_row, n_point = _locate(i_block, M, N, p_lengths_query, p_lengths_points, ROWS)
        n_leaf = tl.cdiv(n_point, FAN)
        p_cloud = p_sorted + i_cloud * 3 * N
        # The same, but the compiler cannot know: it would compute the addresses below once and keep them in registers.
        p_here = p_space + tl.minimum(i_cloud, 0)
        p_number = p_index + i_cloud * N
        p_box, p_first = p_sides + i_cloud * 6 * n_box, p_lowest + i_cloud * n_box
        o_place = i_first + tl.arange(0, ROWS)
        o_row = tl.load(p_order + i_cloud * M + o_place, mask=o_place < M, other=M).to(tl.int32)
        m_row = o_row < n_row
        p_x = p_query + (i_cloud * M + o_row) * 3
        b_x = tl.load(p_x, mask=m_row, other=0.0)
        b_y = tl.load(p_x + 1, mask=m_row, other=0.0)
        b_z = tl.load(p_x + 2, mask=m_row, other=0.0)
        # What is not finite is equally far from everything.
        m_finite = (b_x - b_x == 0) & (b_y - b_y == 0) & (b_z - b_z == 0)
        o_own = tl.where(m_row, o_row, -1)
        if SELF == OTHER_SET:
            o_own = tl.full([ROWS], -1, tl.int32)

        i_near = i_first
        if p_near is not None:
            i_near = tl.load(p_near + i_cloud * M + tl.minimum(i_first + ROWS // 2, M - 1)).to(tl.int32)
        i_near = tl.maximum(tl.minimum(i_near - NEAR // 2, n_point - NEAR), 0)
        b_least = tl.full([ROWS, GROUPS], float("inf"), tl.float32)
        for i_tile in range(i_near, tl.minimum(i_near + NEAR, n_point), GROUPS):
            o_point = i_tile + tl.arange(0, GROUPS)
            m_point = o_point < n_point
            b_sum = _distances(b_x, b_y, b_z, p_cloud, N, o_point, m_point)
            b_index = tl.load(p_number + o_point, mask=m_point, other=-1)
            m_other = m_point[None, :] & (b_index[None, :] != o_own[:, None])
            b_least = tl.where(m_other & (b_sum < b_least), b_sum, b_least)
        o_group = tl.arange(0, GROUPS)[None, :]
        b_least = _keys(b_least, o_group)
        tl.debug_barrier()  # before this the space of the last queries was read, after it what another thread wrote is
        tl.store(p_here + o_group, b_least)
        tl.debug_barrier()
        b_before = _ranks(p_here, b_least, tl.full([ROWS], GROUPS, tl.int32))
        b_bound = tl.max(tl.where(b_before < near, b_least, BEFORE_ALL), 1) | 0x7FFFFFFF
        b_bound = tl.where(m_row & m_finite, b_bound, BEFORE_ALL)
        tl.debug_barrier()

        b_count = tl.zeros([ROWS], tl.int32)
        i_leaf, full = 0, True  # the first leaf that was not looked at
        while full:
            full = False
            i_chunk = i_leaf // (FAN * FAN * FAN)
            while (i_chunk * (FAN * FAN * FAN) < n_leaf) & (full == 0):
                regions = _open(
                    *(b_x, b_y, b_z, b_bound, p_box, p_first, n_box, n_leaf_room + n_group_room),
                    *(i_chunk * FAN, tl.cdiv(n_leaf, FAN * FAN), i_leaf // (FAN * FAN)),
                )
                while regions != 0:
                    i_region = i_chunk * FAN + _lowest_bit(regions)
                    regions &= regions - 1
                    groups = _open(
                        *(b_x, b_y, b_z, b_bound, p_box, p_first, n_box, n_leaf_room),
                        *(i_region * FAN, tl.cdiv(n_leaf, FAN), i_leaf // FAN),
                    )
                    while groups != 0:
                        i_group = i_region * FAN + _lowest_bit(groups)
                        groups &= groups - 1
                        leaves = _open(
                            *(b_x, b_y, b_z, b_bound, p_box, p_first, n_box, 0),
                            *(i_group * FAN, n_leaf, i_leaf),
                        )
                        while leaves != 0:
                            i_here = i_group * FAN + _lowest_bit(leaves)
                            leaves &= leaves - 1
                            o_point = i_here * FAN + o_lane
                            m_point = o_point < n_point
                            b_sum = _distances(b_x, b_y, b_z, p_cloud, N, o_point, m_point)
                            b_index = tl.load(p_number + o_point, mask=m_point, other=-1)
                            b_keys = _keys(b_sum, b_index[None, :])
                            m_near = m_point[None, :] & (b_index[None, :] != o_own[:, None])
                            m_near = (b_keys <= b_bound[:, None]) & m_near
                            b_place = b_count[:, None] + tl.cumsum(m_near.to(tl.int32), 1)
                            b_after = tl.max(b_place, 1)
                            full = tl.max(b_after, 0) > CAPACITY
                            if full:
                                i_leaf, regions, groups, leaves = i_here, 0, 0, 0
                            else:
                                tl.store(p_here + b_place - 1, b_keys, mask=m_near)
                                b_count = b_after
                i_chunk += 1
            tl.debug_barrier()
            m_kept = o_kept < b_count[:, None]
            b_kept = tl.load(p_here + o_kept, mask=m_kept, other=MISSING)
            b_rank = _ranks(p_here, b_kept, b_count)
            m_kept = m_kept & (b_rank < near)
            if full:
                b_last = tl.max(tl.where(m_kept, b_kept, BEFORE_ALL), 1)
                b_bound = tl.where(b_count >= near, b_last, b_bound)
                b_count = tl.minimum(b_count, near)
                tl.debug_barrier()
                tl.store(p_here + b_rank, b_kept, mask=m_kept)
            else:
                b_count = tl.minimum(b_count, near)
                p_out = p_idx + ((i_cloud * M + o_row) * k)[:, None] + b_rank
                tl.store(p_out + first, b_kept & 0xFFFFFFFF, mask=m_kept)
                if p_dist2 is not None:
                    p_out = p_dist2 + ((i_cloud * M + o_row) * k)[:, None] + b_rank
                    b_distance = (b_kept >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                    tl.store(p_out + first, b_distance, mask=m_kept)

        # Rows of queries that are not finite, and places that nothing was found for.
        b_found = tl.where(m_row, first, 0) + b_count
        for i_place in range(0, k, FAN):
            o_out = i_place + o_lane[None, :]
            o_any = o_out - first
            if SELF != OTHER_SET:
                o_any += (o_any >= o_own[:, None]).to(tl.int32)
            m_any = (m_row & (m_finite == 0))[:, None] & (o_any < n_point)
            b_any = tl.where(m_any, o_any, -1).to(tl.int64)
            m_out = (o_row < M)[:, None] & (o_out >= b_found[:, None]) & (o_out < k)
            p_out = ((i_cloud * M + o_row) * k)[:, None] + o_out
            tl.store(p_idx + p_out, b_any, mask=m_out)
            if p_dist2 is not None:
                tl.store(p_dist2 + p_out, tl.full([ROWS, FAN], float("inf"), tl.float32), mask=m_out)
        if SELF == SELF_FIRST:
            tl.store(p_idx + (i_cloud * M + o_row) * k, o_own.to(tl.int64), mask=m_row)


def search(
    query: Tensor,
    points: Tensor,
    k: int,
    lengths_query: Tensor | None,
    lengths_points: Tensor | None,
    own: int,
    idx: Tensor,
    dist2: Tensor | None,
) -> None:
    """Fills idx and dist2 (B, M, k)."""
    (B, M, C), N = query.shape, points.shape[1]
    same = own != OTHER_SET.value
    points = pad(points, (0, AXES - C))
    query = points if same else pad(query, (0, AXES - C))
    tree = _build(points, lengths_points, None if same else query, lengths_query)
    entry = next(entry for entry in TREE if k <= entry.k)
    constants = entry.constants()
    constants["ROWS"] = rows = rows_of_block(entry.rows)
    blocks = B * triton.cdiv(M, rows)
    grid = programs(blocks, query, per_processor=32)
    space = idx.new_empty((grid, rows, constants["CAPACITY"]))
    tree_kernel[(grid,)](
        *(query, *tree, lengths_query, lengths_points, idx, dist2, space, blocks, M, N, k),
        SELF=own,
        **constants,
        **entry.options(),
    )
