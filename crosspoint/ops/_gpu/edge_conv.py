"""EdgeConv on a GPU: statistics from sums in input space, then one gather. docs/derivations/edge_conv.md derives it.

Everything is signed by gamma, so that every maximum is a maximum, and centred cloud by cloud: with x_j = t + x'_j an
edge carries h = U_j + V_i + B t, and [U | V] = x' [A | D]^T, D = B - A. Products run through torch, all else in leaves.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from crosspoint.ops._checks import check_graph, compute_dtype
from crosspoint.ops._gpu._edge_layer import (
    Graph,
    Layer,
    affine,
    edges_of,
    input_gradients,
    norm_gradients,
    norm_of_edges,
)
from crosspoint.ops._gpu._products import product

__all__ = ["backward", "forward"]

# Nodes of a cloud that one block of threads sums.
_GRADIENT_PART = 256


def forward(
    leaves: ModuleType,
    x: Tensor,
    idx: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    backward: bool,
) -> tuple[Tensor, ...]:
    """What operator edge_conv returns."""
    with torch.autocast(x.device.type, enabled=False):
        (batch, n, k), (c_out, c_in) = idx.shape, (weight.shape[0], x.shape[2])
        training = training and gamma is not None
        dtype, given = compute_dtype(x), x.dtype
        nodes = (batch, n, c_out)
        kept = nodes if backward else (0,)
        out = x.new_empty(nodes, dtype=dtype)
        winner = x.new_empty(kept, dtype=dtype)
        slot = x.new_empty(kept, dtype=torch.uint8 if k <= 256 else torch.int32)
        degrees = idx.new_zeros((2, batch, n), dtype=torch.int32)
        centre = x.new_empty((batch, c_in), dtype=dtype)
        if idx.numel() * x.numel() * c_out == 0:
            return _nothing(x, out, winner, slot, degrees, centre, training and backward)
        check_graph("edge_conv", idx, n)

        # As autocast leaves them. A layer that is bfloat16 throughout is widened.
        rounded = given == torch.bfloat16 and weight.dtype == torch.float32
        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        layer = Layer.of(dtype, weight, gamma, beta, signs=True)
        leaves.degrees(idx, degrees)
        centred, halves, norm, sums, moments = norm_of_edges(
            *(leaves, x, idx, layer, running_mean, running_var, training, momentum, eps),
            *(degrees, centre, edges_of(degrees)),
        )
        products = product(centred.view(-1, c_in), halves.t(), c_in, rounded=rounded)  # (B N, 2 C_out)
        kept = (winner, slot) if backward else (None, None)
        leaves.gather_max(products, idx, layer.gamma, norm.scale, norm.shift, negative_slope, out, *kept)
        if moments is None or not backward:
            sums, moments = x.new_empty(0), x.new_empty(0, dtype=torch.float64)
        in_sum = x.new_empty(0)
        return out.to(given), winner, slot, sums, in_sum, degrees, centre, norm.offset, norm.rstd, moments


def _nothing(
    x: Tensor, out: Tensor, winner: Tensor, slot: Tensor, degrees: Tensor, centre: Tensor, sums: bool
) -> tuple[Tensor, ...]:
    """The results where there is no edge, channel or node."""
    (batch, n, c_out), c_in = out.shape, x.shape[2]
    double = {"dtype": torch.float64, "device": x.device}
    return (
        out.zero_().to(x.dtype, copy=True),
        winner.zero_(),
        slot.zero_(),
        centre.new_zeros((batch, n, c_in)) if sums else centre.new_empty(0),
        centre.new_empty(0),
        degrees,
        centre.zero_(),
        torch.zeros((batch, c_out), **double),
        torch.zeros(c_out, **double),
        torch.zeros((2 * c_in + batch, 2 * c_in) if sums else 0, **double),
    )


def backward(
    leaves: ModuleType,
    grad: Tensor,
    x: Tensor,
    idx: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    winner: Tensor,
    slot: Tensor,
    out_sum: Tensor,
    in_sum: Tensor,
    degrees: Tensor,
    centre: Tensor,
    offset: Tensor,
    rstd: Tensor,
    moments: Tensor,
    training: bool,
    negative_slope: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What operator edge_conv_backward returns.

    The gradient of h on edge (i, j) is scale ([the edge wins] g_i - mean_term - slope_term h), the last two only where
    the batch made the statistics. Leaves sum the first, edge by edge; the others go through sums over nodes.
    """
    with torch.autocast(x.device.type, enabled=False):
        (batch, n, k), (c_out, c_in) = idx.shape, (weight.shape[0], x.shape[2])
        training = training and gamma is not None
        dtype, given = compute_dtype(x), x.dtype
        if idx.numel() * x.numel() * c_out == 0:
            zeros = [x.new_zeros(0 if gamma is None else c_out, dtype=dtype) for _ in range(2)]
            grad_weight = x.new_zeros((c_out, 2 * c_in) if need_weight else 0, dtype=dtype)
            return torch.zeros_like(x) if need_x else x.new_empty(0), grad_weight, *zeros

        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        layer, edges = Layer.of(dtype, weight, gamma, beta, signs=True), edges_of(degrees)
        norm = affine(leaves, layer, offset, rstd)
        routed = x.new_empty((batch, n, 2 * c_out))  # scale times it: dU and dV, but for the dense terms
        partial = x.new_empty((2, batch, -(-n // _GRADIENT_PART), c_out), dtype=torch.float64)
        leaves.winner_gradient(
            *(grad.to(dtype).contiguous(), winner, degrees, norm.scale, norm.shift, negative_slope),
            *(routed, partial),
        )
        gradients = norm_gradients(leaves, partial, layer, norm, edges, training)
        grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
        if need_x or need_weight:
            graph = Graph.turned(leaves, idx, degrees)
            leaves.route(slot, graph.start, graph.edges, k, routed)
            centred = torch.empty_like(x)
            leaves.subtract(x, centre, degrees, centred)
            grad_x, grad_weight = input_gradients(
                *(leaves, routed, centred, centre, graph, edges, layer, norm, gradients),
                *(out_sum, moments if training else None, need_x, need_weight),
            )
        return grad_x.to(given), grad_weight, gradients.gamma, gradients.beta
