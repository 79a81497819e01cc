"""Clouds that lie one behind the other in one (N, C) tensor, their sizes on the host: neighbours within each.

Clouds whose sizes have the same number of bits are searched together, padded to the largest of them. So one
group is held padded at a time, padding less than doubles it, and there are at most log2(N) groups, however
uneven the clouds are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from crosspoint.ops import knn, knn_graph

__all__ = ["packed_knn", "packed_knn_graph", "sizes_of"]


def sizes_of(ends: Sequence[int], rows: int, name: str, of: str) -> list[int]:
    """The sizes of clouds that end before the rows `ends` and together fill `of`'s `rows`."""
    sizes = [after - before for before, after in pairwise([0, *ends])]
    if any(size < 0 for size in sizes) or sum(sizes) != rows:
        raise ValueError(
            f"{name} must not decrease and must end with the {rows} rows of {of}; got {_shortened(ends)}"
        )
    return sizes


def packed_knn_graph(x: Tensor, k: int, sizes: list[int], *, include_self: bool, impl: str) -> Tensor:
    """(N, C) -> idx (N, k): rows of x, nearest first; -1 where a cloud has no such neighbour."""
    x = x.detach()
    out = torch.full((x.shape[0], k), -1, dtype=torch.int64, device=x.device)
    for clouds in _groups(sizes):
        group = _Group(x, sizes, clouds)
        idx = knn_graph(group.points, k, lengths=group.lengths, include_self=include_self, impl=impl)
        group.write(out, group.in_rows(idx))
    return out


def packed_knn(
    query: Tensor, points: Tensor, k: int, sizes_query: list[int], sizes_points: list[int], *, impl: str
) -> tuple[Tensor, Tensor]:
    """(M, C), (N, C) -> dist2, idx (M, k): rows of points, nearest first; +inf, -1 where there is none."""
    query, points = query.detach(), points.detach()
    shape, dtype = (query.shape[0], k), torch.float64 if query.dtype == torch.float64 else torch.float32
    dist2 = torch.full(shape, torch.inf, dtype=dtype, device=query.device)
    idx = torch.full(shape, -1, dtype=torch.int64, device=query.device)
    for clouds in _groups(sizes_query, sizes_points):
        asking, asked = _Group(query, sizes_query, clouds), _Group(points, sizes_points, clouds)
        found = knn(
            asking.points,
            asked.points,
            k,
            lengths_query=asking.lengths,
            lengths_points=asked.lengths,
            impl=impl,
        )
        asking.write(dist2, found[0])
        asking.write(idx, asked.in_rows(found[1]))
    return dist2, idx


def _groups(*sizes: list[int]) -> list[list[int]]:
    """The clouds that are empty on no side, grouped by the bits of their sizes."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for cloud, counts in enumerate(zip(*sizes, strict=True)):
        if all(counts):
            groups.setdefault(tuple(count.bit_length() for count in counts), []).append(cloud)
    return list(groups.values())


class _Group:
    """Some of the clouds of x as one padded batch: `points` (B, n, C), and `lengths` where sizes differ."""

    def __init__(self, x: Tensor, sizes: list[int], clouds: list[int]):
        starts = [0, *accumulate(sizes)]
        own = [sizes[cloud] for cloud in clouds]
        self.largest = max(own)
        self.starts = torch.tensor([starts[cloud] for cloud in clouds], device=x.device)
        if min(own) == self.largest and len(clouds) == clouds[-1] - clouds[0] + 1:
            self.rows = slice(starts[clouds[0]], starts[clouds[-1] + 1])
            self.points, self.lengths = x[self.rows].view(len(clouds), self.largest, -1), None
            return
        self.lengths = torch.tensor(own, device=x.device)
        self.rows = self.starts[:, None] + torch.arange(self.largest, device=x.device)  # (B, n)
        self.points = x[self.rows.clamp_max(x.shape[0] - 1)]

    def in_rows(self, idx: Tensor) -> Tensor:
        """Neighbours that count within their clouds (B, ., k) as rows of x."""
        return torch.where(idx < 0, -1, idx + self.starts[:, None, None])

    def write(self, out: Tensor, values: Tensor) -> None:
        """Put the values (B, n, k) of these clouds into their rows of out."""
        if self.lengths is None:
            out[self.rows] = values.flatten(0, 1)
            return
        valid = torch.arange(self.largest, device=out.device) < self.lengths[:, None]
        out[self.rows[valid]] = values[valid]


def _shortened(numbers: Sequence[int]) -> str:
    return str(list(numbers)) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:8]))}, ...]"
