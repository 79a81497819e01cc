"""Products over nodes, and the precision that they are taken in."""

from __future__ import annotations

import torch
from torch import Tensor

from crosspoint.kernels._precision import PRODUCTS, product_of

__all__ = ["EXACT_CHANNELS", "add_product", "product", "product_of_tiles"]

EXACT_CHANNELS = 8  # up to here x holds coordinates: a product in less than float32 would move points


def product(left: Tensor, right: Tensor, channels: int, *, rounded: bool = False) -> Tensor:
    """left (M, K) right (K, N), accumulated and given in their own dtype.

    Args:
        channels: how many the user's features have. With few, float32 is kept, whatever
            `torch.get_float32_matmul_precision()` allows: through float64, which no setting rounds.
        rounded: whether float32 operands with more channels are rounded to bfloat16.
    """
    if left.dtype == torch.float64:
        return left @ right
    if channels <= EXACT_CHANNELS:
        return (left.double() @ right.double()).float()
    if rounded:
        left, right = left.bfloat16(), right.bfloat16()
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()
    return left @ right


def add_product(total: Tensor, left: Tensor, right: Tensor, channels: int) -> None:
    """total += `product(left, right, channels)`, in place."""
    if total.dtype == torch.float32 and channels <= EXACT_CHANNELS:
        total.copy_(total.double().addmm_(left.double(), right.double()))
    else:
        total.addmm_(left, right)


def product_of_tiles(dtype: torch.dtype, rounded: bool) -> int:
    """How kernels multiply tiles of `dtype` on the chip, a place in `PRODUCTS`; `rounded` as above."""
    return PRODUCTS.index("bf16" if rounded and dtype == torch.float32 else product_of(dtype))
