"""Neighbour graphs turned around: for each node, the edges that lead to it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reverse_graph"]


def reverse_graph(idx: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The edges of idx (B, M, k), named i k + s for slot s of node i, by the node in [0, n) that they lead to.

    Returns start (B, n + 1) and edges (B, M k), int32: those of node j are edges[b, start[b, j]] to
    edges[b, start[b, j + 1] - 1], ascending. An entry outside [0, n) is no edge; those come last.
    """
    target = idx.flatten(1)
    target = torch.where((target >= 0) & (target < n), target, n).int()
    target, edges = target.sort(dim=1, stable=True)
    nodes = torch.arange(n + 1, dtype=torch.int32, device=idx.device).expand(len(idx), -1).contiguous()
    return torch.searchsorted(target, nodes, out_int32=True), edges.int()
