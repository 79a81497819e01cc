"""EdgeConv2's kernels: tiles of edges, computed, used and forgotten; called by `crosspoint.ops._gpu.edge_conv2`.

Every function fills tensors that the caller allocated. Its first arguments say what edges carry: `nodes`
(B N, 2 C_mid), U beside V of the first layer; gain (C_mid) and shift (B, C_mid), so that z1 = gain (U_j + V_i) + shift
and a = leaky(z1) - leaky(shift). An index outside [0, N) is no edge. `product` is a place in `PRODUCTS`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import INTERPRETED, device_of, rows_of_program
from crosspoint.kernels._precision import PRODUCTS
from crosspoint.kernels._products import add_product, rounded
from crosspoint.kernels.edge_conv import (
    affine,
    centre,
    degrees,
    dense_gradient,
    input_terms,
    moments,
    neighbor_sum,
    norm,
    norm_gradient,
    reverse_graph,
    subtract,
    sum_parts,
    weight_gradient,
    winner_gradient,
)
from crosspoint.kernels.edge_layer import pivot, sums_norm

__all__ = [
    "activate",
    "activate_kernel",
    "add_runs",
    "affine",
    "centre",
    "degrees",
    "dense_gradient",
    "edge_max",
    "edge_products",
    "input_terms",
    "max_kernel",
    "moments",
    "neighbor_sum",
    "neighbour_gradient",
    "neighbour_kernel",
    "norm",
    "norm_gradient",
    "own_gradient",
    "own_kernel",
    "pivot",
    "products_kernel",
    "reverse_graph",
    "runs_kernel",
    "subtract",
    "sum_parts",
    "sums_norm",
    "weight_gradient",
    "winner_gradient",
]


class Tile(NamedTuple):
    """Columns of a program's products, and how much of the contracted side it takes at a time."""

    width: int
    depth: int
    warps: int


# The first entry that is wide enough, or the last.
TILES = (Tile(16, 16, 4), Tile(32, 16, 8))
DOUBLE = (Tile(16, 16, 8),)
ROWS = 64  # edges of a tile
COLUMNS = 32  # channels of a program that multiplies nothing


def choose(product: int, width: int) -> tuple[dict[str, int | str], dict[str, int]]:
    """Constants and options of a launch whose products have so many columns in all."""
    table = DOUBLE if PRODUCTS[product] == "float64" else TILES
    tile = next((tile for tile in table if width <= tile.width), table[-1])
    constants = {"PRODUCT": PRODUCTS[product], "ROWS": ROWS, "WIDTH": tile.width, "DEPTH": tile.depth}
    return constants, options_of(tile)


def options_of(tile: Tile) -> dict[str, int]:
    """Left to itself the assembler would spill registers, to have more programs at a time."""
    return {"num_warps": tile.warps, "num_stages": 1, "maxnreg": 255}


@triton.jit
def add_tiles(b_left, b_right, b_sum, PRODUCT: tl.constexpr):
    """`add_product`, of float64 too: the compiler multiplies few shapes of it, and none of 64 rows for every GPU."""
    if PRODUCT != "float64" or INTERPRETED:
        b_sum = add_product(b_left, b_right, b_sum, PRODUCT)
    else:
        DEPTH: tl.constexpr = b_left.shape[1]
        o_depth = tl.arange(0, DEPTH)
        for i in range(DEPTH):
            b_column = tl.sum(tl.where((o_depth == i)[None, :], b_left, 0.0), 1)
            b_row = tl.sum(tl.where((o_depth == i)[:, None], b_right, 0.0), 0)
            b_sum += b_column[:, None] * b_row[None, :]
    return b_sum


