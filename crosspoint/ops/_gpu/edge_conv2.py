"""EdgeConv with two layers on a GPU: the first as edge_conv's, the second in tiles of edges that stay on the chip.

docs/derivations/edge_conv2.md derives it. The first layer's norm is kept apart from its node maps U and V: on an edge
z1 = gain (U_j + V_i) + shift. Tiles hold a = leaky(z1) - pivot, where the cloud's pivot is leaky(shift), so that no
large number enters them. The second layer is signed by gamma2, so that every maximum is a maximum.
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
    edges_of,
    input_gradients,
    norm_gradients,
    norm_of_edges,
    sign_of,
    split_weight,
    statistics_of,
)
from crosspoint.ops._gpu._products import product, product_of_tiles

__all__ = ["backward", "forward"]

# What a block of threads works on: nodes in a pass over their own edges, edges in a pass over those that lead to nodes,
# nodes whose sums of products are stored together.
_NODES = 64
_EDGES = 64
_PRODUCTS_PART = 512
_GRADIENT_PART = 256


def forward(
    leaves: ModuleType,
    x: Tensor,
    idx: Tensor,
    weight1: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    weight2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    running_mean1: Tensor | None,
    running_var1: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    backward: bool,
) -> tuple[Tensor, ...]:
    """What operator edge_conv2 returns."""
    with torch.autocast(x.device.type, enabled=False):
        (batch, n, k), (c_out, c_mid), c_in = idx.shape, weight2.shape, x.shape[2]
        training = training and gamma1 is not None
        dtype, given = compute_dtype(x), x.dtype
        out = x.new_empty((batch, n, c_out), dtype=dtype)
        winner = torch.empty_like(out) if backward else out
        slot = x.new_empty(out.shape if backward else (0,), dtype=torch.uint8 if k <= 256 else torch.int32)
        degrees = idx.new_zeros((2, batch, n), dtype=torch.int32)
        centre = x.new_empty((batch, c_in), dtype=dtype)
        kept = winner if backward else x.new_empty(0, dtype=dtype)
        if idx.numel() == 0:
            doubles = [
                centre.new_zeros(s, dtype=torch.float64)
                for s in ((batch, c_mid), c_mid, (batch, c_out), c_out)
            ]
            return (
                out.zero_().to(given, copy=True),
                kept.zero_(),
                slot.zero_(),
                degrees,
                centre.zero_(),
                *doubles,
            )
        check_graph("edge_conv2", idx, n)

        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        leaves.degrees(idx, degrees)
        leaves.centre(x, degrees, centre)
        centred = torch.empty_like(x)
        leaves.subtract(x, centre, degrees, centred)
        split, own = split_weight(weight1)
        constant = centre.double() @ own.t()
        statistics = None
        if training:
            sums = torch.empty_like(x)
            leaves.neighbor_sum(centred, idx, sums)
            moments = edge_moments(leaves, centred, sums, degrees)
            statistics = statistics_of(moments, split, constant, degrees)
        offset1, rstd1 = norm_of_edges(
            constant, statistics, gamma1, running_mean1, running_var1, 1.0, momentum, eps
        )
        gain, shift = affine(gamma1, beta1, rstd1, offset1)

        rounded = _rounded(given, weight1)
        nodes = _node_maps(centred, split, rounded)
        sign = sign_of(gamma2)
        signed = _signed(weight2, sign)
        partial = x.new_empty((2, batch, -(-n // _NODES) if training else 0, c_out), dtype=torch.float64)
        leaves.edge_max(
            nodes,
            idx,
            gain.to(dtype),
            shift.to(dtype),
            signed.to(dtype),
            None if gamma2 is None else gamma2.to(dtype).contiguous(),
            negative_slope,
            product_of_tiles(dtype, rounded),
            winner,
            slot if backward else None,
            partial,
        )
        constant = _leaky(shift, negative_slope) @ signed.t()  # (B, C_out), h2 of the pivot
        statistics = _statistics(*partial.sum(2), constant, degrees) if training else None
        offset2, rstd2 = norm_of_edges(
            constant, statistics, gamma2, running_mean2, running_var2, sign, momentum, eps
        )
        scale, shift = affine(None if gamma2 is None else gamma2.abs(), beta2, rstd2, offset2)
        leaves.activate(winner, degrees, scale.to(dtype), shift.to(dtype), negative_slope, out)
        return out.to(given), kept, slot, degrees, centre, offset1, rstd1, offset2, rstd2


def _rounded(given: torch.dtype, weight: Tensor) -> bool:
    """Whether products are bfloat16's, as autocast leaves them. A layer that is bfloat16 throughout is widened."""
    return given == torch.bfloat16 and weight.dtype == torch.float32


