"""Every operator in plain PyTorch: the definitions that all other backends are compared with.

They run on any device and in any floating dtype, and autograd differentiates them. Half types are computed
in float32. They are written to be read; memory and speed come second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosspoint.ops._ranks import merge_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "edge_conv",
    "edge_conv2",
    "gather_max",
    "info_nce",
    "knn",
    "knn_graph",
    "neighbor_sum",
    "nt_xent",
    "sup_con",
]

_PAIRS_AT_ONCE = 1 << 22  # bounds the distance block that is held at a time


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _squared_distances(query: Tensor, points: Tensor) -> Tensor:
    """(B, M, C), (B, N, C) -> (B, M, N): squared differences, summed over channels; NaN becomes +inf."""
    dist2 = query.new_zeros(query.shape[0], query.shape[1], points.shape[1])
    for c in range(query.shape[2]):
        dist2 = dist2 + (query[:, :, None, c] - points[:, None, :, c]).square()
    return dist2.masked_fill(dist2.isnan(), torch.inf)


def _nearest(
    query: Tensor, points: Tensor, k: int, lengths: Tensor | None, *, diagonal: float | None
) -> tuple[Tensor, Tensor]:
    """The k nearest points of each query by (distance, index), as (dist2, idx); -1 and +inf where there is none.

    `diagonal` replaces the distance of a point to itself: -1 puts it first, NaN leaves it out.
    """
    batch, n_query, n_points = query.shape[0], query.shape[1], points.shape[1]
    column = torch.arange(n_points, device=points.device)
    valid = column.expand(batch, 1, n_points)
    valid = valid >= 0 if lengths is None else valid < lengths.view(batch, 1, 1)
    dist2 = query.new_full((batch, n_query, k), torch.inf)
    idx = torch.full((batch, n_query, k), -1, dtype=torch.int64, device=query.device)
    kept = min(k, n_points)
    step = max(1, _PAIRS_AT_ONCE // max(1, batch * n_points))
    for start in range(0, n_query, step):
        block = _squared_distances(query[:, start : start + step], points)
        exists = valid.expand_as(block)
        if diagonal is not None:
            own = column == torch.arange(start, start + block.shape[1], device=points.device)[:, None]
            if diagonal == diagonal:
                block = block.masked_fill(own, diagonal)
            else:
                exists = exists & ~own
        # The missing sort after +inf: they are given a second key by moving them behind the rest first.
        order = (~exists).to(torch.uint8).sort(dim=-1, stable=True).indices
        moved = block.masked_fill(~exists, torch.inf).gather(-1, order)
        value, place = moved.sort(dim=-1, stable=True)
        found = order.gather(-1, place)[..., :kept]
        there = exists.gather(-1, found)
        rows = slice(start, start + block.shape[1])
        dist2[:, rows, :kept] = value[..., :kept].masked_fill(~there, torch.inf)
        idx[:, rows, :kept] = found.masked_fill(~there, -1)
    return dist2, idx


@torch.no_grad()
def knn_graph(x: Tensor, k: int, *, lengths: Tensor | None = None, include_self: bool = True) -> Tensor:
    x = _widen(x)
    _, idx = _nearest(x, x, k, lengths, diagonal=-1.0 if include_self else float("nan"))
    if lengths is not None:
        past = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        idx = idx.masked_fill(past[:, :, None], -1)
    return idx


def knn(
    query: Tensor,
    points: Tensor,
    k: int,
    *,
    lengths_query: Tensor | None = None,
    lengths_points: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    query, points = _widen(query), _widen(points)
    with torch.no_grad():
        dist2, idx = _nearest(query, points, k, lengths_points, diagonal=None)
        if lengths_query is not None:
            past = (torch.arange(query.shape[1], device=query.device) >= lengths_query[:, None])[:, :, None]
            dist2, idx = dist2.masked_fill(past, torch.inf), idx.masked_fill(past, -1)
    finite = dist2.isfinite()
    batch = torch.arange(query.shape[0], device=query.device)[:, None, None]
    if points.shape[1] == 0:
        return dist2 + 0 * (query.sum() + points.sum()), idx
    neighbours = points[batch, idx.clamp_min(0)]  # (B, M, k, C)
    difference = torch.where(finite[..., None], query[:, :, None] - neighbours, 0)
    return torch.where(finite, difference.square().sum(-1), dist2), idx


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
    group: ProcessGroup | None = None,
) -> Tensor:
    dtype = x.dtype
    x, weight = _widen(x), _widen(weight)
    edges, valid = _edges(x, idx)
    h = edges @ weight.t()  # (B, N, k, C_out)
    if gamma is not None and beta is not None:
        h = masked_batch_norm(
            h, valid, gamma, beta, running_mean, running_var, training, momentum, eps, group
        )
    if h.numel() == 0:
        return h.sum().to(dtype).expand(*idx.shape[:2], weight.shape[0]).clone()
    return _first_largest(F.leaky_relu(h, negative_slope), valid, 2)[0].to(dtype)


def edge_conv2(
    x: Tensor,
    idx: Tensor,
    weight1: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    weight2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    running_mean1: Tensor | None = None,
    running_var1: Tensor | None = None,
    running_mean2: Tensor | None = None,
    running_var2: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
    group: ProcessGroup | None = None,
) -> Tensor:
    dtype = x.dtype
    x, weight1, weight2 = _widen(x), _widen(weight1), _widen(weight2)
    h, valid = _edges(x, idx)
    for weight, gamma, beta, running_mean, running_var in (
        (weight1, gamma1, beta1, running_mean1, running_var1),
        (weight2, gamma2, beta2, running_mean2, running_var2),
    ):
        h = torch.where(valid, h, 0) @ weight.t()  # (B, N, k, C_mid), then C_out
        if gamma is not None and beta is not None:
            h = masked_batch_norm(
                h, valid, gamma, beta, running_mean, running_var, training, momentum, eps, group
            )
        h = F.leaky_relu(h, negative_slope)
    if h.numel() == 0:
        return h.sum().to(dtype).expand(*idx.shape[:2], weight2.shape[0]).clone()
    return _first_largest(h, valid, 2)[0].to(dtype)


def _first_largest(h: Tensor, valid: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum over `dim` of h (..., C) where valid (..., 1), a NaN being one, and the first place that holds it.

    0 and -1 where nothing is valid.
    """
    size = h.shape[dim]
    h = h.masked_fill(~valid, -torch.inf)
    largest = (h == h.amax(dim, keepdim=True)) | h.isnan()
    places = torch.arange(size, device=h.device)[:, None].expand_as(h)
    place = places.masked_fill(~(largest & valid), size).amin(dim, keepdim=True).clamp_max(size - 1)
    exists = valid.any(dim)
    out, place = h.gather(dim, place).squeeze(dim), place.squeeze(dim)
    return torch.where(exists, out, 0), torch.where(exists, place, -1)


