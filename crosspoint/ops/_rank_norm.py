"""Batch norm over the batches of several processes, for layers whose product is linear in what they are given.

A rank reduces its values to a count, a mean and a variance per channel, float64 and differentiable; of those of all
ranks follow the whole batch's. The layer then runs as in evaluation, on any backend, with these statistics taken as
given, and their derivatives reach it through gamma and beta:

    gamma (h - mean) / sqrt(var + eps) + beta = gamma' (h - mean') / sqrt(var' + eps) + beta'

with mean' = mean and var' = var constants, gamma' = gamma sqrt(var' + eps) / sqrt(var + eps) and
beta' = beta + gamma (mean' - mean) / sqrt(var + eps): the values of gamma and beta, and functions of mean and var.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crosspoint.ops._checks import compute_dtype
from crosspoint.ops._ranks import all_gather, group_size, merge_statistics
from crosspoint.ops.neighbor_sum import neighbor_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Share", "of_edges", "of_rows", "of_values", "over_ranks", "spans_ranks", "whole_batch"]


def spans_ranks(op: str, group: ProcessGroup | None) -> bool:
    """Whether there is anyone to exchange statistics with."""
    return group is not None and group_size(op, group) > 1


class Share(NamedTuple):
    """What a rank brings of the values h that a norm is about to see: count (), mean and (biased) variance (C,)."""

    count: Tensor
    mean: Tensor
    var: Tensor
    moved: Tensor | None = (
        None  # (C,): what was taken from every h on all ranks, which only the running mean shows
    )


def over_ranks(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    share: Share,
    *,
    momentum: float,
    eps: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gamma, beta, mean and variance with which a layer that takes the last two as given norms the whole batch.

    They come in the dtype that x is computed in; gamma and beta with what rounding has taken from the mean and the
    variance. Updates the running statistics as `nn.BatchNorm1d` does; an empty batch leaves them alone.
    """
    _, mean, var = whole_batch(share, running_mean, running_var, momentum=momentum, group=group)
    dtype = compute_dtype(x)
    given_mean, given_var = mean.detach().to(dtype), var.detach().to(dtype)
    scale = gamma.double() * torch.rsqrt(var + eps)
    shift = beta.double() + scale * (given_mean - mean)
    return (scale / torch.rsqrt(given_var.double() + eps)).to(dtype), shift.to(dtype), given_mean, given_var


def whole_batch(
    share: Share,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and (biased) variance of all ranks' values, by which it updates the running statistics."""
    count, mean, var = merge_statistics(share.count, share.mean, share.var, group)
    with torch.no_grad():
        step = momentum * (count > 0).to(mean.dtype)
        middle = mean if share.moved is None else mean + share.moved
        for running, value in (
            (running_mean, middle),
            (running_var, var * (count / (count - 1).clamp_min(1))),
        ):
            if running is not None:
                running.add_(step * (value - running))
    return count, mean, var


def of_edges(x: Tensor, idx: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Share]:
    """x (B, N, C_in) to call the layer on, and h = weight @ [x_j - x_i, x_i] of it over the edges of idx (B, N, k).

    From sums over nodes in input space, see docs/derivations/edge_conv.md. Nothing is kept of them for the backward
    pass, which forms them again.
    """
    exists = idx >= 0
    out_degree = exists.sum(2, dtype=torch.float64)
    in_degree = torch.zeros_like(out_degree)
    in_degree.scatter_add_(1, idx.clamp_min(0).flatten(1), exists.flatten(1).double())
    x, centre = _centred(x, (out_degree + in_degree > 0)[..., None], group)
    mean, var = _again(_edge_statistics, x, idx, weight, in_degree, out_degree)
    return x, Share(out_degree.sum(), mean, var, weight.detach().double()[:, x.shape[2] :] @ centre)


def of_rows(x: Tensor, weight: Tensor, lengths: Tensor | None, group: ProcessGroup) -> tuple[Tensor, Share]:
    """x (B, N, C_in) to call the layer on, and h = x @ weight.T of its rows within lengths (B,)."""
    valid = x.new_ones((*x.shape[:2], 1), dtype=torch.bool)
    if lengths is not None:
        valid = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
    x, centre = _centred(x, valid, group)
    mean, var = _again(_row_statistics, x, weight, valid)
    return x, Share(valid.sum(dtype=torch.float64), mean, var, weight.detach().double() @ centre)


def of_values(x: Tensor) -> Share:
    """x (B, C, ...) itself."""
    dims = [0, *range(2, x.dim())]
    count = x.numel() // max(1, x.shape[1])
    if count == 0:
        nothing = x.sum(dims, dtype=torch.float64)
        return Share(x.new_zeros((), dtype=torch.float64), nothing, nothing)
    var, mean = torch.var_mean(x.to(compute_dtype(x)), dims, correction=0)
    return Share(x.new_full((), count, dtype=torch.float64), mean.double(), var.double())


def _centred(x: Tensor, used: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """x without about the mean of all ranks' rows that are used (B, N, 1), and what was taken away, (C,) float64.

    The statistics make the layer blind to it; far from the origin, the weight's gradient would lose its digits. A few
    bits of the mean do, and keep points on a lattice there. Half types have no digits to lose.
    """
    if x.dtype != compute_dtype(x):
        return x, x.new_zeros(x.shape[2], dtype=torch.float64)
    with torch.no_grad():
        total = torch.where(used, x, 0).sum((0, 1), dtype=torch.float64)
        own = torch.cat([total, used.sum(dtype=torch.float64)[None]])[None]
        total, count = all_gather(own, group).sum(0).split([len(total), 1])
        centre = (total / count.clamp_min(1)).bfloat16().nan_to_num(0, 0, 0).double()
    return x - centre.to(x.dtype), centre


def _again(function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tuple[Tensor, ...]:
    """function(*args), of which the backward pass forms the inner values again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _edge_statistics(
    x: Tensor, idx: Tensor, weight: Tensor, in_degree: Tensor, out_degree: Tensor
) -> tuple[Tensor, Tensor]:
    x = torch.where((out_degree + in_degree > 0)[..., None], x.double(), 0)
    neighbours = neighbor_sum(x, idx).flatten(0, 1)  # of each node, sum of x_j
    into, own = ((degree[..., None] * x).flatten(0, 1) for degree in (in_degree, out_degree))
    x = x.flatten(0, 1)
    cross = neighbours.t() @ x
    gram = torch.cat([torch.cat([into.t() @ x, cross], 1), torch.cat([cross.t(), own.t() @ x], 1)])
    for_neighbour, for_own = weight.double().chunk(2, 1)
    both = torch.cat([for_neighbour, for_own - for_neighbour], 1)  # h = both @ [x_j, x_i]
    return _mean_var(gram, torch.cat([into.sum(0), own.sum(0)]), out_degree.sum(), both)


def _row_statistics(x: Tensor, weight: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.where(valid, x.double(), 0).flatten(0, 1)
    return _mean_var(x.t() @ x, x.sum(0), valid.sum(), weight.double())


def _mean_var(gram: Tensor, total: Tensor, count: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of h = weight @ v, from the sums of v v^T and of v over `count` vectors v."""
    count = count.clamp_min(1)
    middle = total / count
    var = ((weight @ (gram / count - torch.outer(middle, middle))) * weight).sum(1)
    return weight @ middle, var.clamp_min(0)
