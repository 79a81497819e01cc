"""In what precision a GPU multiplies the embeddings of the contrastive losses: by dtype and torch's setting."""

from __future__ import annotations

import torch

__all__ = ["PRODUCTS", "product_of"]

# What a product of two float32 rows is made of: three of tf32 that keep float32's digits, one of tf32, one of bf16.
_FLOAT32 = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}
# In the order of `crosspoint::cuda::Product`.
PRODUCTS = ("bf16", "f16", "tf32", "tf32x3", "float64")


def product_of(dtype: torch.dtype) -> str:
    """How tensor cores multiply rows of `dtype`, one of `PRODUCTS`; sums, exponents and row scalars are never narrower
    than float32. float32 follows `torch.get_float32_matmul_precision()` at the time of the call."""
    if dtype == torch.float32:
        return _FLOAT32[torch.get_float32_matmul_precision()]
    return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "float64"}[dtype]
