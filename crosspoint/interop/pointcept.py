"""Neighbour queries with the calls of Pointcept's pointops (`libs/pointops/functions/query.py` there)."""

from __future__ import annotations

import torch
from torch import Tensor

from crosspoint.interop._packed import packed_knn, sizes_of

__all__ = ["knn_query"]

_FAR = 1e5  # the distance that pointops gives where there is no neighbour: the root of 1e10


def knn_query(
    nsample: int,
    xyz: Tensor,
    offset: Tensor,
    new_xyz: Tensor | None = None,
    new_offset: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The `nsample` nearest rows of `xyz` of each row of `new_xyz`, within the same cloud.

    Signature of `pointops.knn_query` (Pointcept). The same: offsets are cumulative (the first is the size of
    the first cloud, the last is n), indices count in the whole of `xyz`, distances are roots, nearest first;
    a cloud with fewer points than `nsample` leaves -1 and 1e5. No gradient passes, as there.

    Different: any device, float64 and half types too, any number of channels and any `nsample` (there
    float32, CUDA, 3 and at most 128); equal distances go by index; points at 1e5 and more are neighbours like
    others; `new_xyz` without `new_offset`, or the other way round, is an error instead of being dropped.

    Args:
        nsample: neighbours per query, at least 1.
        xyz: (n, C), floating point.
        offset: (B,) integers.
        new_xyz: (m, C) of xyz's dtype, and new_offset: (B,); the points themselves by default.
        impl: backend of `crosspoint.ops.knn`.

    Returns:
        idx, (m, nsample) int32, and distances, (m, nsample) float32 (float64 for float64 input).

    Memory: the outputs and int64 indices, and under twice the clouds of like sizes; no m x n matrix.
    """
    if (new_xyz is None) != (new_offset is None):
        raise ValueError(
            "knn_query: new_xyz and new_offset go together; pointops would search from xyz itself if one of "
            "them is missing, so pass both or none"
        )
    sizes = _sizes(xyz, offset, "xyz", "offset")
    if new_xyz is None:
        new_xyz, new_sizes = xyz, sizes
    else:
        new_sizes = _sizes(new_xyz, new_offset, "new_xyz", "new_offset")
    if len(sizes) != len(new_sizes):
        raise ValueError(
            f"knn_query: offset names {len(sizes)} clouds, but new_offset names {len(new_sizes)}; each query "
            "is answered from its own cloud"
        )
    if nsample < 1:
        raise ValueError(f"knn_query: nsample must be at least 1, got {nsample}")
    dist2, idx = packed_knn(new_xyz, xyz, nsample, new_sizes, sizes, impl=impl)
    return idx.int(), dist2.sqrt().masked_fill(idx < 0, _FAR)


def _sizes(points: Tensor, offset: Tensor, name: str, offset_name: str) -> list[int]:
    if points.dim() != 2:
        raise ValueError(f"knn_query: {name} must be (n, C), got shape {tuple(points.shape)}")
    if offset.dim() != 1 or offset.is_floating_point() or offset.dtype == torch.bool:
        raise ValueError(
            f"knn_query: {offset_name} must be (B,) integers, got {tuple(offset.shape)} {offset.dtype}"
        )
    return sizes_of(offset.tolist(), points.shape[0], f"knn_query: {offset_name}", name)
