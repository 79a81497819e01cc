"""The supervised contrastive loss on a GPU, of the leaves of `nt_xent`.

Labels tell which columns are positives. A row with several has the loss log(sum of exp(s_ij) over all others) - mean of
s_ip, at least the log of their number, so that its positives stay among the columns. A row with one is a row of
`nt_xent`.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from crosspoint.ops._checks import compute_dtype
from crosspoint.ops._gpu.nt_xent import (
    Columns,
    finish,
    gradient_factors,
    partial_gradient,
    row_log_sums,
    softplus,
    temperature_gradient,
    weights_exponents,
)

__all__ = ["backward", "forward"]


def forward(
    leaves: ModuleType, z: Tensor, labels: Tensor, temperature: Tensor, first_row: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What operator sup_con returns."""
    dtype = compute_dtype(z)
    if rows == 0:
        return tuple(z.new_zeros(shape, dtype=dtype) for shape in ((), (0,), (0,)))
    z, own = z.contiguous(), slice(first_row, first_row + rows)
    count, partner = _positives(labels)
    columns = Columns(leaves, z)
    lse, total = row_log_sums(
        *(leaves, columns, temperature, labels.int(), _target(count).to(dtype), first_row, rows, True, 1)
    )
    count, single = count[own], _single(leaves, z, partner, temperature)[own]
    push = softplus(lse[0] - single)
    losses = torch.where(count == 1, push, lse[0] - total[0] / count)
    losses = torch.where(count == 0, 0, losses)
    row_lse = torch.where(count == 1, single + push, lse[0]) - 1 / temperature.double().abs()
    row_lse = torch.where(count == 0, math.inf, row_lse)
    averaged = (count > 0).sum().clamp_min(1)
    return (losses.sum() / averaged).to(dtype), losses.to(dtype), row_lse.to(dtype)


def backward(
    leaves: ModuleType,
    grad: Tensor,
    z: Tensor,
    labels: Tensor,
    temperature: Tensor,
    row_losses: Tensor,
    row_lse: Tensor,
    first_row: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """What operator sup_con_backward returns."""
    if rows == 0:
        return z.new_empty((0, z.shape[1])), torch.zeros_like(temperature)
    z, dtype = z.contiguous(), compute_dtype(z)
    count, partner = _positives(labels)
    columns = Columns(leaves, z)
    missing = torch.where(count == 1, -torch.expm1(-row_losses.double()), 0)
    lse = row_lse.double() + 1 / temperature.double().abs()
    largest = torch.where(count > 1, 1, missing).max()
    exponents, shift = weights_exponents(lse[None], largest, dtype)
    target = (_target(count) * torch.exp2(shift)).to(dtype)
    partial, moments = partial_gradient(
        leaves, columns, temperature, exponents, labels.int(), target, first_row, rows, True
    )
    averaged = (row_lse != math.inf).sum().clamp_min(1)
    factors = gradient_factors(shift, grad, averaged, temperature)
    pull = missing + missing[partner.clamp_min(0)]  # of two rows that are each other's only positive
    dz = finish(leaves, partial[0], z, z, partner, pull, factors, first_row)
    own = slice(first_row, first_row + rows)
    pulled = (pull * _single(leaves, z, partner, temperature))[own].sum()
    return dz, temperature_gradient(moments, pulled, factors, temperature)


def _positives(labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many positives each row has, and which where there is one, else -1: (N) int64 and int32."""
    ordered, order = labels.sort()
    first = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - first - 1
    row = torch.arange(len(labels), device=labels.device)
    partner = order[first]
    partner = torch.where(partner == row, order[(first + 1).clamp_max(len(labels) - 1)], partner)
    return count, torch.where(count == 1, partner, -1).int()


def _single(leaves: ModuleType, z: Tensor, partner: Tensor, temperature: Tensor) -> Tensor:
    """s of each row and its only positive, (N) float64; 0 where there is none or more."""
    cosine = z.new_empty(z.shape[0], dtype=torch.float64)
    leaves.positives(z, z, partner, cosine)
    return cosine / temperature.double()


def _target(count: Tensor) -> Tensor:
    """What is taken off a positive's two softmax weights, together: 0 in a row with fewer than two positives."""
    return torch.where(count > 1, 2 / count.double(), 0)
