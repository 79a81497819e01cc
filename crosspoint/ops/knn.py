"""Exact k-nearest-neighbour graphs and searches."""

from __future__ import annotations

from torch import Tensor

from crosspoint.ops import _dispatch, reference

__all__ = ["knn", "knn_graph"]


def knn_graph(
    x: Tensor, k: int, *, lengths: Tensor | None = None, include_self: bool = True, impl: str = "auto"
) -> Tensor:
    _dispatch.choose("knn_graph", impl, x.device)
    return reference.knn_graph(x, k, lengths=lengths, include_self=include_self)


def knn(
    query: Tensor,
    points: Tensor,
    k: int,
    *,
    lengths_query: Tensor | None = None,
    lengths_points: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    _dispatch.choose("knn", impl, query.device)
    return reference.knn(query, points, k, lengths_query=lengths_query, lengths_points=lengths_points)


_dispatch.register("knn_graph")
_dispatch.register("knn")
