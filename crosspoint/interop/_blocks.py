"""Layers of other packages' EdgeConv blocks that the fused operator computes exactly, and their evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspoint.nn.batch_norm import norm_arguments
from crosspoint.ops import edge_conv

__all__ = ["Block", "CannotFuse", "max_over_edges", "read_block"]


class CannotFuse(TypeError):
    """The fused operators would not reproduce this module exactly; the message says what stands in the way."""


class Block(NamedTuple):
    """One layer on edges: act(bn(weight @ edge + bias))."""

    weight: Tensor  # as the layer holds it
    bias: Tensor | None
    bn: nn.modules.batchnorm._BatchNorm | None
    negative_slope: float  # 1 where there is no activation


def read_block(module: nn.Module, layer: type[nn.Module], norm: type[nn.Module]) -> Block:
    """The parts of `layer`, then perhaps `norm`, then perhaps ReLU or LeakyReLU; CannotFuse for anything else."""
    parts = list(module) if type(module) is nn.Sequential else [module]
    names = ", ".join(type(part).__name__ for part in parts)
    what = f"Sequential({names})" if type(module) is nn.Sequential else names
    # Exact types: a subclass may compute something else (SyncBatchNorm, parametrised layers).
    if [type(part) for part in parts[:1]] != [layer]:
        raise CannotFuse(f"{what} does not begin with {layer.__name__}")
    rest = parts[1:]
    bn = rest.pop(0) if rest and type(rest[0]) is norm else None
    activation = rest.pop(0) if rest and type(rest[0]) in (nn.ReLU, nn.LeakyReLU) else None
    if rest:
        raise CannotFuse(
            f"{what} is not {layer.__name__}, perhaps {norm.__name__}, perhaps ReLU or LeakyReLU, in this order "
            f"and nothing more; {type(rest[0]).__name__} on edges has to be computed on every edge"
        )
    for part in (module, *parts):
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            raise CannotFuse(
                f"{type(part).__name__} in {what} has hooks, which the fused operator would not call"
            )
    slope = 1.0
    if activation is not None:
        slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
    if not slope >= 0:
        raise CannotFuse(
            f"LeakyReLU has slope {slope}; a decreasing activation does not commute with the maximum"
        )
    return Block(parts[0].weight, parts[0].bias, bn, slope)


def max_over_edges(x: Tensor, idx: Tensor, weight: Tensor, block: Block, impl: str) -> Tensor:
    """max over the edges of act(bn(weight @ [x_j - x_i, x_i] + bias)): (B, N, C), (B, N, k) -> (B, N, C_out).

    `weight` is the block's, flat and with its columns in this order; everything else is read from the block.
    """
    bias, bn = block.bias, block.bn
    if bn is None:
        inner = block.negative_slope if bias is None else 1.0
        h = edge_conv(x, idx, weight, None, None, training=False, negative_slope=inner, impl=impl)
        if bias is None:
            return h
        # Increasing functions may as well follow the maximum; a node without edges stays 0.
        h = F.leaky_relu(h + bias.to(h.dtype), block.negative_slope)
        return h.masked_fill((idx < 0).all(2, keepdim=True), 0)

    norm = norm_arguments(bn)
    if norm["gamma"] is None:
        norm["gamma"], norm["beta"] = weight.new_ones(weight.shape[0]), weight.new_zeros(weight.shape[0])
    if bias is not None and norm["training"]:
        # The norm takes the bias away again; its gradient is zero, which optimisers tell from None.
        norm["beta"] = norm["beta"] + 0 * bias
    elif bias is not None:
        norm["beta"] = norm["beta"] + norm["gamma"] * bias * torch.rsqrt(norm["running_var"] + norm["eps"])
    out = edge_conv(x, idx, weight, **norm, negative_slope=block.negative_slope, impl=impl)
    if bias is not None and norm["training"] and norm["running_mean"] is not None and idx.numel():
        norm["running_mean"].add_(norm["momentum"] * bias.detach())
    return out
