"""A linear layer with batch norm on edges, in input space: what edge_conv and edge_conv2's first layer share (their
graph, sums and parameters), and the algebra of edge_conv2's; edge_conv's is the leaves of csrc/cuda/edge_layer.cu.

Clouds are centred one by one: with x_j = t + x'_j an edge carries h = U_j + V_i + B t, and [U | V] = x' [A | D]^T,
D = B - A. `weight` stands for [A | D], (C_out, 2 C_in) float64. `constant` and `offset`,
(B, C_out) float64, turn U_j + V_i into h and into h - mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from crosspoint.ops._gpu._products import add_product, product

__all__ = [
    "Graph",
    "affine",
    "edge_moments",
    "input_gradients",
    "norm_gradients",
    "norm_of_edges",
    "parameters",
    "running_statistics",
    "sign_of",
    "split_weight",
    "statistics_of",
]

# Nodes of a cloud that one block of threads sums.
_MOMENTS_PART = 256


class Graph(NamedTuple):
    """A graph and the graph turned around, as `leaves.reverse_graph` gives it."""

    idx: Tensor  # (B, N, k)
    degrees: Tensor  # (2, B, N)
    start: Tensor  # (B, N + 1)
    edges: Tensor  # (B, N k)

    @classmethod
    def turned(cls, leaves: ModuleType, idx: Tensor, degrees: Tensor) -> Graph:
        batch, n, k = idx.shape
        start = idx.new_empty((batch, n + 1), dtype=torch.int32)
        edges = idx.new_empty((batch, n * k), dtype=torch.int32)
        leaves.reverse_graph(idx, start, edges)
        return cls(idx, degrees, start, edges)


def parameters(dtype: torch.dtype, *given: Tensor | None) -> list[Tensor | None]:
    """In the dtype that is computed in, contiguous."""
    return [None if t is None else t.to(dtype).contiguous() for t in given]


@contextmanager
def running_statistics(
    gamma: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Running mean and variance as kernels take them, float32 or float64; what is written to copies is copied back."""
    if gamma is None or mean is None or var is None:
        yield None, None
        return
    known = mean.dtype == var.dtype and mean.dtype in (torch.float32, torch.float64)
    dtype = mean.dtype if known else torch.float64
    kept = mean.to(dtype).contiguous(), var.to(dtype).contiguous()
    yield kept
    for own, values in zip((mean, var), kept, strict=True):
        if own is not values:
            own.copy_(values)


def sign_of(gamma: Tensor | None) -> Tensor | float:
    """-1 where gamma is negative, else 1."""
    return 1.0 if gamma is None else torch.where(gamma < 0, -1.0, 1.0).double()


