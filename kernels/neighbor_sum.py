"""Sums over neighbours, in float64 and rounded once; the transpose is the same over the graph turned around."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import device_of, gather_blocks, rows_of_program, widened
from crosspoint.kernels.reverse_graph import reverse_graph

__all__ = ["neighbor_sum", "neighbor_sum_backward", "sum_kernel", "sum_turned_kernel"]


def neighbor_sum(x: Tensor, idx: Tensor) -> Tensor:
    """(B, M, C) of crosspoint::neighbor_sum_triton."""
    (B, N, C), (_, M, k) = x.shape, idx.shape
    values, idx = widened(x), idx.contiguous()
    out = values.new_empty((B, M, C))
    if out.numel() > 0:
        grid, constants = gather_blocks(B, M, C)
        with device_of(x):
            sum_kernel[grid](values, idx, out, M, N, k, C, WIDE=True, **constants)
    return out.to(x.dtype)


def neighbor_sum_backward(grad: Tensor, idx: Tensor, n: int) -> Tensor:
    """(B, n, C) of crosspoint::neighbor_sum_backward_triton."""
    (B, M, C), k = grad.shape, idx.shape[2]
    values = widened(grad)
    out = values.new_empty((B, n, C))
    if out.numel() > 0:
        start, edges = reverse_graph(idx, n)
        grid, constants = gather_blocks(B, n, C)
        with device_of(grad):
            sum_turned_kernel[grid](values, start, edges, out, M, n, k, C, **constants)
    return out.to(grad.dtype)


@triton.jit
def sum_kernel(p_x, p_idx, p_out, M, N, k, C, WIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out (B, M, C) = the sums of the rows of x (B, N, C) that idx (B, M, k) names, added up in float64 if WIDE."""
    i_cloud, o_own, m_row = rows_of_program(M, ROWS)
    o_row = i_cloud * M + o_own
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    p_cloud = p_x + i_cloud * N * C
    T: tl.constexpr = tl.float64 if WIDE else p_x.dtype.element_ty
    b_sum = tl.zeros([ROWS, CHANNELS], T)
    for s in range(k):
        b_j = tl.load(p_idx + o_row * k + s, mask=m_row, other=-1)
        m_there = (b_j >= 0) & (b_j < N)
        p_row = (p_cloud + tl.where(m_there, b_j, 0) * C)[:, None] + o_channel[None, :]
        b_sum += tl.load(p_row, mask=m_there[:, None] & m_channel[None, :], other=0.0).to(T)
    p_row = p_out + (o_row * C)[:, None] + o_channel[None, :]
    tl.store(p_row, b_sum.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_channel[None, :])


@triton.jit
def sum_turned_kernel(
    p_grad, p_start, p_edges, p_out, M, N, k, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """out (B, N, C): for each row, the sum of the rows of grad (B, M, C) of the nodes whose edges lead to it."""
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
        b_i = tl.load(p_list + s, mask=m_there, other=0) // k
        p_row = (p_grad + (i_cloud * M + b_i) * C)[:, None] + o_channel[None, :]
        b_sum += tl.load(p_row, mask=m_there[:, None] & m_channel[None, :], other=0.0).to(tl.float64)
    p_row = p_out + (o_row * C)[:, None] + o_channel[None, :]
    tl.store(p_row, b_sum.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_channel[None, :])
