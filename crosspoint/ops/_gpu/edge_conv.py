"""EdgeConv on a GPU: statistics from sums in input space, then one gather. docs/derivations/edge_conv.md derives it.

Everything is signed by gamma, so that every maximum is a maximum, and centred cloud by cloud: see `_edge_layer`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from crosspoint.ops._checks import check_graph, compute_dtype
from crosspoint.ops._gpu._edge_layer import (
    Graph,
    affine,
    edge_moments,
    input_gradients,
    norm_gradients,
    norm_of_edges,
    sign_of,
    split_weight,
    statistics_of,
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

        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        leaves.degrees(idx, degrees)
        leaves.centre(x, degrees, centre)
        centred = torch.empty_like(x)
        leaves.subtract(x, centre, degrees, centred)
        sign = sign_of(gamma)
        signed, own = split_weight(weight, sign)  # (C_out, 2 C_in), (C_out, C_in)
        constant = centre.double() @ own.t()  # (B, C_out), h of an edge from the centre to itself
        sums, moments = x.new_empty(0), x.new_empty(0, dtype=torch.float64)
        statistics = None
        if training:
            sums = torch.empty_like(x)
            leaves.neighbor_sum(centred, idx, sums)
            moments = edge_moments(leaves, centred, sums, degrees)
            statistics = statistics_of(moments, signed, constant, degrees)
        offset, rstd = norm_of_edges(
            constant, statistics, gamma, running_mean, running_var, sign, momentum, eps
        )
        scale, shift = affine(None if gamma is None else gamma.abs(), beta, rstd, offset)

        halves = torch.cat([signed[:, :c_in], signed[:, c_in:]]).to(dtype)  # (2 C_out, C_in)
        # As autocast leaves them. A layer that is bfloat16 throughout is widened.
        rounded = given == torch.bfloat16 and weight.dtype == torch.float32
        products = product(centred.view(-1, c_in), halves.t(), c_in, rounded=rounded)  # (B N, 2 C_out)
        leaves.gather_max(
            products,
            idx,
            None if gamma is None else gamma.to(dtype).contiguous(),
            scale.to(dtype),
            shift.to(dtype),
            negative_slope,
            out,
            winner if backward else None,
            slot if backward else None,
        )
        if not backward:
            sums, moments = x.new_empty(0), x.new_empty(0, dtype=torch.float64)
        in_sum = x.new_empty(0)
        return out.to(given), winner, slot, sums, in_sum, degrees, centre, offset, rstd, moments


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
        (batch, n, _), (c_out, c_in) = idx.shape, (weight.shape[0], x.shape[2])
        training = training and gamma is not None
        dtype, given = compute_dtype(x), x.dtype
        if idx.numel() * x.numel() * c_out == 0:
            zeros = [x.new_zeros(0 if gamma is None else c_out, dtype=dtype) for _ in range(2)]
            grad_weight = x.new_zeros((c_out, 2 * c_in) if need_weight else 0, dtype=dtype)
            return torch.zeros_like(x) if need_x else x.new_empty(0), grad_weight, *zeros

        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        scale, shift = affine(None if gamma is None else gamma.abs(), beta, rstd, offset)
        routed = x.new_empty((batch, n, 2 * c_out))  # scale times it: dU and dV, but for the dense terms
        parts = -(-n // _GRADIENT_PART)
        partial = x.new_empty((2, batch, parts, c_out), dtype=torch.float64)
        leaves.winner_gradient(
            grad.to(dtype).contiguous(),
            winner,
            degrees,
            scale.to(dtype),
            shift.to(dtype),
            negative_slope,
            routed,
            partial,
        )
        sum_g, sum_gh = partial.sum(2)  # (B, C_out), over the winners of each cloud
        norm = norm_gradients(sum_g, sum_gh, offset, rstd, degrees, training)
        sign = sign_of(gamma)
        grad_gamma, grad_beta = x.new_empty(0), x.new_empty(0)
        if gamma is not None:
            grad_gamma, grad_beta = (sign * norm.gamma).to(dtype), norm.beta.to(dtype)
        if not (need_x or need_weight):
            return x.new_empty(0, dtype=given), x.new_empty(0), grad_gamma, grad_beta

        graph = Graph.turned(leaves, idx, degrees)
        leaves.route(slot, graph.start, graph.edges, idx.shape[2], routed)
        grad_x, grad_weight = input_gradients(
            leaves,
            routed,
            x,
            centre,
            graph,
            split_weight(weight, sign)[0],
            scale,
            norm,
            out_sum,
            moments,
            need_x,
            need_weight,
        )
        if need_weight and gamma is not None:
            grad_weight = grad_weight * sign[:, None]
        return grad_x.to(given), grad_weight.to(dtype), grad_gamma, grad_beta
