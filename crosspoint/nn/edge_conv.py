"""Edge convolution (DGCNN, arXiv 1801.07829) as modules over (B, N, C) features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crosspoint.nn.batch_norm import norm_arguments
from crosspoint.ops import edge_conv, edge_conv2, knn_graph

__all__ = ["DynamicEdgeConv", "EdgeConv", "EdgeConv2"]


class EdgeConv(nn.Module):
    """max over the neighbours j of i of LeakyReLU(BatchNorm(weight @ [x_j - x_i, x_i])).

    The parameters are those of `nn.Conv2d(2 * in_channels, out_channels, 1, bias=False)` followed by
    `nn.BatchNorm2d(out_channels)`, with the same initialisation; the statistics run over all edges.

    `bn` only holds the affine parameters and the running statistics and is never called. Its `training`,
    `momentum` (None: cumulative average) and `track_running_stats` mean what they mean in PyTorch, so
    `module.bn.eval()` freezes the statistics alone.

    Args:
        in_channels: C_in of x.
        out_channels: C_out.
        negative_slope: of the LeakyReLU, >= 0; 0 is ReLU.
        eps, momentum, track_running_stats: of the batch norm.
        impl: backend of `crosspoint.ops.edge_conv`.

    Shapes: x (B, N, C_in), idx (B, N, k) int64 with -1 for an edge that does not exist -> (B, N, C_out).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        negative_slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"channels must be positive, got in {in_channels}, out {out_channels}")
        if not negative_slope >= 0:
            raise ValueError(f"negative_slope must be >= 0, got {negative_slope}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.negative_slope = negative_slope
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(out_channels, 2 * in_channels))
        self.bn = nn.BatchNorm1d(
            out_channels, eps=eps, momentum=momentum, track_running_stats=track_running_stats
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bn.reset_parameters()

    def forward(self, x: Tensor, idx: Tensor) -> Tensor:
        return edge_conv(
            x,
            idx,
            self.weight,
            **norm_arguments(self.bn),
            negative_slope=self.negative_slope,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}"
        return f"{sizes}, negative_slope={self.negative_slope}, impl={self.impl!r}"


class DynamicEdgeConv(EdgeConv):
    """EdgeConv on the k-NN graph of its own input, each point among its own neighbours.

    Args: those of `EdgeConv`, and k, the number of neighbours.

    Shapes: x (B, N, C_in), lengths (B,) or None -> (B, N, C_out); rows past `lengths` give 0.
    """

    def __init__(self, in_channels: int, out_channels: int, k: int = 20, **options):
        super().__init__(in_channels, out_channels, **options)
        if k < 1:
            raise ValueError(f"k must be positive, got {k}")
        self.k = k

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(x, knn_graph(x, self.k, lengths=lengths, impl=self.impl))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"


class EdgeConv2(nn.Module):
    """Two layers on the edges before the maximum over neighbours, as in DGCNN's part segmentation.

    A layer is LeakyReLU(BatchNorm(weight @ .)); the first takes [x_j - x_i, x_i]. The parameters are those of
    `nn.Conv2d(2 * in_channels, mid_channels, 1, bias=False)`, `nn.BatchNorm2d(mid_channels)`,
    `nn.Conv2d(mid_channels, out_channels, 1, bias=False)` and `nn.BatchNorm2d(out_channels)`, with the same
    initialisation; the statistics of both norms run over all edges.

    `bn1` and `bn2` only hold affine parameters and running statistics and are never called, as in `EdgeConv`. Both
    must be in one mode: freezing one norm's statistics alone is an error.

    Args:
        in_channels: C_in of x.
        mid_channels: C_mid, between the layers.
        out_channels: C_out.
        negative_slope: of both LeakyReLUs, >= 0; 0 is ReLU.
        eps, momentum, track_running_stats: of both norms.
        impl: backend of `crosspoint.ops.edge_conv2`.

    Shapes: x (B, N, C_in), idx (B, N, k) int64 with -1 for an edge that does not exist -> (B, N, C_out).
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        negative_slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        if min(in_channels, mid_channels, out_channels) < 1:
            raise ValueError(
                f"channels must be positive, got in {in_channels}, mid {mid_channels}, out {out_channels}"
            )
        if not negative_slope >= 0:
            raise ValueError(f"negative_slope must be >= 0, got {negative_slope}")
        self.in_channels = in_channels
        self.mid_channels = mid_channels
        self.out_channels = out_channels
        self.negative_slope = negative_slope
        self.impl = impl
        options = {"eps": eps, "momentum": momentum, "track_running_stats": track_running_stats}
        self.weight1 = nn.Parameter(torch.empty(mid_channels, 2 * in_channels))
        self.bn1 = nn.BatchNorm1d(mid_channels, **options)
        self.weight2 = nn.Parameter(torch.empty(out_channels, mid_channels))
        self.bn2 = nn.BatchNorm1d(out_channels, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight, bn in ((self.weight1, self.bn1), (self.weight2, self.bn2)):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bn.reset_parameters()

    def forward(self, x: Tensor, idx: Tensor) -> Tensor:
        first, second = norm_arguments(self.bn1), norm_arguments(self.bn2)
        options = {name: first[name] for name in ("training", "momentum", "eps", "group")}
        for name, value in options.items():
            if second[name] != value:
                raise ValueError(
                    f"EdgeConv2: bn1 and bn2 must agree in {name}, got {value} and {second[name]}; change both"
                )
        statistics = (norm[name] for norm in (first, second) for name in ("running_mean", "running_var"))
        return edge_conv2(
            x,
            idx,
            self.weight1,
            self.bn1.weight,
            self.bn1.bias,
            self.weight2,
            self.bn2.weight,
            self.bn2.bias,
            *statistics,
            **options,
            negative_slope=self.negative_slope,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.mid_channels}, {self.out_channels}"
        return f"{sizes}, negative_slope={self.negative_slope}, impl={self.impl!r}"
