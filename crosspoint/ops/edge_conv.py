"""EdgeConv: convolution on edges, batch norm over all edges, LeakyReLU and maximum over neighbours, fused."""

from __future__ import annotations

from torch import Tensor

from crosspoint.ops import _dispatch, reference

__all__ = ["edge_conv"]


def edge_conv(
    x: Tensor,
    idx: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
    impl: str = "auto",
) -> Tensor:
    _dispatch.choose("edge_conv", impl, x.device)
    return reference.edge_conv(
        x, idx, weight, gamma, beta, running_mean, running_var,
        training=training, momentum=momentum, eps=eps, negative_slope=negative_slope,
    )


_dispatch.register("edge_conv")
