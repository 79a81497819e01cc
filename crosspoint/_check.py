"""What the operators ask of their input, where it is the same on tensors and on NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["count", "graph_shape", "lengths_shape", "points_shape", "same_batch"]


def points_shape(op: str, name: str, shape: Sequence[int]) -> None:
    if len(shape) != 3:
        raise ValueError(
            f"{op}: {name} must be (batch, points, channels), got shape {tuple(shape)}; "
            "add a batch dimension with [None] if it is a single cloud"
        )


def same_batch(query: Sequence[int], points: Sequence[int]) -> None:
    if query[0] != points[0] or query[2] != points[2]:
        raise ValueError(
            "knn: query (B, M, C) and points (B, N, C) must agree in B and C, got "
            f"{tuple(query)} and {tuple(points)}"
        )


def count(op: str, name: str, value: object, integers: tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, integers):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def lengths_shape(op: str, name: str, shape: Sequence[int], of: str, of_shape: Sequence[int]) -> None:
    if len(shape) != 1 or shape[0] != of_shape[0]:
        raise ValueError(
            f"{op}: {name} must hold one number per cloud of {of}, shape ({of_shape[0]},), got shape "
            f"{tuple(shape)}"
        )


def graph_shape(op: str, idx: Sequence[int], x: Sequence[int]) -> None:
    if len(idx) != 3 or idx[0] != x[0]:
        raise ValueError(
            f"{op}: idx must be (B, M, k) = ({x[0]}, M, k), as x is {tuple(x)}; got shape {tuple(idx)}"
        )
