"""The CPU kernels on NumPy arrays, without torch: for data-loading workers and for code that has no torch.

The contracts are those of `crosspoint.ops`: exact neighbours by (squared distance, index), -1 where there is no
such point, clouds of different sizes by `lengths`. float16 and float32 are computed in float32, float64 in
float64; any strides. Every call releases the GIL. `threads=1` suits a data-loading worker; more threads are
started and joined within the call, which keeps the process safe to fork, and give bitwise the same result.

`CROSSPOINT_CPU=avx2|baseline` lowers the instruction set, as everywhere; `crosspoint._host.build_info()` says
what was built and what runs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosspoint import _check

try:
    from crosspoint import _host
except ImportError as error:
    raise ImportError(
        f"crosspoint.numpy needs the compiled NumPy module, which cannot be imported ({error}); with a C++17 "
        "compiler and pybind11, run `pip install --no-build-isolation .`"
    ) from error

__all__ = ["farthest_point_sampling", "knn", "knn_graph", "neighbor_sum"]


def knn_graph(
    x: ArrayLike,
    k: int,
    *,
    lengths: ArrayLike | None = None,
    include_self: bool = True,
    threads: int = 1,
) -> NDArray[np.int64]:
    """The k nearest neighbours of each point within its own cloud: `crosspoint.ops.knn_graph` on arrays.

    Args:
        x: points or features, (B, N, C), float16, float32 or float64.
        k: neighbours per point, at least 1; it may exceed N.
        lengths: valid points of each cloud, (B,), integers in [0, N]; all of them by default.
        include_self: True puts the point itself first, then the nearest others; False leaves it out.
        threads: threads to use, at least 1.

    Returns:
        idx, (B, N, k) int64, ordered by (squared distance, index); -1 where there is no such neighbour and in
        the rows past `lengths`.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.
        IndexError: a length is negative or exceeds N.
    """
    x = _points("knn_graph", "x", x)
    _count("knn_graph", "k", k)
    lengths = _lengths("knn_graph", "lengths", lengths, "x", x)
    _count("knn_graph", "threads", threads)
    return _host.knn_graph(x, k, lengths, bool(include_self), threads)


def knn(
    query: ArrayLike,
    points: ArrayLike,
    k: int,
    *,
    lengths_query: ArrayLike | None = None,
    lengths_points: ArrayLike | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """The k nearest `points` of each `query` and the squared distances: `crosspoint.ops.knn` on arrays.

    Args:
        query: (B, M, C), float16, float32 or float64.
        points: (B, N, C), of the same dtype.
        k: neighbours per query, at least 1; it may exceed N.
        lengths_query, lengths_points: valid rows of each cloud, (B,), integers in [0, M] and [0, N]; all of
            them by default.
        threads: threads to use, at least 1.

    Returns:
        dist2, (B, M, k), ascending; float64 for float64 input, else float32. +inf where there is no such
        neighbour.
        idx, (B, M, k) int64, ordered by (squared distance, index); -1 where there is no such neighbour.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.
        IndexError: a length is negative or too large.
    """
    given = np.asarray(query).dtype, np.asarray(points).dtype
    query, points = _points("knn", "query", query), _points("knn", "points", points)
    _check.same_batch(query.shape, points.shape)
    if given[0].type is not given[1].type:
        raise ValueError(f"knn: query is {given[0]}, points are {given[1]}; convert one of them")
    _count("knn", "k", k)
    lengths_query = _lengths("knn", "lengths_query", lengths_query, "query", query)
    lengths_points = _lengths("knn", "lengths_points", lengths_points, "points", points)
    _count("knn", "threads", threads)
    return _host.knn(query, points, k, lengths_query, lengths_points, threads)


def farthest_point_sampling(
    x: ArrayLike, m: int, *, lengths: ArrayLike | None = None, start: int = 0, threads: int = 1
) -> NDArray[np.int64]:
    """m points of each cloud, spread out: each next one is the farthest from those before it.

    The farthest is the point, not taken yet, whose smallest squared distance to the taken ones is largest; of
    equal ones the first. Squared differences are summed in float32 (float64 for float64 input); a NaN distance
    counts as +inf. No point is taken twice. Time is O(m N C) per cloud; threads work on different clouds.

    Args:
        x: points or features, (B, N, C), float16, float32 or float64.
        m: points to take of each cloud, at least 1; it may exceed N.
        lengths: valid points of each cloud, (B,), integers in [0, N]; all of them by default.
        start: the point that every cloud begins with.
        threads: threads to use, at least 1.

    Returns:
        idx, (B, m) int64, in the order of taking; -1 beyond the points that a cloud has.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.
        IndexError: a length is negative or exceeds N, or a cloud that is not empty has no point `start`.

    Source: Eldar et al., The Farthest Point Strategy for Progressive Image Sampling, IEEE Transactions on Image
    Processing 1997.
    """
    op = "farthest_point_sampling"
    x = _points(op, "x", x)
    _count(op, "m", m)
    lengths = _lengths(op, "lengths", lengths, "x", x)
    if isinstance(start, bool) or not isinstance(start, int | np.integer):
        raise TypeError(f"{op}: start must be an integer, got {type(start).__name__}")
    _count(op, "threads", threads)
    return _host.farthest_point_sampling(x, m, lengths, start, threads)


def neighbor_sum(x: ArrayLike, idx: ArrayLike, *, threads: int = 1) -> NDArray[np.floating]:
    """The sum of the rows of x that each node's neighbours name: out[b, i] = sum over s of x[b, idx[b, i, s]].

    Sums are formed in float64, slot after slot, and rounded once.

    Args:
        x: points or features, (B, N, C), float16, float32 or float64.
        idx: (B, M, k) int64: neighbours of M nodes, rows of the same cloud of x, or -1 for none.
        threads: threads to use, at least 1.

    Returns:
        (B, M, C), float64 for float64 input, else float32; 0 for a node without neighbours.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.
        IndexError: for an entry of idx that is neither -1 nor in [0, N).
    """
    x = _points("neighbor_sum", "x", x)
    idx = np.asarray(idx)
    if idx.dtype.type is not np.int64:
        raise TypeError(f"neighbor_sum: idx must be int64, got {idx.dtype}; use idx.astype(np.int64)")
    _check.graph_shape("neighbor_sum", idx.shape, x.shape)
    _count("neighbor_sum", "threads", threads)
    return _host.neighbor_sum(x, np.ascontiguousarray(idx, np.int64), threads)


def _points(op: str, name: str, x: ArrayLike) -> NDArray[np.floating]:
    """x as contiguous float32 or float64."""
    x = np.asarray(x)
    _check.points_shape(op, name, x.shape)
    if x.dtype.type not in (np.float16, np.float32, np.float64):
        raise TypeError(
            f"{op}: {name} must be floating point, float16, float32 or float64, got {x.dtype}; "
            "convert it with .astype(np.float32)"
        )
    return np.ascontiguousarray(x, np.float64 if x.dtype.type is np.float64 else np.float32)


def _count(op: str, name: str, value: int) -> None:
    _check.count(op, name, value, (int, np.integer))


def _lengths(
    op: str, name: str, lengths: ArrayLike | None, of: str, x: NDArray[np.floating]
) -> NDArray[np.int64] | None:
    if lengths is None:
        return None
    lengths = np.asarray(lengths)
    _check.lengths_shape(op, name, lengths.shape, of, x.shape)
    if lengths.dtype.kind not in "iu":
        raise ValueError(
            f"{op}: {name} must be integers, got {lengths.dtype}; convert it with .astype(np.int64)"
        )
    return np.ascontiguousarray(lengths, np.int64)
