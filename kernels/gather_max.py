"""Maxima over neighbours; backward, each row collects from the nodes that it won, over the graph turned around."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import device_of, gather_blocks, rows_of_program, widened
from crosspoint.kernels.reverse_graph import reverse_graph

__all__ = ["gather_max", "gather_max_backward", "most_kernel", "winners_kernel"]


def gather_max(x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """values and slots (B, M, C) of crosspoint::gather_max_triton."""
    (B, N, C), (_, M, k) = x.shape, idx.shape
    values, idx = widened(x), idx.contiguous()
    out, slots = values.new_empty((B, M, C)), idx.new_empty((B, M, C), dtype=torch.int32)
    if out.numel() > 0:
        grid, constants = gather_blocks(B, M, C)
        with device_of(x):
            most_kernel[grid](values, idx, out, slots, M, N, k, C, **constants)
    return out.to(x.dtype), slots


def gather_max_backward(grad: Tensor, idx: Tensor, slots: Tensor, n: int) -> Tensor:
    """(B, n, C) of crosspoint::gather_max_backward_triton."""
    (B, M, C), k = grad.shape, idx.shape[2]
    values, slots = widened(grad), slots.contiguous()
    out = values.new_empty((B, n, C))
    if out.numel() > 0:
        start, edges = reverse_graph(idx, n)
        grid, constants = gather_blocks(B, n, C)
        with device_of(grad):
            winners_kernel[grid](values, slots, start, edges, out, M, n, k, C, **constants)
    return out.to(grad.dtype)


@triton.jit
def most_kernel(p_x, p_idx, p_out, p_slots, M, N, k, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out and slots (B, M, C): the largest of the rows of x (B, N, C) that idx (B, M, k) names."""
    i_cloud, o_own, m_row = rows_of_program(M, ROWS)
    o_row = i_cloud * M + o_own
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    p_cloud = p_x + i_cloud * N * C
    b_most = tl.zeros([ROWS, CHANNELS], p_x.dtype.element_ty)
    b_slot = tl.full([ROWS, CHANNELS], -1, tl.int32)
    for s in range(k):
        b_j = tl.load(p_idx + o_row * k + s, mask=m_row, other=-1)
        m_there = (b_j >= 0) & (b_j < N)
        p_row = (p_cloud + tl.where(m_there, b_j, 0) * C)[:, None] + o_channel[None, :]
        b_x = tl.load(p_row, mask=m_there[:, None] & m_channel[None, :], other=0.0)
        m_wins = (b_slot < 0) | (b_x > b_most) | ((b_x != b_x) & (b_most == b_most))
        m_wins = m_wins & m_there[:, None]
        b_most = tl.where(m_wins, b_x, b_most)
        b_slot = tl.where(m_wins, s, b_slot)
    o_out = (o_row * C)[:, None] + o_channel[None, :]
    m_out = m_row[:, None] & m_channel[None, :]
    tl.store(p_out + o_out, b_most, mask=m_out)
    tl.store(p_slots + o_out, b_slot, mask=m_out)


@triton.jit
def winners_kernel(
    p_grad, p_slots, p_start, p_edges, p_out, M, N, k, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """out (B, N, C): for each row, the sum of grad (B, M, C) over the nodes where it has won, by slots (B, M, C)."""
    i_cloud, o_own, m_row = rows_of_program(N, ROWS)
    o_row = i_cloud * N + o_own
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    p_first = p_start + o_row + i_cloud  # (B, N + 1)
    b_first = tl.load(p_first, mask=m_row, other=0)
    b_count = tl.load(p_first + 1, mask=m_row, other=0) - b_first
    p_list = p_edges + i_cloud * M * k + b_first
    b_sum = tl.zeros([ROWS, CHANNELS], tl.float64)
    for s in range(tl.max(b_count, 0)):
        m_there = s < b_count
        b_edge = tl.load(p_list + s, mask=m_there, other=0)
        o_from = ((i_cloud * M + b_edge // k) * C)[:, None] + o_channel[None, :]
        b_slot = tl.load(p_slots + o_from, mask=m_there[:, None] & m_channel[None, :], other=-1)
        # Of k neighbours one has won: most gradients are not read.
        b_sum += tl.load(p_grad + o_from, mask=b_slot == (b_edge % k)[:, None], other=0.0).to(tl.float64)
    p_row = p_out + (o_row * C)[:, None] + o_channel[None, :]
    tl.store(p_row, b_sum.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_channel[None, :])
