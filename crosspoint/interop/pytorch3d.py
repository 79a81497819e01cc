"""Neighbour search with the calls of `pytorch3d.ops`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosspoint.ops import knn

__all__ = ["KNN", "knn_gather", "knn_points"]


class KNN(NamedTuple):
    """What `knn_points` returns."""

    dists: Tensor
    idx: Tensor
    knn: Tensor | None


def knn_points(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    norm: int = 2,
    K: int = 1,
    version: int = -1,
    return_nn: bool = False,
    return_sorted: bool = True,
    *,
    impl: str = "auto",
) -> KNN:
    """The K nearest points of `p2` of each point of `p1`.

    Signature of `pytorch3d.ops.knn_points`. The same: distances are squared; idx and distance are 0 both past
    `lengths1` and where a cloud of `p2` has fewer than K points; gradients in `p1` and `p2`.

    Different: equal distances go by index; the result is sorted whatever `return_sorted` says; distances of
    float64 points are float64 and twice differentiable, of half types float32; bad lengths raise. Refused:
    `norm=1`, and any `version` but -1, which names a kernel of pytorch3d.

    Args:
        p1: (N, P1, D); p2: (N, P2, D), floating point.
        lengths1, lengths2: points of each cloud, (N,) integers; all of them by default.
        K: neighbours, at least 1.
        return_nn: also return the neighbours, `knn_gather(p2, idx, lengths2)`.
        impl: backend of `crosspoint.ops.knn`.

    Returns:
        dists (N, P1, K), idx (N, P1, K) int64, knn (N, P1, K, D) or None.

    Memory: as `crosspoint.ops.knn`, which holds no P1 x P2 matrix; the backward pass gathers (N, P1, K, D).
    """
    if norm != 2:
        raise ValueError(
            f"knn_points: only norm=2 is supported, got {norm}; distances are squared differences"
        )
    if version != -1:
        raise ValueError(
            f"knn_points: version={version} names a kernel of pytorch3d; leave it at -1, or choose with impl="
        )
    dist2, idx = knn(p1, p2, K, lengths_query=lengths1, lengths_points=lengths2, impl=impl)
    missing = idx < 0
    dists, idx = dist2.masked_fill(missing, 0), idx.masked_fill(missing, 0)
    return KNN(dists, idx, knn_gather(p2, idx, lengths2) if return_nn else None)


def knn_gather(x: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Rows of x by the indices that `knn_points` returned: out[n, l, k] = x[n, idx[n, l, k]].

    Signature and values of `pytorch3d.ops.knn_gather`: 0 where k >= lengths[n].

    Args:
        x: (N, M, U); idx: (N, L, K) int64 in [0, M); lengths: (N,) integers, M by default.

    Returns:
        (N, L, K, U), differentiable in x. Memory: the output; the backward pass adds one x.
    """
    if x.dim() != 3 or idx.dim() != 3 or x.shape[0] != idx.shape[0]:
        raise ValueError(
            f"knn_gather: x must be (N, M, U) and idx (N, L, K), got {tuple(x.shape)} and {tuple(idx.shape)}"
        )
    if x.shape[1] == 0:
        return x.new_zeros(*idx.shape, x.shape[2])
    out = x[torch.arange(x.shape[0], device=x.device)[:, None, None], idx]
    if lengths is None:
        lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
    short = lengths[:, None] <= torch.arange(idx.shape[2], device=x.device)  # (N, K)
    return out.masked_fill(short[:, None, :, None], 0)