def split_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[A | D] and B, in float64."""
    neighbour, own = weight.double().chunk(2, 1)
    return torch.cat([neighbour, own - neighbour], 1), own


def affine(gamma: Tensor | None, beta: Tensor | None, rstd: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """scale (C_out) and shift (B, C_out) that make z of a centred h."""
    scale = rstd if gamma is None else gamma.double() * rstd
    return scale, scale * offset if beta is None else torch.addcmul(beta.double(), scale, offset)


def edge_moments(leaves: ModuleType, centred: Tensor, sums: Tensor, degrees: Tensor) -> Tensor:
    """Sums over all edges of [x_j, x_i] [x_j, x_i]^T, (2 C, 2 C); below them those over each cloud's of [x_j, x_i],
    (B, 2 C): float64, added up from float32 sums over parts of the clouds. sums: of each node's neighbours."""
    batch, n, channels = centred.shape
    parts = -(-n // _MOMENTS_PART)
    gram = centred.new_empty((batch, parts, 3, channels, channels))
    first = centred.new_empty((batch, parts, 2, channels), dtype=torch.float64)
    leaves.moments(centred, sums, degrees, gram, first)
    moments = centred.new_empty((2 * channels + batch, 2 * channels), dtype=torch.float64)
    leaves.sum_parts(gram, first, moments)
    return moments


def statistics_of(
    moments: Tensor, weight: Tensor, constant: Tensor, degrees: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of h over all edges, (C_out), and the number of edges. Scatter within clouds and scatter
    between their means are sums of squares both: no large offset enters a difference."""
    channels = weight.shape[1]
    gram, first = moments[:channels], moments[channels:]
    edges = edges_of(degrees)
    count = edges.sum()
    centre = first / edges.clamp_min(1)  # (B, 2 C): the mean edge of each cloud
    means = torch.addmm(constant, centre, weight.t())  # (B, C_out), of h
    mean = (edges * means).sum(0) / count.clamp_min(1)
    within = ((weight @ (gram - centre.t() @ first)) * weight).sum(1).clamp_min(0)
    between = (edges * (means - mean).square()).sum(0)
    return mean, (within + between) / count.clamp_min(1), count


def edges_of(degrees: Tensor) -> Tensor:
    """(B, 1) float64: of each cloud."""
    return degrees[0].sum(1, dtype=torch.float64)[:, None]


def norm_of_edges(
    constant: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor] | None,
    gamma: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    sign: Tensor | float,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """offset (B, C_out) and rstd (C_out), float64, of a layer whose h is `sign` times PyTorch's.

    statistics: mean, variance and number of edges of this batch, which update the running ones; None: those decide, or
    without gamma there is no norm.
    """
    if statistics is not None:
        mean, var, edges = statistics
        if running_mean is not None and running_var is not None:
            _update(running_mean, sign * mean, momentum, edges)
            _update(running_var, var * (edges / (edges - 1).clamp_min(1)), momentum, edges)
        return constant - mean, torch.rsqrt(var + eps)
    if gamma is not None:
        return constant - sign * running_mean.double(), torch.rsqrt(running_var.double() + eps)
    return constant, constant.new_ones(constant.shape[1])


def _update(running: Tensor, value: Tensor, momentum: float, edges: Tensor) -> None:
    """As `nn.BatchNorm2d` does; an empty batch leaves it alone."""
    before = running.double()
    running.copy_(torch.where(edges > 0, torch.lerp(before, value, momentum), before))


class NormGradients(NamedTuple):
    """Of z's gradient dz over the edges, with h centred: its sums, those of the affine parameters, and what the batch's
    statistics take from every edge: scale (mean_term + slope_term h), None where they are not the batch's."""

    sum: Tensor  # (B, C_out): of dz
    gamma: Tensor  # (C_out)
    beta: Tensor  # (C_out)
    mean_term: Tensor | None  # (B, C_out)
    slope_term: Tensor | None  # (C_out)


def norm_gradients(
    sum_dz: Tensor, sum_dz_h: Tensor, offset: Tensor, rstd: Tensor, degrees: Tensor, training: bool
) -> NormGradients:
    """From the sums of dz and of dz h over the edges of each cloud, (B, C_out) float64."""
    beta = sum_dz.sum(0)
    gamma = torch.addcmul(sum_dz_h, offset, sum_dz).sum(0) * rstd
    if not training:
        return NormGradients(sum_dz, gamma, beta, None, None)
    count = edges_of(degrees).sum().clamp_min(1)
    slope_term = gamma * rstd / count
    return NormGradients(sum_dz, gamma, beta, torch.addcmul(beta / count, slope_term, offset), slope_term)


def input_gradients(
    leaves: ModuleType,
    routed: Tensor,
    x: Tensor,
    centre: Tensor,
    graph: Graph,
    weight: Tensor,
    scale: Tensor,
    norm: NormGradients,
    sums: Tensor | None,
    moments: Tensor | None,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, N, C_in) and of `weight`'s [A, B] (C_out, 2 C_in), in the dtype of x; empty if not needed.

    routed (B, N, 2 C_out): dz summed over the edges that lead to each node, and over its own. The gradient of h on an
    edge is scale (dz - mean_term - slope_term h); the dense terms go through sums over nodes, `sums` and `moments`
    (see `edge_moments`), needed where the batch made the statistics.
    """
    (batch, n, k), (c_out, c_in) = graph.idx.shape, (weight.shape[0], x.shape[2])
    centred = torch.empty_like(x)
    leaves.subtract(x, centre, graph.degrees, centred)
    scaled = scale[:, None] * weight
    training = norm.mean_term is not None
    grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
    if need_x:
        halves = torch.cat([scaled[:, :c_in], scaled[:, c_in:]]).to(x.dtype)  # (2 C_out, C_in)
        grad_x = product(routed.view(-1, 2 * c_out), halves, c_in)  # (B N, C_in)
        if training:
            dense = x.new_empty((batch, n, 4 * c_in))  # d_j x_j, their neighbours' sum, P_i, k_i x_i
            constant = (norm.mean_term @ scaled).to(x.dtype)  # (B, 2 C_in): of each edge, from x_j and x_i
            leaves.dense_gradient(
                centred, sums, graph.degrees, graph.start, graph.edges, k, constant, dense, grad_x
            )
            square = -(weight.t() @ (norm.slope_term[:, None] * scaled))  # (2 C_in, 2 C_in)
            square = torch.cat([square[:, :c_in], square[:, c_in:]]).to(x.dtype)
            add_product(grad_x, dense.view(-1, 4 * c_in), square, c_in)
        grad_x = grad_x.view(batch, n, c_in)
    if need_weight:
        sparse = product(
            routed.view(-1, 2 * c_out).t(), centred.view(-1, c_in), c_in
        ).double()  # (2 C_out, C_in)
        both = scale[:, None] * torch.cat([sparse[:c_out], sparse[c_out:]], 1)  # (C_out, 2 C_in)
        edge_sum = norm.sum  # (B, C_out): over the edges of each cloud, of the gradient of h over scale
        centre = centre.double()
        if training:
            gram, first = moments[: 2 * c_in], moments[2 * c_in :]
            both = both - scale[:, None] * (
                norm.mean_term.t() @ first + norm.slope_term[:, None] * (weight @ gram)
            )
            edge_sum = (
                norm.sum - edges_of(graph.degrees) * norm.mean_term - norm.slope_term * (first @ weight.t())
            )
            # Over all clouds they add up to 0, so what the centres share may go before it is rounded.
            centre = centre - centre.mean(0)
        neighbour, own = both.chunk(2, 1)
        neighbour = neighbour - own
        own = torch.addmm(own, (scale * edge_sum).t(), centre)
        grad_weight = torch.cat([neighbour, own], 1)
    return grad_x, grad_weight
