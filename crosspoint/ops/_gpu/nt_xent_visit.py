"""Rows against columns of other samples on a GPU, of the leaves of `nt_xent`: one set without labels, whose first rows
meet the columns behind them."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from crosspoint.ops._checks import compute_dtype
from crosspoint.ops._gpu.nt_xent import Columns, partial_gradient, row_log_sums, weights_exponents

__all__ = ["backward", "forward"]


def forward(leaves: ModuleType, z: Tensor, columns: Tensor, temperature: Tensor) -> Tensor:
    """What operator nt_xent_visit returns."""
    if len(z) == 0 or len(columns) == 0:
        return z.new_full((len(z),), -math.inf, dtype=torch.float64)
    both = Columns(leaves, torch.cat([z, columns]))
    lse, _ = row_log_sums(leaves, both, temperature, None, None, 0, len(z), True, 1)
    return lse[0]


def backward(
    leaves: ModuleType,
    z: Tensor,
    columns: Tensor,
    temperature: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    largest: Tensor,
) -> tuple[Tensor, Tensor]:
    """What operator nt_xent_visit_backward returns."""
    rows, channels = z.shape
    if rows == 0 or len(columns) == 0:
        return torch.zeros_like(z, dtype=compute_dtype(z)), z.new_zeros((), dtype=torch.float64)
    both, lse = Columns(leaves, torch.cat([z, columns])), torch.cat([row_lse, column_lse])
    exponents, shift = weights_exponents(lse[None], largest, both.scale.dtype)
    partial, moments = partial_gradient(leaves, both, temperature, exponents, None, None, 0, rows, True)
    power = torch.exp2(-shift)
    of_parts = partial[0, :, :, :channels]
    sums = of_parts[0] if len(of_parts) == 1 else of_parts.sum(0, dtype=torch.float64)
    return (sums * power).to(both.scale.dtype), math.log(2) * power * moments.sum(dtype=torch.float64)
