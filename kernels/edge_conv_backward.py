"""EdgeConv's kernels of the backward pass; see `edge_conv`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels import reverse_graph as graph
from crosspoint.kernels._common import device_of, rows_of_program
from crosspoint.kernels._edge_conv_tiles import GATHER, PASS, choose, grid_of

__all__ = [
    "dense_gradient",
    "dense_kernel",
    "gradient_kernel",
    "reverse_graph",
    "route",
    "route_kernel",
    "winner_gradient",
]


@triton.jit(do_not_specialize=["N", "parts", "PART"])
def gradient_kernel(
    p_grad,
    p_winner,
    p_degrees,
    p_scale,
    p_shift,
    p_routed,
    p_sums,
    clouds,
    N,
    C,
    STRIDE,
    parts,
    PART,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """g = grad leaky'(scale winner + shift) of one part of a cloud's nodes, and its sums."""
    i_part = tl.program_id(0).to(tl.int64)
    i_cloud, i_first = i_part // parts, (i_part % parts) * PART
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    b_scale = tl.load(p_scale + o_channel, mask=m_channel, other=0.0)
    b_shift = tl.load(p_shift + i_cloud * C + o_channel, mask=m_channel, other=0.0)
    b_sum = tl.zeros([CHANNELS], tl.float64)
    b_weighted = tl.zeros([CHANNELS], tl.float64)
    i_last = tl.minimum(i_first + PART, N)
    for i_row in range(i_first, i_last, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m_row = o_row < i_last
        o_node = i_cloud * N + o_row
        b_degree = tl.load(p_degrees + o_node, mask=m_row, other=0)
        m_all = m_row[:, None] & m_channel[None, :]
        m_any = m_all & (b_degree > 0)[:, None]
        o_value = o_node[:, None] * C + o_channel[None, :]
        b_winner = tl.load(p_winner + o_value, mask=m_any, other=0.0)
        b_grad = tl.load(p_grad + o_value, mask=m_any, other=0.0)
        m_up = b_winner * b_scale[None, :] + b_shift[None, :] > 0
        b_grad = tl.where(m_up, b_grad, b_grad * SLOPE)
        tl.store(p_routed + o_node[:, None] * STRIDE + (STRIDE - C) + o_channel[None, :], b_grad, mask=m_all)
        b_sum += tl.sum(b_grad, 0).to(tl.float64)
        b_weighted += tl.sum(b_grad * b_winner, 0).to(tl.float64)
    tl.store(p_sums + i_part * C + o_channel, b_sum, mask=m_channel)
    tl.store(p_sums + (clouds * parts + i_part) * C + o_channel, b_weighted, mask=m_channel)


def winner_gradient(
    grad: Tensor,
    winner: Tensor,
    degrees: Tensor,
    scale: Tensor,
    shift: Tensor,
    negative_slope: float,
    routed: Tensor,
    sums: Tensor,
) -> None:
    """routed[..., -C:] = g (B, N, C), 0 for nodes without edges; sums (2, B, parts, C) float64: of g, of g * winner."""
    batch, n, channels = winner.shape
    parts = sums.shape[2]
    constants, options = choose(PASS, channels)
    with device_of(winner):
        gradient_kernel[(batch * parts, triton.cdiv(channels, constants["CHANNELS"]))](
            *(grad, winner, degrees, scale, shift, routed, sums, batch, n, channels),
            *(routed.shape[2], parts, triton.cdiv(n, parts)),
            SLOPE=negative_slope,
            **constants,
            **options,
        )


def reverse_graph(idx: Tensor, start: Tensor, edges: Tensor) -> None:
    """start (B, N + 1), edges (B, N k), both int32: see `crosspoint.kernels.reverse_graph`."""
    first, order = graph.reverse_graph(idx, idx.shape[1])
    start.copy_(first)
    edges.copy_(order)


@triton.jit(do_not_specialize=["N", "k"])
def route_kernel(p_slot, p_start, p_edges, p_routed, N, k, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums g over the edges that lead to each node, where they win: each sum one thread's own, in ascending order."""
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    o_node = i_cloud * N + o_own
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    b_first = tl.load(p_start + o_node + i_cloud, mask=m_node, other=0)
    b_count = tl.load(p_start + o_node + i_cloud + 1, mask=m_node, other=0) - b_first
    b_sum = tl.zeros([ROWS, CHANNELS], p_routed.dtype.element_ty)
    for i_edge in range(tl.max(b_count, 0)):
        m_edge = i_edge < b_count
        b_edge = tl.load(p_edges + i_cloud * N * k + b_first + i_edge, mask=m_edge, other=0)
        o_source = (i_cloud * N + b_edge // k)[:, None] * C
        b_slot = tl.load(
            p_slot + o_source + o_channel[None, :], mask=m_edge[:, None] & m_channel[None, :], other=0
        )
        m_wins = (b_slot.to(tl.int32) == (b_edge % k)[:, None]) & m_edge[:, None] & m_channel[None, :]
        b_sum += tl.load(p_routed + 2 * o_source + C + o_channel[None, :], mask=m_wins, other=0.0)
    o_out = o_node[:, None] * (2 * C) + o_channel[None, :]
    tl.store(p_routed + o_out, b_sum, mask=m_node[:, None] & m_channel[None, :])


def route(slot: Tensor, start: Tensor, edges: Tensor, k: int, routed: Tensor) -> None:
    """routed[..., :C] = sum of g = routed[..., C:] over the edges (i, s) to each node with slot[i] == s."""
    batch, n, channels = slot.shape
    constants, options = choose(GATHER, channels)
    with device_of(slot):
        route_kernel[grid_of(batch, n, channels, constants)](
            *(slot, start, edges, routed, n, k, channels), **constants, **options
        )


@triton.jit(do_not_specialize=["clouds", "N", "k"])
def dense_kernel(
    p_x,
    p_sums,
    p_degrees,
    p_start,
    p_edges,
    p_constant,
    p_dense,
    p_grad_x,
    clouds,
    N,
    k,
    C,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    i_cloud, o_own, m_node = rows_of_program(N, ROWS)
    o_node = i_cloud * N + o_own
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    m_all = m_node[:, None] & m_channel[None, :]
    b_first = tl.load(p_start + o_node + i_cloud, mask=m_node, other=0)
    b_count = tl.load(p_start + o_node + i_cloud + 1, mask=m_node, other=0) - b_first
    T: tl.constexpr = p_x.dtype.element_ty
    b_back = tl.zeros([ROWS, CHANNELS], T)
    for i_edge in range(tl.max(b_count, 0)):
        m_edge = i_edge < b_count
        b_edge = tl.load(p_edges + i_cloud * N * k + b_first + i_edge, mask=m_edge, other=0)
        o_source = (i_cloud * N + b_edge // k)[:, None] * C
        b_back += tl.load(
            p_x + o_source + o_channel[None, :], mask=m_edge[:, None] & m_channel[None, :], other=0.0
        )
    o_value = o_node[:, None] * C + o_channel[None, :]
    b_x = tl.load(p_x + o_value, mask=m_all, other=0.0)
    b_out = tl.load(p_degrees + o_node, mask=m_node, other=0).to(T)[:, None]
    b_in = tl.load(p_degrees + clouds.to(tl.int64) * N + o_node, mask=m_node, other=0).to(T)[:, None]
    p_dense += o_node[:, None] * (4 * C) + o_channel[None, :]
    tl.store(p_dense, b_in * b_x, mask=m_all)
    tl.store(p_dense + C, b_back, mask=m_all)
    tl.store(p_dense + 2 * C, tl.load(p_sums + o_value, mask=m_all, other=0.0), mask=m_all)
    tl.store(p_dense + 3 * C, b_out * b_x, mask=m_all)
    p_constant += i_cloud * (2 * C) + o_channel
    b_grad = tl.load(p_grad_x + o_value, mask=m_all, other=0.0)
    b_grad -= b_in * tl.load(p_constant, mask=m_channel, other=0.0)[None, :]
    b_grad -= b_out * tl.load(p_constant + C, mask=m_channel, other=0.0)[None, :]
    tl.store(p_grad_x + o_value, b_grad, mask=m_all)


def dense_gradient(
    x: Tensor,
    sums: Tensor,
    degrees: Tensor,
    start: Tensor,
    edges: Tensor,
    k: int,
    constant: Tensor,
    dense: Tensor,
    grad_x: Tensor,
) -> None:
    """dense (B, N, 4 C) = [d_j x_j, sum of x_i over the edges to j, sums_j, k_j x_j], with d_j edges to j and k_j of
    it; grad_x (B, N, C) -= d_j constant[:, :C] + k_j constant[:, C:], constant (B, 2 C)."""
    batch, n, channels = x.shape
    constants, options = choose(GATHER, channels)
    with device_of(x):
        dense_kernel[grid_of(batch, n, channels, constants)](
            *(x, sums, degrees, start, edges, constant, dense, grad_x, batch, n, k, channels),
            **constants,
            **options,
        )