@triton.jit
def activation(p_nodes, p_gain, p_shift, o_source, o_target, m_edge, o_middle, C_mid, SLOPE: tl.constexpr):
    """U + V of each edge, where its z1 is positive, and a: (edges, channels), 0 where there is no edge."""
    m_middle = o_middle < C_mid
    m_all = m_edge[:, None] & m_middle[None, :]
    o_neighbour = (o_target * (2 * C_mid))[:, None] + o_middle[None, :]
    o_own = (o_source * (2 * C_mid) + C_mid)[:, None] + o_middle[None, :]
    b_h = tl.load(p_nodes + o_neighbour, mask=m_all, other=0.0)
    b_h += tl.load(p_nodes + o_own, mask=m_all, other=0.0)
    b_gain = tl.load(p_gain + o_middle, mask=m_middle, other=0.0)[None, :]
    b_shift = tl.load(p_shift + o_middle, mask=m_middle, other=0.0)[None, :]
    b_z = b_h * b_gain
    m_up = b_z + b_shift > 0
    # leaky(z + shift) - leaky(shift); the side of shift itself adds exactly nothing.
    b_bend = b_shift * (1 - SLOPE)
    b_above = tl.where(b_shift > 0, 0.0, b_bend)
    b_below = tl.where(b_shift > 0, -b_bend, 0.0)
    b_a = tl.where(m_up, b_z + b_above, b_z * SLOPE + b_below)
    return b_h, m_up, tl.where(m_all, b_a, 0.0)


@triton.jit
def targets_of(p_idx, o_edge, m_there, N):
    """Where the edges at places o_edge of a cloud's idx lead to, and which of them are edges."""
    b_target = tl.load(p_idx + o_edge, mask=m_there, other=-1)
    m_edge = (b_target >= 0) & (b_target < N)
    return tl.where(m_edge, b_target, -1).to(tl.int32), m_edge