def _node_maps(centred: Tensor, split: Tensor, rounded: bool) -> Tensor:
    """U beside V, (B N, 2 C_mid)."""
    c_in = centred.shape[2]
    halves = torch.cat([split[:, :c_in], split[:, c_in:]]).to(centred.dtype)  # (2 C_mid, C_in)
    return product(centred.view(-1, c_in), halves.t(), c_in, rounded=rounded)


def _signed(weight: Tensor, sign: Tensor | float) -> Tensor:
    return weight.double() * sign[:, None] if isinstance(sign, Tensor) else weight.double()


def _leaky(z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, z, z * slope)


def _statistics(
    sums: Tensor, squares: Tensor, constant: Tensor, degrees: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of h2 over all edges and their number, from sums of h2 - constant over those of each cloud."""
    edges = edges_of(degrees)
    count = edges.sum()
    own = sums / edges.clamp_min(1)
    means = own + constant
    mean = (edges * means).sum(0) / count.clamp_min(1)
    within = (squares - own * sums).clamp_min(0).sum(0)
    between = (edges * (means - mean).square()).sum(0)
    return mean, (within + between) / count.clamp_min(1), count


def backward(
    leaves: ModuleType,
    grad: Tensor,
    x: Tensor,
    idx: Tensor,
    weight1: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    weight2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    winner: Tensor,
    slot: Tensor,
    degrees: Tensor,
    centre: Tensor,
    offset1: Tensor,
    rstd1: Tensor,
    offset2: Tensor,
    rstd2: Tensor,
    training: bool,
    negative_slope: float,
    need_x: bool,
    need_weight1: bool,
    need_weight2: bool,
) -> tuple[Tensor, ...]:
    """What operator edge_conv2_backward returns.

    The gradient of h2 on an edge is scale2 ([it wins] g_i - mean_term - slope_term h2). What reaches a from the last
    two is -(q + Q a), and what they give weight2 follows from the sums of a and of a a^T: neither needs h2.
    """
    with torch.autocast(x.device.type, enabled=False):
        (batch, n, k), (c_out, c_mid), c_in = idx.shape, weight2.shape, x.shape[2]
        normed = gamma1 is not None
        training = training and normed
        dtype, given = compute_dtype(x), x.dtype
        if idx.numel() == 0:
            shapes = [(c_mid, 2 * c_in) if need_weight1 else 0, *[c_mid if normed else 0] * 2]
            shapes += [(c_out, c_mid) if need_weight2 else 0, *[c_out if normed else 0] * 2]
            grad_x = torch.zeros_like(x) if need_x else x.new_empty(0)
            return grad_x, *(x.new_zeros(shape, dtype=dtype) for shape in shapes)

        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        scale2, shift2 = affine(None if gamma2 is None else gamma2.abs(), beta2, rstd2, offset2)
        g = torch.empty_like(winner)
        partial = x.new_empty((2, batch, -(-n // _GRADIENT_PART), c_out), dtype=torch.float64)
        leaves.winner_gradient(
            grad.to(dtype).contiguous(),
            winner,
            degrees,
            scale2.to(dtype),
            shift2.to(dtype),
            negative_slope,
            g,
            partial,
        )
        norm2 = norm_gradients(*partial.sum(2), offset2, rstd2, degrees, training)
        sign = sign_of(gamma2)
        signed = _signed(weight2, sign)
        scaled = scale2[:, None] * signed
        q, rows = torch.zeros_like(offset1), [scaled]
        if training:
            q = norm2.mean_term @ scaled
            rows.append(-(signed.t() @ (norm2.slope_term[:, None] * scaled)))  # -Q, symmetric

        rounded = _rounded(given, weight1)
        centred = torch.empty_like(x)
        leaves.subtract(x, centre, degrees, centred)
        split, _ = split_weight(weight1)
        nodes = _node_maps(centred, split, rounded)
        gain, shift = affine(gamma1, beta1, rstd1, offset1)
        tiles = (
            nodes,
            idx,
            gain.to(dtype),
            shift.to(dtype),
            g,
            slot,
            negative_slope,
            product_of_tiles(dtype, rounded),
        )
        rows = torch.cat(rows).to(dtype)  # (C_out, or C_out + C_mid, C_mid)
        q = q.to(dtype)
        routed = x.new_empty((batch, n, 2 * c_mid))
        partial = x.new_empty((3, batch, -(-n // _NODES), c_mid), dtype=torch.float64)
        leaves.own_gradient(*tiles, rows, q, routed, partial)
        sum_dz, sum_dz_h, sum_a = partial.sum(2)
        norm1 = norm_gradients(sum_dz, sum_dz_h, offset1, rstd1, degrees, training)

        grad_x, grad_weight1 = x.new_empty(0), x.new_empty(0)
        if need_x or need_weight1:
            graph = Graph.turned(leaves, idx, degrees)
            runs = x.new_empty((batch, n + -(-n * k // _EDGES), c_mid))
            leaves.neighbour_gradient(*tiles, rows, q, graph.start, graph.edges, runs)
            leaves.add_runs(runs, graph.start, k, routed)
            del runs
            sums = moments = None
            if training:
                sums = torch.empty_like(x)
                leaves.neighbor_sum(centred, idx, sums)
                moments = edge_moments(leaves, centred, sums, degrees) if need_weight1 else None
            grad_x, grad_weight1 = input_gradients(
                leaves, routed, x, centre, graph, split, gain, norm1, sums, moments, need_x, need_weight1
            )
        grad_weight2 = x.new_empty(0)
        if need_weight2:
            products = x.new_empty((batch, -(-n // _PRODUCTS_PART), len(rows), c_mid))
            leaves.edge_products(*tiles, products)
            products = products.sum((0, 1), dtype=torch.float64)  # g a^T at the winners; a a^T over all edges
            pivot = _leaky(shift, negative_slope)
            grad_weight2 = products[:c_out]
            edge_sum = (
                norm2.sum
            )  # (B, C_out): over the edges of each cloud, of the gradient of h2 over scale2
            if training:
                gram = products[c_out:]
                grad_weight2 = (
                    grad_weight2 - norm2.mean_term.t() @ sum_a - norm2.slope_term[:, None] * (signed @ gram)
                )
                edge_sum = (
                    edge_sum - edges_of(degrees) * norm2.mean_term - norm2.slope_term * (sum_a @ signed.t())
                )
                pivot = pivot - pivot.mean(0)  # over all clouds they add up to 0
            grad_weight2 = _signed(scale2[:, None] * (grad_weight2 + edge_sum.t() @ pivot), sign).to(dtype)

        affine_gradients = []
        for norm, s in ((norm1, 1.0), (norm2, sign)):
            gradients = (s * norm.gamma, norm.beta)
            affine_gradients.append([t.to(dtype) if normed else x.new_empty(0) for t in gradients])
        return (
            grad_x.to(given),
            grad_weight1.to(dtype),
            *affine_gradients[0],
            grad_weight2,
            *affine_gradients[1],
        )
