"""NT-Xent and InfoNCE, blockwise: no 2N x 2N matrix."""

from __future__ import annotations

from torch import Tensor

from crosspoint.ops import _dispatch, reference

__all__ = ["info_nce", "nt_xent"]


def nt_xent(z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1, *, impl: str = "auto") -> Tensor:
    _dispatch.choose("nt_xent", impl, z1.device)
    return reference.nt_xent(z1, z2, temperature)


def info_nce(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1, *, symmetric: bool = True, impl: str = "auto"
) -> Tensor:
    _dispatch.choose("info_nce", impl, z1.device)
    return reference.info_nce(z1, z2, temperature, symmetric=symmetric)


_dispatch.register("nt_xent")
_dispatch.register("info_nce")
