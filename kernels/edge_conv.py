"""EdgeConv's kernels: what a GPU does between the matrix products, called by `crosspoint.ops._gpu.edge_conv`.

Every function fills tensors that the caller allocated. x stands for centred coordinates (B, N, C_in); `nodes` for
(B, N, 2 C_out), signed U beside signed V, h = U_j + V_i; an index outside [0, N) is no edge.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import device_of, rows_of_program
from crosspoint.kernels._edge_conv_tiles import CENTRE, GATHER, MOMENTS, MOMENTS_DOUBLE, PASS, choose, grid_of
from crosspoint.kernels.edge_conv_backward import dense_gradient, reverse_graph, route, winner_gradient
from crosspoint.kernels.edge_layer import affine, input_terms, norm, norm_gradient, sum_parts, weight_gradient
from crosspoint.kernels.neighbor_sum import sum_kernel

__all__ = [
    "affine",
    "centre",
    "centre_kernel",
    "degrees",
    "degrees_kernel",
    "dense_gradient",
    "gather_max",
    "input_terms",
    "max_kernel",
    "moments",
    "moments_kernel",
    "neighbor_sum",
    "norm",
    "norm_gradient",
    "reverse_graph",
    "route",
    "subtract",
    "subtract_kernel",
    "sum_parts",
    "weight_gradient",
    "winner_gradient",
]


# ---- degrees and centres

DEGREES_ROWS = 256


@triton.jit(do_not_specialize=["clouds", "N", "k"])
def degrees_kernel(p_idx, p_degrees, clouds, N, k, ROWS: tl.constexpr):
    """Edges of each node, and, added to what is there, edges that lead to it: (2, B, N)."""
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    o_node = i_cloud * N + o_own
    p_led = p_degrees + (clouds + i_cloud) * N
    b_count = tl.zeros([ROWS], tl.int32)
    for i_slot in range(k):
        b_target = tl.load(p_idx + o_node * k + i_slot, mask=m_node, other=-1)
        m_edge = (b_target >= 0) & (b_target < N)
        b_count += m_edge.to(tl.int32)
        tl.atomic_add(p_led + b_target, 1, mask=m_edge)
    tl.store(p_degrees + o_node, b_count, mask=m_node)


def degrees(idx: Tensor, degrees: Tensor) -> None:
    """idx (B, N, k) -> degrees (2, B, N) int32, zeros before: edges of node i, edges that lead to node j."""
    batch, n, k = idx.shape
    grid = (batch * triton.cdiv(n, DEGREES_ROWS),)
    with device_of(idx):
        degrees_kernel[grid](idx, degrees, batch, n, k, ROWS=DEGREES_ROWS)


@triton.jit(do_not_specialize=["N"])
def centre_kernel(p_x, p_degrees, p_centre, N, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Per cloud and channel about the mean of the nodes that have edges, rounded to a grid of a quarter to half of
    their spread: few bits, so that x - centre stays exact on a lattice and ties stay ties."""
    i_cloud = tl.program_id(0).to(tl.int64)
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    b_sum = tl.zeros([ROWS, CHANNELS], tl.float64)
    b_square = tl.zeros([ROWS, CHANNELS], tl.float64)
    b_count = tl.zeros([ROWS], tl.int32)
    for i_row in range(0, N, ROWS):
        o_node = i_cloud * N + i_row + tl.arange(0, ROWS)
        m_row = i_row + tl.arange(0, ROWS) < N
        b_counted = tl.load(p_degrees + o_node, mask=m_row, other=0) > 0
        m_all = m_row[:, None] & m_channel[None, :]
        b_x = tl.load(p_x + o_node[:, None] * C + o_channel[None, :], mask=m_all, other=0.0).to(tl.float64)
        b_x = tl.where(b_counted[:, None], b_x, 0.0)
        b_sum += b_x
        b_square += b_x * b_x
        b_count += b_counted.to(tl.int32)
    count = tl.maximum(tl.sum(b_count, 0), 1).to(tl.float64)
    b_mean = tl.sum(b_sum, 0) / count
    b_variance = tl.sum(b_square, 0) / count - b_mean * b_mean
    b_variance = tl.where((b_variance > 0) & (b_variance < float("inf")), b_variance, 0.0)
    # 2 to the power of the exponent of the spread, less 1; and the nearest integer by what float64 can hold.
    b_exponent = tl.sqrt(b_variance).to(tl.int64, bitcast=True) >> 52
    b_grid = (tl.maximum(b_exponent - 1, 1) << 52).to(tl.float64, bitcast=True)
    MAGIC: tl.constexpr = 6755399441055744.0  # 1.5 * 2^52
    b_rounded = ((b_mean / b_grid + MAGIC) - MAGIC) * b_grid
    b_mean = tl.where(b_exponent > 1, b_rounded, b_mean)
    b_mean = tl.where((b_mean == b_mean) & (tl.abs(b_mean) < float("inf")), b_mean, 0.0)
    tl.store(p_centre + i_cloud * C + o_channel, b_mean.to(p_centre.dtype.element_ty), mask=m_channel)


