"""A linear layer with batch norm on edges, in input space: what the layers of edge_conv and edge_conv2 share. Matrices
of a few channels are for the leaves of csrc/cuda/edge_layer.cu and kernels/edge_layer.py; products over nodes go
through torch.

Clouds are centred one by one: with x_j = t + x'_j an edge carries h = U_j + V_i + B t, and [U | V] = x' [A | D]^T,
D = B - A.
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
    "EdgeNorm",
    "Graph",
    "Layer",
    "NormGradients",
    "affine",
    "edge_moments",
    "edges_of",
    "input_gradients",
    "norm_gradients",
    "norm_of_edges",
    "norm_outputs",
    "running_statistics",
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


class Layer(NamedTuple):
    """A layer's parameters, contiguous, in the dtype that is computed in. `signs`: h times the sign of gamma, so that
    every maximum is a maximum."""

    weight: Tensor  # (C_out, 2 C_in) for [x_j - x_i, x_i], or (C_out, C_in)
    gamma: Tensor | None  # (C_out)
    beta: Tensor | None
    signs: bool

    @classmethod
    def of(
        cls, dtype: torch.dtype, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, signs: bool
    ) -> Layer:
        given = (None if t is None else t.to(dtype).contiguous() for t in (weight, gamma, beta))
        return cls(*given, signs)


class EdgeNorm(NamedTuple):
    """The norm of a layer on edges: with h' = h less that of the cloud's centre, z = scale h' + shift."""

    offset: Tensor  # (B, C_out) float64: turns h' into h - mean
    rstd: Tensor  # (C_out) float64
    scale: Tensor  # (C_out)
    shift: Tensor  # (B, C_out)


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


def norm_outputs(like: Tensor, batch: int, channels: int) -> EdgeNorm:
    """To be filled by a leaf."""
    double = {"dtype": torch.float64}
    return EdgeNorm(
        like.new_empty((batch, channels), **double),
        like.new_empty(channels, **double),
        like.new_empty(channels),
        like.new_empty((batch, channels)),
    )


def edges_of(degrees: Tensor) -> Tensor:
    """(B) float64: of each cloud."""
    return degrees[0].sum(1, dtype=torch.float64)


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


def norm_of_edges(
    leaves: ModuleType,
    x: Tensor,
    idx: Tensor,
    layer: Layer,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    degrees: Tensor,
    centre: Tensor,
    edges: Tensor,
) -> tuple[Tensor, Tensor, EdgeNorm, Tensor | None, Tensor | None]:
    """x centred, [A | D]'s halves above one another (2 C_out, C_in), the norm, and where the batch makes the
    statistics, each node's sum of its neighbours and the moments. `centre` (B, C_in) is filled."""
    (batch, _, c_in), c_out = x.shape, layer.weight.shape[0]
    leaves.centre(x, degrees, centre)
    centred = torch.empty_like(x)
    leaves.subtract(x, centre, degrees, centred)
    sums = moments = None
    if training:
        sums = torch.empty_like(x)
        leaves.neighbor_sum(centred, idx, sums)
        moments = edge_moments(leaves, centred, sums, degrees)
    halves, norm = x.new_empty((2 * c_out, c_in)), norm_outputs(x, batch, c_out)
    with running_statistics(layer.gamma, running_mean, running_var) as running:
        leaves.norm(moments, *layer, *running, centre, edges, momentum, eps, halves, *norm)
    return centred, halves, norm, sums, moments


def affine(leaves: ModuleType, layer: Layer, offset: Tensor, rstd: Tensor) -> EdgeNorm:
    """The norm again, from what was kept of it."""
    scale, shift = layer.weight.new_empty(rstd.shape), layer.weight.new_empty(offset.shape)
    leaves.affine(layer.gamma, layer.beta, layer.signs, rstd, offset, scale, shift)
    return EdgeNorm(offset, rstd, scale, shift)


class NormGradients(NamedTuple):
    """Of z's gradient dz over the edges: its sums, those of the affine parameters, and what the batch's statistics take
    from every edge: scale (mean_term + slope_term h'), None where they are not the batch's."""

    sum: Tensor  # (B, C_out) float64: of dz
    gamma: Tensor  # (C_out), or empty
    beta: Tensor
    mean_term: Tensor | None  # (B, C_out) float64
    slope_term: Tensor | None  # (C_out) float64


def norm_gradients(
    leaves: ModuleType, partial: Tensor, layer: Layer, norm: EdgeNorm, edges: Tensor, training: bool
) -> NormGradients:
    """From partial (2, B, parts, C_out) float64: sums of dz, and of dz h', over the edges of parts of each cloud."""
    affine = (layer.weight.new_empty(0 if layer.gamma is None else len(norm.rstd)) for _ in range(2))
    terms = torch.empty_like(norm.offset), torch.empty_like(norm.rstd)
    found = NormGradients(torch.empty_like(norm.offset), *affine, *terms)
    gradients = (found.gamma, found.beta, found.sum, *terms)
    leaves.norm_gradient(partial, layer.gamma, layer.signs, norm.offset, norm.rstd, edges, *gradients)
    return found if training else found._replace(mean_term=None, slope_term=None)


def input_gradients(
    leaves: ModuleType,
    routed: Tensor,
    centred: Tensor,
    centre: Tensor,
    graph: Graph,
    edges: Tensor,
    layer: Layer,
    norm: EdgeNorm,
    gradients: NormGradients,
    sums: Tensor | None,
    moments: Tensor | None,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, N, C_in) and of the weight (C_out, 2 C_in); empty if not needed.

    routed (B, N, 2 C_out): dz summed over the edges that lead to each node, and over its own. The gradient of h on an
    edge is scale (dz - mean_term - slope_term h'); the dense terms go through sums over nodes, `sums` and `moments`
    (see `norm_of_edges`).
    """
    (batch, n, c_in), c_out = centred.shape, layer.weight.shape[0]
    routed, terms = routed.view(-1, 2 * c_out), (gradients.mean_term, gradients.slope_term)
    training = gradients.mean_term is not None
    grad_x, grad_weight = centred.new_empty(0), centred.new_empty(0)
    if need_x:
        halves, constant, square = centred.new_empty((2 * c_out, c_in)), None, None
        if training:
            constant, square = centred.new_empty((batch, 2 * c_in)), centred.new_empty((4 * c_in, c_in))
        leaves.input_terms(
            layer.weight, layer.gamma, layer.signs, norm.rstd, *terms, halves, constant, square
        )
        grad_x = product(routed, halves, c_in)  # (B N, C_in)
        if training:
            dense = centred.new_empty((batch, n, 4 * c_in))  # d_j x_j, their neighbours' sum, P_i, k_i x_i
            k = graph.idx.shape[2]
            leaves.dense_gradient(
                centred, sums, graph.degrees, graph.start, graph.edges, k, constant, dense, grad_x
            )
            add_product(grad_x, dense.view(-1, 4 * c_in), square, c_in)
        grad_x = grad_x.view(batch, n, c_in)
    if need_weight:
        sparse = product(routed.t(), centred.view(-1, c_in), c_in)  # (2 C_out, C_in)
        grad_weight = torch.empty_like(layer.weight)
        leaves.weight_gradient(
            *(sparse, layer.weight, layer.gamma, layer.signs, norm.rstd, centre, edges, *terms, moments),
            *(gradients.sum, grad_weight),
        )
    return grad_x, grad_weight
