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
    EdgeNorm,
    Graph,
    Layer,
    NormGradients,
    affine,
    edge_moments,
    edges_of,
    input_gradients,
    norm_gradients,
    norm_of_edges,
    norm_outputs,
    running_statistics,
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
    first_known: bool,
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
        layer1, layer2 = _layers(dtype, weight1, gamma1, beta1, weight2, gamma2, beta2)
        leaves.degrees(idx, degrees)
        edges = edges_of(degrees)
        measured = training and not first_known
        centred, halves, norm1, _, _ = norm_of_edges(
            *(leaves, x, idx, layer1, running_mean1, running_var1, measured, momentum, eps),
            *(degrees, centre, edges),
        )
        rounded = _rounded(given, weight1)
        nodes = product(centred.view(-1, c_in), halves.t(), c_in, rounded=rounded)  # U beside V
        partial = x.new_empty((2, batch, -(-n // _NODES) if training else 0, c_out), dtype=torch.float64)
        leaves.edge_max(
            *(nodes, idx, norm1.scale, norm1.shift, layer2.weight, layer2.gamma, negative_slope),
            *(product_of_tiles(dtype, rounded), winner, slot if backward else None, partial),
        )
        pivot, norm2 = _pivot(leaves, layer1, norm1, negative_slope), norm_outputs(x, batch, c_out)
        with running_statistics(gamma2, running_mean2, running_var2) as running:
            sums = partial if training else None
            leaves.sums_norm(sums, *layer2, *running, pivot, edges, momentum, eps, *norm2)
        leaves.activate(winner, degrees, norm2.scale, norm2.shift, negative_slope, out)
        kept1, kept2 = norm1[:2], norm2[:2]
        return out.to(given), kept, slot, degrees, centre, *kept1, *kept2


def _layers(dtype: torch.dtype, *given: Tensor | None) -> tuple[Layer, Layer]:
    return Layer.of(dtype, *given[:3], signs=False), Layer.of(dtype, *given[3:], signs=True)


def _rounded(given: torch.dtype, weight: Tensor) -> bool:
    """Whether products are bfloat16's, as autocast leaves them. A layer that is bfloat16 throughout is widened."""
    return given == torch.bfloat16 and weight.dtype == torch.float32


def _pivot(leaves: ModuleType, layer: Layer, norm: EdgeNorm, negative_slope: float) -> Tensor:
    """Of each cloud, (B, C_mid) float64."""
    pivot = torch.empty_like(norm.offset)
    leaves.pivot(layer.gamma, layer.beta, norm.rstd, norm.offset, negative_slope, pivot)
    return pivot


def _remainder(
    layer: Layer, norm: EdgeNorm, gradients: NormGradients, edges: Tensor, total: Tensor, pivot: Tensor
) -> Tensor:
    """What leaf weight_gradient leaves out of the second weight's gradient: it takes the gradients of all edges for
    adding up to 0, as they do where the statistics are of no other edges. total (C_mid): of a, over the edges."""
    gamma = layer.gamma.double()
    signed = torch.where(gamma < 0, -1.0, 1.0)[:, None] * layer.weight
    left = (
        gradients.sum.sum(0) - edges @ gradients.mean_term - gradients.slope_term * (signed.double() @ total)
    )
    return torch.outer(gamma * norm.rstd * left, pivot.mean(0)).to(layer.weight.dtype)


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
    first_known: bool,
    mean_term: Tensor | None,
    slope_term: Tensor | None,
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

        x, idx, edges = x.to(dtype).contiguous(), idx.contiguous(), edges_of(degrees)
        layer1, layer2 = _layers(dtype, weight1, gamma1, beta1, weight2, gamma2, beta2)
        norm1, norm2 = affine(leaves, layer1, offset1, rstd1), affine(leaves, layer2, offset2, rstd2)
        g = torch.empty_like(winner)
        partial = x.new_empty((2, batch, -(-n // _GRADIENT_PART), c_out), dtype=torch.float64)
        leaves.winner_gradient(
            *(grad.to(dtype).contiguous(), winner, degrees, norm2.scale, norm2.shift, negative_slope),
            *(g, partial),
        )
        gradients2 = norm_gradients(leaves, partial, layer2, norm2, edges, training)
        if mean_term is not None:
            gradients2 = gradients2._replace(mean_term=mean_term, slope_term=slope_term)
        terms2 = (gradients2.mean_term, gradients2.slope_term)
        rows = x.new_empty((c_out + c_mid * training, c_mid))  # scale2 weight2; in training, -Q below it
        q, square = (x.new_empty((batch, c_mid)), rows[c_out:]) if training else (None, None)
        leaves.input_terms(
            layer2.weight, layer2.gamma, layer2.signs, norm2.rstd, *terms2, rows[:c_out], q, square
        )
        q = x.new_zeros((batch, c_mid)) if q is None else q

        rounded = _rounded(given, weight1)
        centred = torch.empty_like(x)
        leaves.subtract(x, centre, degrees, centred)
        neighbour, own = layer1.weight.chunk(2, 1)
        halves = torch.cat([neighbour, own - neighbour])  # (2 C_mid, C_in)
        nodes = product(centred.view(-1, c_in), halves.t(), c_in, rounded=rounded)
        tiles = (
            nodes,
            idx,
            norm1.scale,
            norm1.shift,
            g,
            slot,
            negative_slope,
            product_of_tiles(dtype, rounded),
        )
        routed = x.new_empty((batch, n, 2 * c_mid))
        partial = x.new_empty((3, batch, -(-n // _NODES), c_mid), dtype=torch.float64)
        leaves.own_gradient(*tiles, rows, q, routed, partial)
        measured = training and not first_known
        gradients1 = norm_gradients(leaves, partial[:2], layer1, norm1, edges, measured)

        grad_x, grad_weight1 = x.new_empty(0), x.new_empty(0)
        if need_x or need_weight1:
            graph = Graph.turned(leaves, idx, degrees)
            runs = x.new_empty((batch, n + -(-n * k // _EDGES), c_mid))
            leaves.neighbour_gradient(*tiles, rows, q, graph.start, graph.edges, runs)
            leaves.add_runs(runs, graph.start, k, routed)
            del runs
            sums = moments = None
            if measured:
                sums = torch.empty_like(x)
                leaves.neighbor_sum(centred, idx, sums)
                moments = edge_moments(leaves, centred, sums, degrees) if need_weight1 else None
            grad_x, grad_weight1 = input_gradients(
                *(leaves, routed, centred, centre, graph, edges, layer1, norm1, gradients1),
                *(sums, moments, need_x, need_weight1),
            )
        grad_weight2 = x.new_empty(0)
        if need_weight2:
            products = x.new_empty((batch, -(-n // _PRODUCTS_PART), len(rows), c_mid))
            leaves.edge_products(*tiles, products)
            sparse = products[:, :, :c_out].sum((0, 1), dtype=torch.float64).to(dtype)  # g a^T at the winners
            moments = None
            if training:  # sums of a a^T over all edges, of a over each cloud's
                moments = x.new_empty((c_mid + batch, c_mid), dtype=torch.float64)
                torch.sum(products[:, :, c_out:], (0, 1), dtype=torch.float64, out=moments[:c_mid])
                torch.sum(partial[2], 1, out=moments[c_mid:])
            grad_weight2 = torch.empty_like(layer2.weight)
            pivot = _pivot(leaves, layer1, norm1, negative_slope)
            remainder = None
            if mean_term is not None:
                remainder = _remainder(layer2, norm2, gradients2, edges, moments[c_mid:].sum(0), pivot)
            leaves.weight_gradient(
                *(
                    sparse,
                    layer2.weight,
                    layer2.gamma,
                    layer2.signs,
                    norm2.rstd,
                    pivot,
                    edges,
                    *terms2,
                    moments,
                ),
                *(gradients2.sum, grad_weight2),
            )
            if remainder is not None:
                grad_weight2.add_(remainder)
        return (
            grad_x.to(given),
            *(grad_weight1, gradients1.gamma, gradients1.beta),
            *(grad_weight2, gradients2.gamma, gradients2.beta),
        )