def centre(x: Tensor, degrees: Tensor, centre: Tensor) -> None:
    """x (B, N, C), not centred -> centre (B, C)."""
    batch, n, channels = x.shape
    constants, options = choose(CENTRE, channels)
    grid = (batch, triton.cdiv(channels, constants["CHANNELS"]))
    with device_of(x):
        centre_kernel[grid](x, degrees, centre, n, channels, **constants, **options)


@triton.jit(do_not_specialize=["clouds", "N"])
def subtract_kernel(
    p_x, p_centre, p_degrees, p_out, clouds, N, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    o_node = i_cloud * N + o_own
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    m_all = m_node[:, None] & m_channel[None, :]
    b_touched = tl.load(p_degrees + o_node, mask=m_node, other=0)
    b_touched += tl.load(p_degrees + clouds.to(tl.int64) * N + o_node, mask=m_node, other=0)
    o_value = o_node[:, None] * C + o_channel[None, :]
    b_x = tl.load(p_x + o_value, mask=m_all & (b_touched > 0)[:, None], other=0.0)
    b_centre = tl.load(p_centre + i_cloud * C + o_channel, mask=m_channel, other=0.0)
    tl.store(p_out + o_value, tl.where((b_touched > 0)[:, None], b_x - b_centre[None, :], 0.0), mask=m_all)


def subtract(x: Tensor, centre: Tensor, degrees: Tensor, out: Tensor) -> None:
    """x - centre; 0 in rows that no edge touches, so that padding (NaN included) reaches nothing."""
    batch, n, channels = x.shape
    constants, options = choose(PASS, channels)
    grid = grid_of(batch, n, channels, constants)
    with device_of(x):
        subtract_kernel[grid](x, centre, degrees, out, batch, n, channels, **constants, **options)


# ---- over the edges of each node


def neighbor_sum(x: Tensor, idx: Tensor, out: Tensor) -> None:
    """out_i (B, N, C): the sum of x over the neighbours of i, in the dtype of x."""
    batch, n, channels = x.shape
    constants, options = choose(GATHER, channels)
    with device_of(x):
        sum_kernel[grid_of(batch, n, channels, constants)](
            *(x, idx, out, n, n, idx.shape[2], channels), WIDE=False, **constants, **options
        )


@triton.jit(do_not_specialize=["N", "parts", "PART"])
def moments_kernel(
    p_x,
    p_sum,
    p_degrees,
    p_gram,
    p_first,
    clouds,
    N,
    C,
    parts,
    PART,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums over the edges of one part of one cloud's nodes of x_j x_j^T, x_j x_i^T and x_i x_i^T, a square of channels
    at a time, and of x_j and x_i: with d edges to a node and k of it, sums over nodes of d x x^T, P x^T, k x x^T."""
    i_part = tl.program_id(0).to(tl.int64)
    i_cloud, i_first = i_part // parts, (i_part % parts) * PART
    o_left = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    o_right = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    T: tl.constexpr = p_x.dtype.element_ty
    b_jj = tl.zeros([CHANNELS, CHANNELS], T)
    b_ji = tl.zeros([CHANNELS, CHANNELS], T)
    b_ii = tl.zeros([CHANNELS, CHANNELS], T)
    b_j = tl.zeros([CHANNELS], tl.float64)
    b_i = tl.zeros([CHANNELS], tl.float64)
    i_last = tl.minimum(i_first + PART, N)
    for i_row in range(i_first, i_last, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m_row = o_row < i_last
        o_node = i_cloud * N + o_row
        m_left = (o_left < C)[:, None] & m_row[None, :]
        m_right = m_row[:, None] & (o_right < C)[None, :]
        b_out = tl.load(p_degrees + o_node, mask=m_row, other=0).to(T)
        b_in = tl.load(p_degrees + clouds * N + o_node, mask=m_row, other=0).to(T)
        b_left = tl.load(p_x + o_node[None, :] * C + o_left[:, None], mask=m_left, other=0.0)
        b_sum = tl.load(p_sum + o_node[None, :] * C + o_left[:, None], mask=m_left, other=0.0)
        b_right = tl.load(p_x + o_node[:, None] * C + o_right[None, :], mask=m_right, other=0.0)
        b_left_in, b_left_out = b_left * b_in[None, :], b_left * b_out[None, :]
        b_jj = tl.dot(b_left_in, b_right, b_jj, input_precision=PRODUCT, out_dtype=T)
        b_ji = tl.dot(b_sum, b_right, b_ji, input_precision=PRODUCT, out_dtype=T)
        b_ii = tl.dot(b_left_out, b_right, b_ii, input_precision=PRODUCT, out_dtype=T)
        b_j += tl.sum(b_left_in, 1).to(tl.float64)
        b_i += tl.sum(b_left_out, 1).to(tl.float64)
    p_gram += i_part * 3 * C * C + o_left[:, None] * C + o_right[None, :]
    m_gram = (o_left < C)[:, None] & (o_right < C)[None, :]
    tl.store(p_gram, b_jj, mask=m_gram)
    tl.store(p_gram + C * C, b_ji, mask=m_gram)
    tl.store(p_gram + 2 * C * C, b_ii, mask=m_gram)
    if tl.program_id(2) == 0:
        o_first = i_part * 2 * C + o_left
        tl.store(p_first + o_first, b_j, mask=o_left < C)
        tl.store(p_first + o_first + C, b_i, mask=o_left < C)


def moments(x: Tensor, sums: Tensor, degrees: Tensor, gram: Tensor, first: Tensor) -> None:
    """gram (B, parts, 3, C, C) in the dtype of x, first (B, parts, 2, C) float64; sums is what `neighbor_sum` gives."""
    batch, n, channels = x.shape
    parts = gram.shape[1]
    constants, options = choose(MOMENTS_DOUBLE if x.dtype == torch.float64 else MOMENTS, channels)
    blocks = triton.cdiv(channels, constants["CHANNELS"])
    with device_of(x):
        moments_kernel[(batch * parts, blocks, blocks)](
            *(x, sums, degrees, gram, first, batch, n, channels, parts, triton.cdiv(n, parts)),
            **constants,
            **options,
        )


@triton.jit(do_not_specialize=["N", "k"])
def max_kernel(
    p_nodes,
    p_idx,
    p_gamma,
    p_scale,
    p_shift,
    p_out,
    p_winner,
    p_slot,
    N,
    k,
    C,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The largest U over the edges of each node, the first of equal ones, a NaN before all; then the rest of the layer.
    Where gamma is 0 every edge has the same value: U counts as 0."""
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    o_node = i_cloud * N + o_own
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    p_cloud = p_nodes + i_cloud * N * (2 * C)
    T: tl.constexpr = p_nodes.dtype.element_ty
    b_zero = tl.zeros([CHANNELS], tl.int1)
    if p_gamma is not None:
        b_zero = tl.load(p_gamma + o_channel, mask=m_channel, other=1.0) == 0
    b_most = tl.zeros([ROWS, CHANNELS], T)
    b_slot = tl.full([ROWS, CHANNELS], -1, tl.int32)
    for i_slot in range(k):
        b_target = tl.load(p_idx + o_node * k + i_slot, mask=m_node, other=-1)
        m_edge = ((b_target >= 0) & (b_target < N))[:, None] & m_channel[None, :]
        o_value = b_target[:, None] * (2 * C) + o_channel[None, :]
        b_value = tl.load(p_cloud + o_value, mask=m_edge, other=0.0)
        b_value = tl.where(b_zero[None, :], b_value * 0, b_value)
        m_wins = (b_value > b_most) | ((b_value != b_value) & (b_most == b_most)) | (b_slot < 0)
        m_wins = m_wins & m_edge
        b_most = tl.where(m_wins, b_value, b_most)
        b_slot = tl.where(m_wins, i_slot, b_slot)
    m_out = m_node[:, None] & m_channel[None, :]
    m_any = (b_slot >= 0) & m_out
    b_slot = tl.maximum(b_slot, 0)
    b_target = tl.load(p_idx + o_node[:, None] * k + b_slot, mask=m_any, other=0)
    b_value = tl.load(p_cloud + b_target * (2 * C) + o_channel[None, :], mask=m_any, other=0.0)
    b_value += tl.load(p_cloud + o_own[:, None] * (2 * C) + C + o_channel[None, :], mask=m_any, other=0.0)
    o_out = o_node[:, None] * C + o_channel[None, :]
    b_scale = tl.load(p_scale + o_channel, mask=m_channel, other=0.0)
    b_shift = tl.load(p_shift + i_cloud * C + o_channel, mask=m_channel, other=0.0)
    b_z = b_value * b_scale[None, :] + b_shift[None, :]
    b_z = tl.where(b_z > 0, b_z, b_z * SLOPE)
    tl.store(p_out + o_out, tl.where(m_any, b_z, 0.0).to(p_out.dtype.element_ty), mask=m_out)
    if p_winner is not None:
        tl.store(p_winner + o_out, tl.where(m_any, b_value, 0.0), mask=m_out)
        tl.store(p_slot + o_out, b_slot.to(p_slot.dtype.element_ty), mask=m_out)


def gather_max(
    nodes: Tensor,
    idx: Tensor,
    gamma: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    negative_slope: float,
    out: Tensor,
    winner: Tensor | None,
    slot: Tensor | None,
) -> None:
    """out = leaky(scale * winner + shift) (B, N, C_out), 0 without edges; winner, the largest U_j + V_i; its slot.

    scale (C_out) and shift (B, C_out) in the dtype of nodes.
    """
    batch, n, k = idx.shape
    channels = out.shape[2]
    constants, options = choose(GATHER, channels)
    with device_of(nodes):
        max_kernel[grid_of(batch, n, channels, constants)](
            *(nodes, idx, gamma, scale, shift, out, winner, slot, n, k, channels),
            SLOPE=negative_slope,
            **constants,
            **options,
        )
