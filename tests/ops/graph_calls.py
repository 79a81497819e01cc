"""Calls (x, idx) for the operators that gather neighbours: the awkward shapes, and the bad ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from op_tester import Call


def make(batch=2, n=19, nodes=None, k=4, channels=7, *, missing=0.0, seed=0) -> Call:
    """A random call; `nodes` rows of idx, by default as many as points."""
    g = torch.Generator().manual_seed(seed)
    nodes = n if nodes is None else nodes
    x = torch.randn(batch, n, channels, generator=g, dtype=torch.float64)
    idx = torch.randint(0, max(n, 1), (batch, nodes, k), generator=g)
    return Call((x, torch.where(torch.rand(batch, nodes, k, generator=g) < missing, -1, idx)))


def lattice() -> Call:
    """Small integers, so that many neighbours tie exactly."""
    call = make(2, 24, k=6, channels=10, missing=0.2, seed=4)
    return Call(((2 * call.args[0]).round(), call.args[1]))


def non_finite() -> Call:
    call = make(2, 16, k=5, missing=0.2, seed=5)
    x = call.args[0]
    x[0, 3, 2], x[1, 5], x[1, 6, 0], x[1, 7, 1] = float("nan"), float("nan"), float("inf"), float("-inf")
    return call


def cases() -> dict[str, Callable[[], Call]]:
    return {
        "plain": make,
        "few": lambda: make(2, 4, 3, 3, 2, missing=0.2, seed=3),
        "sizes_off_the_vectors": lambda: make(3, 37, k=5, channels=77, seed=1),
        "fewer_nodes_than_points": lambda: make(2, 40, 9, 6, 16, seed=2),
        "more_nodes_than_points": lambda: make(2, 9, 150, 6, 16, seed=2),
        "one_channel": lambda: make(2, 30, channels=1),
        "missing": lambda: make(2, 30, k=6, missing=0.5, seed=9),
        "nothing_there": lambda: make(missing=1.0),
        "one_neighbour": lambda: make(k=1),
        "many_neighbours": lambda: make(2, 11, k=300, missing=0.3, seed=10),
        "many_clouds": lambda: make(19, 6, k=3),
        "lattice": lattice,
        "non_finite": non_finite,
        "empty_batch": lambda: make(batch=0),
        "no_points": lambda: make(n=0, nodes=3, missing=1.0),
        "no_nodes": lambda: make(nodes=0),
        "no_neighbours": lambda: make(k=0),
        "no_channels": lambda: make(channels=0),
    }


def bad_calls() -> dict[str, tuple[Callable[[], Call], type[Exception], str]]:
    def index(value: int, *places: tuple[int, int, int]) -> Callable[[], Call]:
        def build() -> Call:
            call = make()
            for place in places:
                call.args[1][place] = value
            return call

        return build

    def arguments(change_x=lambda x: x, change_idx=lambda idx: idx) -> Callable[[], Call]:
        return lambda: Call((change_x(make().args[0]), change_idx(make().args[1])))

    wrong = r"idx\[{}\] is {}, but it must be -1 \(no edge\) or in \[0, 19\)"
    return {
        "index_too_large": (index(19, (1, 3, 2), (1, 4, 0)), IndexError, wrong.format("1, 3, 2", 19)),
        "index_too_small": (index(-2, (0, 18, 3)), IndexError, wrong.format("0, 18, 3", -2)),
        "x_shape": (arguments(lambda x: x[0]), ValueError, r"x must be \(batch, points, channels\)"),
        "x_dtype": (arguments(lambda x: x.long()), TypeError, "x must be float64.*got torch.int64"),
        "idx_shape": (arguments(change_idx=lambda i: i[0]), ValueError, r"idx must be \(B, M, k\)"),
        "idx_batch": (arguments(change_idx=lambda i: i[:1]), ValueError, r"\(2, M, k\).*got shape \(1, 19, 4\)"),
        "idx_dtype": (arguments(change_idx=lambda i: i.int()), TypeError, "idx must be int64, got torch.int32"),
        "idx_device": (arguments(change_idx=lambda i: i.to("meta")), ValueError, "idx is on meta, but x is on cpu"),
    }  # fmt: skip
