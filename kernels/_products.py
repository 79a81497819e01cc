"""Products of blocks in every precision that `_precision` names, for the kernels whose operands are made as they go."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspoint.kernels._common import INTERPRETED

__all__ = ["add_product", "rounded"]


@triton.jit
def rounded(b, PRODUCT: tl.constexpr):
    """b as tensor cores will take it. tf32 is rounded here, to the nearest, since they would cut it off."""
    if PRODUCT == "bf16":
        b = b.to(tl.bfloat16)
    elif PRODUCT == "tf32":
        b_bits = (b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        b = tl.where(tl.abs(b) < float("inf"), b_bits.to(tl.float32, bitcast=True), b)
    return b


@triton.jit
def add_product(b_left, b_right, b_sum, PRODUCT: tl.constexpr):
    """b_sum + b_left b_right, of `rounded` blocks. The interpreter would read bfloat16 as integers: there the blocks
    are widened, which changes none of their values."""
    if PRODUCT == "bf16":
        if INTERPRETED:
            b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
        b_sum = tl.dot(b_left, b_right, b_sum)
    elif PRODUCT == "float64":
        b_sum = tl.dot(b_left, b_right, b_sum, out_dtype=tl.float64)
    else:
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRODUCT)
    return b_sum
