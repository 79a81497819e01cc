"""A linear map shared by all points, batch norm and LeakyReLU (a 1 x 1 convolution), over (B, N, C) features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspoint.nn.batch_norm import norm_arguments
from crosspoint.ops import conv_bn_act_pool
from crosspoint.ops.reference import masked_batch_norm

__all__ = ["SharedLinear"]


class SharedLinear(nn.Module):
    """LeakyReLU(BatchNorm(weight @ x_n)) of every point n.

    The parameters are those of `nn.Conv1d(in_channels, out_channels, 1, bias=False)` followed by
    `nn.BatchNorm1d(out_channels)`, with the same initialisation.

    Args:
        in_channels: C_in of x.
        out_channels: C_out.
        negative_slope: of the LeakyReLU, >= 0; 0 is ReLU.
        impl: backend of `crosspoint.ops.conv_bn_act_pool`, which `pool` runs on.

    Shapes: x (B, N, C_in), lengths (B,) or None -> (B, N, C_out). Rows past `lengths` may hold anything: they
    reach no statistic and no gradient, and what stands in their place in the output is of no meaning, but finite.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, negative_slope: float = 0.2, impl: str = "auto"
    ):
        super().__init__()
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"channels must be positive, got in {in_channels}, out {out_channels}")
        if not negative_slope >= 0:
            raise ValueError(f"negative_slope must be >= 0, got {negative_slope}")
        self.negative_slope = negative_slope
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bn = nn.BatchNorm1d(out_channels)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.normalise(F.linear(x, self.weight))
        valid = valid_rows(x, lengths)
        return self.normalise(F.linear(torch.where(valid, x, 0), self.weight), valid)

    def normalise(self, h: Tensor, valid: Tensor | None = None) -> Tensor:
        """What follows the linear map h (B, N, C_out); valid (B, N, 1): the rows that count, all by default."""
        if valid is None:
            h = self.bn(h.flatten(0, 1)).view_as(h)
        else:
            wide = h if h.dtype == torch.float64 else h.float()
            h = masked_batch_norm(wide, valid, **norm_arguments(self.bn)).to(h.dtype)
        return F.leaky_relu(h, self.negative_slope)

    def pool(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Maximum and mean over the points of what `forward` gives, side by side (B, 2 C_out), fused."""
        return conv_bn_act_pool(
            x,
            self.weight,
            **norm_arguments(self.bn),
            lengths=lengths,
            negative_slope=self.negative_slope,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{columns}, {rows}, negative_slope={self.negative_slope}, impl={self.impl!r}"


def valid_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """Which rows of x (B, N, C) lie within lengths (B,): (B, N, 1)."""
    return (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