def _neighbours(x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x (B, N, C) that idx (B, M, k) names, (B, M, k, C), and which of them exist, (B, M, k, 1)."""
    cloud = torch.arange(len(x), device=x.device)[:, None, None]
    return x[cloud, idx.clamp_min(0)], (idx >= 0)[..., None]


def _edges(x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """[x_j - x_i, x_i] of every edge, (B, N, k, 2 C), 0 where there is none, and which exist, (B, N, k, 1)."""
    neighbour, valid = _neighbours(x, idx)
    centre = x[:, :, None].expand_as(neighbour)
    return torch.where(valid, torch.cat([neighbour - centre, centre], dim=-1), 0), valid


def gather_max(x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*idx.shape[:2], x.shape[2])
    if x.numel() == 0 or idx.numel() == 0:
        return x[:0].sum().expand(shape).clone(), x.new_full(shape, -1, dtype=torch.int32)
    values, slots = _first_largest(*_neighbours(x, idx), 2)
    return values, slots.int()


def neighbor_sum(x: Tensor, idx: Tensor) -> Tensor:
    if x.numel() == 0 or idx.numel() == 0:
        return x[:0].sum().expand(*idx.shape[:2], x.shape[2]).clone()
    rows, valid = _neighbours(_widen(x), idx)
    return torch.where(valid, rows, 0).sum(2).to(x.dtype)


def masked_batch_norm(
    h: Tensor,
    valid: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Batch norm of h (..., C) over the entries that are valid (..., 1), of all ranks of a group of several; updates
    the running statistics."""
    if training:
        dims = tuple(range(h.dim() - 1))
        count = valid.sum().to(h.dtype)
        mean = torch.where(valid, h, 0).sum(dims) / count.clamp_min(1)
        var = torch.where(valid, h - mean, 0).square().sum(dims) / count.clamp_min(1)
        if group is not None:
            count, mean, var = merge_statistics(count, mean, var, group)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                step = momentum * (count > 0).to(count.dtype)
                unbiased = var * (count / (count - 1).clamp_min(1))
                running_mean.add_(step * (mean - running_mean))
                running_var.add_(step * (unbiased - running_var))
    else:
        mean, var = _widen(running_mean), _widen(running_var)
    return (h - mean) * torch.rsqrt(var + eps) * _widen(gamma) + _widen(beta)


def conv_bn_act_pool(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
    group: ProcessGroup | None = None,
) -> Tensor:
    dtype = x.dtype
    x, weight = _widen(x), _widen(weight)
    batch, n, _ = x.shape
    if lengths is None:
        lengths = torch.full((batch,), n, device=x.device)
    valid = (torch.arange(n, device=x.device) < lengths[:, None])[..., None]  # (B, N, 1)
    h = torch.where(valid, x, 0) @ weight.t()  # (B, N, C_out)
    h = masked_batch_norm(h, valid, gamma, beta, running_mean, running_var, training, momentum, eps, group)
    h = F.leaky_relu(h, negative_slope)
    if h.numel() == 0:
        return h.sum().to(dtype).expand(batch, 2 * weight.shape[0]).clone()
    mean = torch.where(valid, h, 0).sum(1) / lengths[:, None].clamp_min(1)
    largest, _ = _first_largest(h, valid, 1)
    return torch.cat([largest, mean], 1).to(dtype)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    n = z1.shape[0]
    z = F.normalize(_widen(torch.cat([z1, z2])), dim=1)
    if n < 2:
        return (z.sum() / temperature).mul(0)
    similarity = z @ z.t() / temperature  # (2N, 2N)
    own = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    positive = own.roll(n, 0)
    return _contrast(similarity, positive, negatives=~(own | positive))


def info_nce(z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1, *, symmetric: bool = True) -> Tensor:
    n = z1.shape[0]
    z1, z2 = F.normalize(_widen(z1), dim=1), F.normalize(_widen(z2), dim=1)
    if n < 2:
        return ((z1.sum() + z2.sum()) / temperature).mul(0)
    similarity = z1 @ z2.t() / temperature  # (N, N)
    positive = torch.eye(n, dtype=torch.bool, device=z1.device)
    loss = _contrast(similarity, positive, negatives=~positive)
    if symmetric:
        loss = (loss + _contrast(similarity.t(), positive, negatives=~positive)) / 2
    return loss


def _contrast(similarity: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """-log softmax at the positive, with the positive kept out of the sum: exact for tiny losses too."""
    own = similarity.masked_fill(~positive, 0).sum(1)
    others = similarity.masked_fill(~negatives, -torch.inf).logsumexp(1)
    # Beyond 50, softplus is linear to the last digit of float64.
    return F.softplus(others - own, threshold=50).mean()


def sup_con(z: Tensor, labels: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    n = z.shape[0]
    z = F.normalize(_widen(z), dim=1)
    if n < 2:
        return (z.sum() / temperature).mul(0)
    similarity = z @ z.t() / temperature  # (N, N)
    own = torch.eye(n, dtype=torch.bool, device=z.device)
    same = labels[:, None] == labels
    positive = same & ~own
    count = positive.sum(1)
    counts = count > 0
    positive = positive | (own & ~counts[:, None])  # a stand-in for rows that are left out below
    # Apart, the sums over positives and negatives keep the digits of a row with one positive and a tiny loss.
    positives = similarity.masked_fill(~positive, -torch.inf).logsumexp(1)
    mean = similarity.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
    none = same.all(1)
    negatives = similarity.masked_fill(same & ~none[:, None], -torch.inf).logsumexp(1)
    push = torch.where(none, 0, F.softplus(negatives - positives, threshold=50))
    row_losses = push + (positives - mean)
    return torch.where(counts, row_losses, 0).sum() / counts.sum().clamp_min(1)
