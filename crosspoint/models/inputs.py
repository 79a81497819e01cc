"""What every point encoder asks of its input."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_points"]


def check_points(points: Tensor, lengths: Tensor | None, channels: int = 3) -> None:
    """Raise ValueError unless points are (B, N, channels) with N >= 1, and lengths, if any, (B,) integers there."""
    if points.dim() != 3 or points.shape[2] != channels or points.shape[1] == 0:
        raise ValueError(f"points must be (B, N, {channels}) with N >= 1, got {tuple(points.shape)}")
    if lengths is None:
        return
    b = points.shape[0]
    if lengths.shape != (b,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths must be ({b},) int32 or int64, got {tuple(lengths.shape)} {lengths.dtype}")
    if lengths.device != points.device:
        raise ValueError(f"lengths must be on {points.device}, as the points are; got {lengths.device}")
