"""EdgeConv on a GPU: statistics from sums in input space, then one gather. docs/derivations/edge_conv.md derives it.

Everything is signed by gamma, so that every maximum is a maximum, and centred cloud by cloud: with x_j = t + x'_j an
edge carries h = U_j + V_i + B t, and [U | V] = x' [A | D]^T, D = B - A. Products run through torch, all else in leaves.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from crosspoint.ops._checks import check_graph, compute_dtype
from crosspoint.ops._gpu._edge_layer import Graph, edge_moments, edges_of, parameters, running_statistics
from crosspoint.ops._gpu._products import add_product, product

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
        weight, gamma, beta = parameters(dtype, weight, gamma, beta)
        leaves.degrees(idx, degrees)
        leaves.centre(x, degrees, centre)
        centred = torch.empty_like(x)
        leaves.subtract(x, centre, degrees, centred)
        sums, moments = x.new_empty(0), None
        if training:
            sums = torch.empty_like(x)
            leaves.neighbor_sum(centred, idx, sums)
            moments = edge_moments(leaves, centred, sums, degrees)
        halves = x.new_empty((2 * c_out, c_in))
        offset = x.new_empty((batch, c_out), dtype=torch.float64)
        rstd = x.new_empty(c_out, dtype=torch.float64)
        scale, shift = x.new_empty(c_out), x.new_empty((batch, c_out))
        with running_statistics(gamma, running_mean, running_var) as running:
            leaves.norm(
                *(moments, weight, gamma, beta, True, *running, centre, edges_of(degrees), momentum, eps),
                *(halves, offset, rstd, scale, shift),
            )
        products = product(centred.view(-1, c_in), halves.t(), c_in, rounded=rounded)  # (B N, 2 C_out)
        kept = (winner, slot) if backward else (None, None)
        leaves.gather_max(products, idx, gamma, scale, shift, negative_slope, out, *kept)
        if moments is None or not backward:
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
        (batch, n, k), (c_out, c_in) = idx.shape, (weight.shape[0], x.shape[2])
        training = training and gamma is not None
        dtype, given = compute_dtype(x), x.dtype
        if idx.numel() * x.numel() * c_out == 0:
            zeros = [x.new_zeros(0 if gamma is None else c_out, dtype=dtype) for _ in range(2)]
            grad_weight = x.new_zeros((c_out, 2 * c_in) if need_weight else 0, dtype=dtype)
            return torch.zeros_like(x) if need_x else x.new_empty(0), grad_weight, *zeros

        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        weight, gamma, beta = parameters(dtype, weight, gamma, beta)
        edges = edges_of(degrees)
        scale, shift = x.new_empty(c_out), x.new_empty((batch, c_out))
        leaves.affine(gamma, beta, True, rstd, offset, scale, shift)
        routed = x.new_empty((batch, n, 2 * c_out))  # scale times it: dU and dV, but for the dense terms
        partial = x.new_empty((2, batch, -(-n // _GRADIENT_PART), c_out), dtype=torch.float64)
        leaves.winner_gradient(
            *(grad.to(dtype).contiguous(), winner, degrees, scale, shift, negative_slope, routed, partial)
        )
        grad_gamma, grad_beta = (x.new_empty(0 if gamma is None else c_out) for _ in range(2))
        sum_g, mean_term = torch.empty_like(offset), torch.empty_like(offset)
        slope_term = torch.empty_like(rstd)
        leaves.norm_gradient(
            *(partial, gamma, True, offset, rstd, edges, grad_gamma, grad_beta, sum_g, mean_term, slope_term)
        )
        if not (need_x or need_weight):
            return x.new_empty(0, dtype=given), x.new_empty(0), grad_gamma, grad_beta

        graph = Graph.turned(leaves, idx, degrees)
        leaves.route(slot, graph.start, graph.edges, k, routed)
        centred = torch.empty_like(x)
        leaves.subtract(x, centre, degrees, centred)
        routed = routed.view(-1, 2 * c_out)
        if not training:
            mean_term = slope_term = moments = None
        grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
        if need_x:
            halves, constant, square = x.new_empty((2 * c_out, c_in)), None, None
            if training:
                constant, square = x.new_empty((batch, 2 * c_in)), x.new_empty((4 * c_in, c_in))
            leaves.input_terms(weight, gamma, True, rstd, mean_term, slope_term, halves, constant, square)
            grad_x = product(routed, halves, c_in)  # (B N, C_in)
            if training:
                dense = x.new_empty((batch, n, 4 * c_in))  # d_j x_j, their neighbours' sum, P_i, k_i x_i
                leaves.dense_gradient(
                    *(centred, out_sum, degrees, graph.start, graph.edges, k, constant, dense, grad_x)
                )
                add_product(grad_x, dense.view(-1, 4 * c_in), square, c_in)
            grad_x = grad_x.view(batch, n, c_in)
        if need_weight:
            sparse = product(routed.t(), centred.view(-1, c_in), c_in)  # (2 C_out, C_in)
            grad_weight = x.new_empty((c_out, 2 * c_in))
            leaves.weight_gradient(
                *(sparse, weight, gamma, True, rstd, centre, edges, mean_term, slope_term, moments),
                *(sum_g, grad_weight),
            )
        return grad_x.to(given), grad_weight, grad_gamma, grad_beta