@triton.jit(do_not_specialize=["N", "k"])
def max_kernel(
    p_nodes, p_idx, p_gain, p_shift, p_weight, p_gamma, p_winner, p_slot, p_sums, N, k, C_mid, C,
    SLOPE: tl.constexpr, STATISTICS: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """h2 = weight a of every edge, signed by gamma, a slot of ROWS nodes at a time: its largest, the first of equal
    ones, a NaN before all, and its sums. Where gamma is 0 every edge ties: h2 counts as 0."""
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    p_nodes += i_cloud * N * (2 * C_mid)
    p_idx += i_cloud * N * k
    p_shift += i_cloud * C_mid
    o_channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    m_channel = o_channel < C
    T: tl.constexpr = p_nodes.dtype.element_ty
    b_factor = tl.full([1, WIDTH], 1.0, T)
    b_sign = tl.full([1, WIDTH], 1.0, T)
    if p_gamma is not None:
        b_gamma = tl.load(p_gamma + o_channel, mask=m_channel, other=1.0)[None, :]
        b_factor = tl.where(b_gamma == 0, 0.0, b_factor)
        b_sign = tl.where(b_gamma < 0, -1.0, b_sign)
    b_most = tl.zeros([ROWS, WIDTH], T)
    b_slot = tl.full([ROWS, WIDTH], -1, tl.int32)
    b_sum = tl.zeros([ROWS, WIDTH], T)
    b_square = tl.zeros([ROWS, WIDTH], T)
    for i_slot in range(k):
        b_target, m_edge = targets_of(p_idx, o_own * k + i_slot, m_node, N)
        b_h = tl.zeros([ROWS, WIDTH], T)
        for i_middle in range(0, C_mid, DEPTH):
            o_middle = i_middle + tl.arange(0, DEPTH)
            _, _, b_a = activation(p_nodes, p_gain, p_shift, o_own, b_target, m_edge, o_middle, C_mid, SLOPE)
            m_weight = (o_middle < C_mid)[:, None] & m_channel[None, :]
            o_weight = o_channel[None, :] * C_mid + o_middle[:, None]
            b_weight = rounded(tl.load(p_weight + o_weight, mask=m_weight, other=0.0) * b_sign, PRODUCT)
            b_h = add_tiles(rounded(b_a, PRODUCT), b_weight, b_h, PRODUCT)
        if STATISTICS:
            b_sum += b_h  # of no edge it is 0
            b_square += b_h * b_h
        b_value, b_best = b_h * b_factor, b_most * b_factor
        m_wins = (b_value > b_best) | ((b_value != b_value) & (b_best == b_best)) | (b_slot < 0)
        m_wins = m_wins & m_edge[:, None]
        b_most = tl.where(m_wins, b_h, b_most)
        b_slot = tl.where(m_wins, i_slot, b_slot)
    m_out = m_node[:, None] & m_channel[None, :]
    o_out = i_cloud * N * C + (o_own * C)[:, None] + o_channel[None, :]
    tl.store(p_winner + o_out, b_most, mask=m_out)
    if p_slot is not None:
        tl.store(p_slot + o_out, tl.maximum(b_slot, 0).to(p_slot.dtype.element_ty), mask=m_out)
    if STATISTICS:
        o_sums = tl.program_id(0).to(tl.int64) * C + o_channel
        tl.store(p_sums + o_sums, tl.sum(b_sum, 0).to(tl.float64), mask=m_channel)
        o_sums += tl.num_programs(0).to(tl.int64) * C
        tl.store(p_sums + o_sums, tl.sum(b_square, 0).to(tl.float64), mask=m_channel)


def edge_max(
    nodes: Tensor, idx: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, gamma: Tensor | None,
    negative_slope: float, product: int, winner: Tensor, slot: Tensor | None, sums: Tensor,
) -> None:  # fmt: skip
    """winner (B, N, C_out), the largest h = weight a, signed by gamma, over the edges of each node, 0 without edges,
    and its slot.

    weight (C_out, C_mid). sums (2, B, ceil(N / 64), C_out) float64, or empty: of h, and of its squares, over the edges
    of 64 nodes.
    """
    (batch, n, k), (c_out, c_mid) = idx.shape, weight.shape
    if n * max(k, 2 * c_mid, c_out) >= 1 << 31:  # places within a cloud are of 32 bits
        raise RuntimeError(
            f"edge_conv2: a cloud of {n} nodes, {k} neighbours and {c_mid} or {c_out} channels is too large for the "
            "Triton kernels: N times k, 2 C_mid and C_out must be below 2^31; use impl='native'"
        )
    constants, options = choose(product, c_out)
    grid = (batch * triton.cdiv(n, ROWS), triton.cdiv(c_out, constants["WIDTH"]))
    with device_of(nodes):
        max_kernel[grid](
            *(nodes, idx, gain, shift, weight, gamma, winner, slot, sums, n, k, c_mid, c_out),
            SLOPE=negative_slope,
            STATISTICS=sums.numel() > 0,
            **constants,
            **options,
        )


@triton.jit(do_not_specialize=["N"])
def activate_kernel(
    p_winner, p_degrees, p_scale, p_shift, p_out, N, C, SLOPE: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    o_node = i_cloud * N + o_own
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    m_out = m_node[:, None] & m_channel[None, :]
    o_out = o_node[:, None] * C + o_channel[None, :]
    m_any = tl.load(p_degrees + o_node, mask=m_node, other=0) > 0
    b_z = tl.load(p_winner + o_out, mask=m_out, other=0.0)
    b_z *= tl.load(p_scale + o_channel, mask=m_channel, other=0.0)[None, :]
    b_z += tl.load(p_shift + i_cloud * C + o_channel, mask=m_channel, other=0.0)[None, :]
    b_z = tl.where(b_z > 0, b_z, b_z * SLOPE)
    tl.store(p_out + o_out, tl.where(m_any[:, None], b_z, 0.0), mask=m_out)


def activate(
    winner: Tensor, degrees: Tensor, scale: Tensor, shift: Tensor, negative_slope: float, out: Tensor
) -> None:
    """out = leaky(scale winner + shift) (B, N, C), 0 for nodes without edges; out may be winner."""
    batch, n, channels = winner.shape
    grid = (batch * triton.cdiv(n, ROWS), triton.cdiv(channels, COLUMNS))
    with device_of(winner):
        activate_kernel[grid](
            *(winner, degrees, scale, shift, out, n, channels),
            SLOPE=negative_slope,
            ROWS=ROWS,
            CHANNELS=COLUMNS,
        )


# ---- backward


@triton.jit
def winners_of(p_g, p_slot, o_source, b_slot, m_edge, o_channel, C):
    """g of each edge's source where the edge wins, (edges, channels)."""
    o_value = (o_source * C)[:, None] + o_channel[None, :]
    m_all = m_edge[:, None] & (o_channel < C)[None, :]
    b_winner = tl.load(p_slot + o_value, mask=m_all, other=0).to(tl.int32)
    return tl.load(p_g + o_value, mask=m_all & (b_winner == b_slot[:, None]), other=0.0)


@triton.jit
def edge_gradient(
    p_nodes, p_gain, p_shift, p_g, p_slot, p_rows, p_q, o_source, o_target, b_slot, m_edge, o_middle, C_mid, C,
    SLOPE: tl.constexpr, TRAINING: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dz1 of the edges, U + V and a, at the channels o_middle: [winners' g | a] times `rows`, less q."""
    m_middle = o_middle < C_mid
    b_da = tl.zeros([ROWS, WIDTH], p_nodes.dtype.element_ty)
    b_da -= tl.load(p_q + o_middle, mask=m_middle, other=0.0)[None, :]
    for i_channel in range(0, C, DEPTH):
        o_channel = i_channel + tl.arange(0, DEPTH)
        b_g = winners_of(p_g, p_slot, o_source, b_slot, m_edge, o_channel, C)
        m_rows = (o_channel < C)[:, None] & m_middle[None, :]
        o_rows = (o_channel * C_mid)[:, None] + o_middle[None, :]
        b_rows = rounded(tl.load(p_rows + o_rows, mask=m_rows, other=0.0), PRODUCT)
        b_da = add_tiles(rounded(b_g, PRODUCT), b_rows, b_da, PRODUCT)
    if TRAINING:
        for i_other in range(0, C_mid, DEPTH):
            o_other = i_other + tl.arange(0, DEPTH)
            _, _, b_a = activation(
                p_nodes, p_gain, p_shift, o_source, o_target, m_edge, o_other, C_mid, SLOPE
            )
            m_rows = (o_other < C_mid)[:, None] & m_middle[None, :]
            o_rows = ((C + o_other) * C_mid)[:, None] + o_middle[None, :]
            b_rows = rounded(tl.load(p_rows + o_rows, mask=m_rows, other=0.0), PRODUCT)
            b_da = add_tiles(rounded(b_a, PRODUCT), b_rows, b_da, PRODUCT)
    b_h, m_up, b_a = activation(p_nodes, p_gain, p_shift, o_source, o_target, m_edge, o_middle, C_mid, SLOPE)
    b_dz = tl.where(m_up, b_da, b_da * SLOPE)
    return tl.where(m_edge[:, None], b_dz, 0.0), b_h, b_a


@triton.jit(do_not_specialize=["N", "k"])
def own_kernel(
    p_nodes, p_idx, p_gain, p_shift, p_g, p_slot, p_rows, p_q, p_routed, p_sums, N, k, C_mid, C,
    SLOPE: tl.constexpr, TRAINING: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dz1 summed over the edges of each of ROWS nodes, a slot at a time."""
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    p_nodes += i_cloud * N * (2 * C_mid)
    p_idx += i_cloud * N * k
    p_shift += i_cloud * C_mid
    p_g += i_cloud * N * C
    p_slot += i_cloud * N * C
    p_q += i_cloud * C_mid
    o_middle = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    m_middle = o_middle < C_mid
    T: tl.constexpr = p_nodes.dtype.element_ty
    b_sum = tl.zeros([ROWS, WIDTH], T)
    b_sum_h = tl.zeros([ROWS, WIDTH], T)
    b_sum_a = tl.zeros([ROWS, WIDTH], T)
    for i_slot in range(k):
        b_target, m_edge = targets_of(p_idx, o_own * k + i_slot, m_node, N)
        b_slot = tl.zeros([ROWS], tl.int32) + i_slot
        b_dz, b_h, b_a = edge_gradient(
            p_nodes, p_gain, p_shift, p_g, p_slot, p_rows, p_q, o_own, b_target, b_slot, m_edge, o_middle, C_mid, C,
            SLOPE, TRAINING, PRODUCT, ROWS, WIDTH, DEPTH,
        )  # fmt: skip
        b_sum += b_dz
        b_sum_h += b_dz * b_h
        b_sum_a += b_a
    p_routed += i_cloud * N * (2 * C_mid) + C_mid
    o_out = (o_own * (2 * C_mid))[:, None] + o_middle[None, :]
    tl.store(p_routed + o_out, b_sum, mask=m_node[:, None] & m_middle[None, :])
    o_sums = tl.program_id(0).to(tl.int64) * C_mid + o_middle
    o_next = tl.num_programs(0).to(tl.int64) * C_mid
    tl.store(p_sums + o_sums, tl.sum(b_sum, 0).to(tl.float64), mask=m_middle)
    tl.store(p_sums + o_next + o_sums, tl.sum(b_sum_h, 0).to(tl.float64), mask=m_middle)
    tl.store(p_sums + 2 * o_next + o_sums, tl.sum(b_sum_a, 0).to(tl.float64), mask=m_middle)


def own_gradient(
    nodes: Tensor, idx: Tensor, gain: Tensor, shift: Tensor, g: Tensor, slot: Tensor, negative_slope: float,
    product: int, rows: Tensor, q: Tensor, routed: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """routed[..., C_mid:] (B, N, C_mid): dz1 summed over the edges of each node, with

        dz1 = leaky'(z1) ([g where the edge wins | a] rows - q).

    g and slot (B, N, C_out); rows (C_out + C_mid, C_mid), or (C_out, C_mid) where a takes no part; q (B, C_mid).
    sums (3, B, ceil(N / 64), C_mid) float64: of dz1, of dz1 (U + V), of a, over the edges of 64 nodes.
    """
    (batch, n, k), c_out, c_mid = idx.shape, g.shape[2], rows.shape[1]
    constants, options = choose(product, c_mid)
    with device_of(nodes):
        own_kernel[(batch * triton.cdiv(n, ROWS), triton.cdiv(c_mid, constants["WIDTH"]))](
            *(nodes, idx, gain, shift, g, slot, rows, q, routed, sums, n, k, c_mid, c_out),
            SLOPE=negative_slope,
            TRAINING=len(rows) > c_out,
            **constants,
            **options,
        )


@triton.jit(do_not_specialize=["N", "k"])
def neighbour_kernel(
    p_nodes, p_idx, p_gain, p_shift, p_g, p_slot, p_rows, p_q, p_start, p_edges, p_runs, N, k, C_mid, C,
    SLOPE: tl.constexpr, TRAINING: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dz1 of ROWS edges as they are ordered by the node that they lead to, summed over those that lead to the same.
    Tiles cut these runs, so the sum of node j in tile t goes to row j + t, which no other run has."""
    i_cloud, o_rank, _ = rows_of_program(N * k, ROWS)
    p_nodes += i_cloud * N * (2 * C_mid)
    p_idx += i_cloud * N * k
    p_edges += i_cloud * N * k
    p_shift += i_cloud * C_mid
    p_g += i_cloud * N * C
    p_slot += i_cloud * N * C
    p_q += i_cloud * C_mid
    m_there = o_rank < tl.load(p_start + i_cloud * (N + 1) + N)
    b_edge = tl.load(p_edges + o_rank, mask=m_there, other=0)
    b_target, m_edge = targets_of(p_idx, b_edge, m_there, N)
    m_inner = m_there & (o_rank % ROWS > 0)
    b_before, _ = targets_of(p_idx, tl.load(p_edges + o_rank - 1, mask=m_inner, other=0), m_inner, N)
    o_middle = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    b_dz, _, _ = edge_gradient(
        p_nodes, p_gain, p_shift, p_g, p_slot, p_rows, p_q, b_edge // k, b_target, b_edge % k, m_edge, o_middle,
        C_mid, C, SLOPE, TRAINING, PRODUCT, ROWS, WIDTH, DEPTH,
    )  # fmt: skip
    T: tl.constexpr = p_nodes.dtype.element_ty
    SUMMED: tl.constexpr = "tf32" if PRODUCT == "bf16" else PRODUCT
    b_same = (b_target[:, None] == b_target[None, :]).to(tl.float32).to(T)
    b_sum = add_tiles(b_same, rounded(b_dz, SUMMED), tl.zeros([ROWS, WIDTH], T), SUMMED)
    m_first = m_edge & (b_target != b_before)
    p_runs += (i_cloud * (N + tl.cdiv(N * k, ROWS)) + tl.program_id(0) % tl.cdiv(N * k, ROWS)) * C_mid
    o_out = (b_target * C_mid)[:, None] + o_middle[None, :]
    tl.store(p_runs + o_out, b_sum, mask=m_first[:, None] & (o_middle < C_mid)[None, :])


def neighbour_gradient(
    nodes: Tensor, idx: Tensor, gain: Tensor, shift: Tensor, g: Tensor, slot: Tensor, negative_slope: float,
    product: int, rows: Tensor, q: Tensor, start: Tensor, edges: Tensor, runs: Tensor,
) -> None:  # fmt: skip
    """runs (B, N + ceil(N k / 64), C_mid): dz1 (see `own_gradient`) of the edges of a tile that lead to the same node,
    summed; row j + t is node j's in tile t, of the 64 entries from 64 t of `edges`. Other rows are left alone."""
    (batch, n, k), c_out, c_mid = idx.shape, g.shape[2], rows.shape[1]
    constants, options = choose(product, c_mid)
    with device_of(nodes):
        neighbour_kernel[(batch * triton.cdiv(n * k, ROWS), triton.cdiv(c_mid, constants["WIDTH"]))](
            *(nodes, idx, gain, shift, g, slot, rows, q, start, edges, runs, n, k, c_mid, c_out),
            SLOPE=negative_slope,
            TRAINING=len(rows) > c_out,
            **constants,
            **options,
        )


@triton.jit(do_not_specialize=["N", "k"])
def runs_kernel(
    p_runs, p_start, p_routed, N, k, C, TILE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    p_first = p_start + i_cloud * (N + 1) + o_own
    b_first = tl.load(p_first, mask=m_node, other=0)
    b_last = tl.load(p_first + 1, mask=m_node, other=0)
    b_tile = b_first // TILE
    b_count = tl.where(b_last > b_first, (b_last - 1) // TILE - b_tile + 1, 0)
    o_run = i_cloud * (N + tl.cdiv(N * k, TILE)) + o_own + b_tile
    b_sum = tl.zeros([ROWS, CHANNELS], p_runs.dtype.element_ty)
    for i in range(tl.max(b_count, 0)):
        m_run = (i < b_count)[:, None] & m_channel[None, :]
        b_sum += tl.load(p_runs + ((o_run + i) * C)[:, None] + o_channel[None, :], mask=m_run, other=0.0)
    o_out = ((i_cloud * N + o_own) * (2 * C))[:, None] + o_channel[None, :]
    tl.store(p_routed + o_out, b_sum, mask=m_node[:, None] & m_channel[None, :])


def add_runs(runs: Tensor, start: Tensor, k: int, routed: Tensor) -> None:
    """routed[..., :C_mid] (B, N, C_mid): the sums of each node's rows of `runs`."""
    (batch, n, _), channels = routed.shape, runs.shape[2]
    grid = (batch * triton.cdiv(n, ROWS), triton.cdiv(channels, COLUMNS))
    with device_of(runs):
        runs_kernel[grid](runs, start, routed, n, k, channels, TILE=ROWS, ROWS=ROWS, CHANNELS=COLUMNS)


@triton.jit(do_not_specialize=["N", "k", "PART"])
def products_kernel(
    p_nodes, p_idx, p_gain, p_shift, p_g, p_slot, p_out, N, k, C_mid, C, COUNT, PART,
    SLOPE: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[winners' g | a]^T a over the edges of PART nodes, ROWS by WIDTH of it, DEPTH nodes at a time."""
    n_part = tl.cdiv(N, PART)
    i_cloud, i_first = (tl.program_id(0) // n_part).to(tl.int64), (tl.program_id(0) % n_part) * PART
    i_last = tl.minimum(i_first + PART, N)
    p_nodes += i_cloud * N * (2 * C_mid)
    p_idx += i_cloud * N * k
    p_shift += i_cloud * C_mid
    p_g += i_cloud * N * C
    p_slot += i_cloud * N * C
    i_block, n_winners = tl.program_id(1), tl.cdiv(C, ROWS)
    is_winners = i_block < n_winners
    o_left = tl.where(is_winners, i_block, i_block - n_winners) * ROWS + tl.arange(0, ROWS)
    o_middle = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    T: tl.constexpr = p_nodes.dtype.element_ty
    b_out = tl.zeros([ROWS, WIDTH], T)
    for i_row in range(i_first, i_last, DEPTH):
        o_own = i_row + tl.arange(0, DEPTH)
        for i_slot in range(k):
            b_target, m_edge = targets_of(p_idx, o_own * k + i_slot, o_own < i_last, N)
            _, _, b_a = activation(p_nodes, p_gain, p_shift, o_own, b_target, m_edge, o_middle, C_mid, SLOPE)
            b_left = tl.zeros([DEPTH, ROWS], T)
            if is_winners:
                b_left = winners_of(
                    p_g, p_slot, o_own, tl.zeros([DEPTH], tl.int32) + i_slot, m_edge, o_left, C
                )
            else:
                _h, _up, b_left = activation(
                    p_nodes, p_gain, p_shift, o_own, b_target, m_edge, o_left, C_mid, SLOPE
                )
            b_out = add_tiles(rounded(tl.trans(b_left), PRODUCT), rounded(b_a, PRODUCT), b_out, PRODUCT)
    o_row = tl.where(is_winners, o_left, C + o_left)
    m_row = o_left < tl.where(is_winners, C, C_mid)
    p_out += tl.program_id(0).to(tl.int64) * COUNT * C_mid
    o_out = (o_row * C_mid)[:, None] + o_middle[None, :]
    tl.store(p_out + o_out, b_out, mask=m_row[:, None] & (o_middle < C_mid)[None, :])


def edge_products(
    nodes: Tensor, idx: Tensor, gain: Tensor, shift: Tensor, g: Tensor, slot: Tensor, negative_slope: float,
    product: int, out: Tensor,
) -> None:  # fmt: skip
    """out (B, parts, C_out + C_mid, C_mid): sums over the edges of a part of a cloud's nodes of g a^T, where the edge
    wins, and below them of a a^T; or the first of them alone, (B, parts, C_out, C_mid)."""
    (batch, n, k), c_out, (_, parts, count, c_mid) = idx.shape, g.shape[2], out.shape
    constants, options = choose(product, c_mid)
    blocks = triton.cdiv(c_out, ROWS) + triton.cdiv(count - c_out, ROWS)
    with device_of(nodes):
        products_kernel[(batch * parts, blocks, triton.cdiv(c_mid, constants["WIDTH"]))](
            *(nodes, idx, gain, shift, g, slot, out, n, k, c_mid, c_out, count, triton.cdiv(n, parts)),
            SLOPE=negative_slope,
            **constants,
            **options,
        )
