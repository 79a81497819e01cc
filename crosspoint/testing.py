"""Comparing operators: how close values must be, and when two neighbour graphs count as the same.

Neighbours are ordered by (squared distance, index). Distances are sums of squared differences in float32
(float64 for float64 input), and the order of summation is each backend's own, so two backends can disagree
where distances differ by no more than their rounding. The rule, here and nowhere else:

* *Exact ties* go by index on every backend: points with the same coordinates, and distances that every order
  of summation computes without rounding (lattices, small integers).
* Otherwise two neighbours may be *exchanged* (come in another order, or one instead of the other) only where
  their float64 distances differ by less than (C + 2) 2^-23 of the larger one, (C + 2) 2^-52 for float64
  input.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "assert_same_graph", "tie_tolerance"]

# Largest error of a value, relative to the largest value of its tensor, by the dtype of the input.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def tie_tolerance(channels: int, dtype: torch.dtype) -> float:
    """How far apart, relative to the larger, squared distances may be that backends order differently."""
    return (channels + 2) * (2.0**-52 if dtype == torch.float64 else 2.0**-23)


def assert_same_graph(actual: Tensor, expected: Tensor, points: Tensor, query: Tensor | None = None) -> None:
    """Assert that two neighbour graphs are equal up to the ties that backends may break differently.

    Args:
        actual, expected: neighbours of each query, (B, M, k) int64, -1 where there is none.
        points: what they index, (B, N, C), in the dtype that the operator was called with.
        query: (B, M, C); by default the points themselves, as in `knn_graph`: a point in its own row is then
            known by its index and must be in the same place in both.

    Raises:
        AssertionError: names the first row in which they differ and the two neighbours.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"graphs of {actual.dtype} {tuple(actual.shape)} and {expected.dtype} {tuple(expected.shape)}"
        )
    actual, expected, points = actual.cpu(), expected.cpu(), points.detach().cpu()
    own_row = query is None
    query = points if query is None else query.detach().cpu()
    for cloud, row in (actual != expected).any(-1).nonzero().tolist():
        own = row if own_row else -1
        problem = _difference(actual[cloud, row], expected[cloud, row], query[cloud, row], points[cloud], own)
        if problem is not None:
            raise AssertionError(
                f"cloud {cloud}, row {row}: {problem}\n  actual   {actual[cloud, row].tolist()}\n"
                f"  expected {expected[cloud, row].tolist()}"
            )


def _difference(actual: Tensor, expected: Tensor, query: Tensor, points: Tensor, own: int) -> str | None:
    """Why the two rows (k,) are not the same up to ties; None if they are."""
    if not torch.equal(actual < 0, expected < 0):
        return f"{(actual >= 0).sum()} neighbours instead of {(expected >= 0).sum()}"
    actual, expected = actual[actual >= 0], expected[expected >= 0]
    for name, row in (("actual", actual), ("expected", expected)):
        if row.max() >= points.shape[0]:
            return f"{name} holds {row.max().item()}, but there are {points.shape[0]} points"
        if row.unique().numel() != row.numel():
            return f"{name} holds a neighbour twice"
    if not torch.equal(actual == own, expected == own):
        return "the point itself is not in the same place"

    every = torch.cat([actual, expected]).unique()
    place = torch.stack([_places(every, row) for row in (actual, expected)])  # (2, n); k where absent
    order = (place[:, :, None] - place[:, None, :]).sign()  # -1: the row puts the first before the second
    exchanged = (order[0] * order[1] < 0).nonzero().tolist()
    if not exchanged:
        return None
    dist2, exact = _distances(query, points[every])
    tolerance = tie_tolerance(points.shape[1], points.dtype)
    for i, j in exchanged:
        a, b = dist2[i].item(), dist2[j].item()
        pair = f"{every[i].item()} and {every[j].item()} are exchanged"
        if torch.equal(points[every[i]], points[every[j]]):
            return f"{pair}, but they are the same point, which goes by index"
        if exact[i] and exact[j] and a == b:
            return f"{pair}, but their distances are exactly {a}, and ties go by index"
        if not abs(a - b) < tolerance * max(a, b):
            return f"{pair}, at squared distances {a!r} and {b!r}"
    return None


def _places(every: Tensor, row: Tensor) -> Tensor:
    """Where each of `every` stands in the row; row.numel() where it does not."""
    match = every[:, None] == row
    return torch.where(match.any(1), match.to(torch.uint8).argmax(1), row.numel())


def _distances(query: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """float64 squared distances (n,), and which of them every order of summation computes without rounding.

    A distance that is NaN, or overflows the dtype that the operator computes in, is +inf, exactly.
    """
    double = points.dtype == torch.float64
    compute = torch.float64 if double else torch.float32
    p, q = points.double(), query.double()
    difference = q - p
    # What the subtraction lost (zero when it is exact), by the error-free transformation of a sum.
    part = difference - q
    lost = (q - (difference - part)) - (p + part)
    squares = difference.square()
    dist2 = squares.sum(-1)
    overflow = ~(dist2 <= torch.finfo(compute).max)
    # Squares of differences of 24 bits that are all multiples of the last place of their sum.
    unit = torch.exp2(torch.frexp(dist2).exponent.double() - (53 if double else 24))
    whole = (squares / unit[:, None]).frac() == 0
    exact = ((lost == 0) & (difference.float() == difference) & (whole | (squares == 0))).all(-1)
    return dist2.masked_fill(overflow, torch.inf), exact | overflow
