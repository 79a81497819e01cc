"""Offsets beyond 2^31: calls larger than this machine's memory, of which only the last cloud is touched and searched.

An offset that wraps around in 32 bits lands in zeros below its buffer (`Device.sparse`), and the answer is wrong.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import test_gather
from crosspoint.ops import reference
from crosspoint.testing import assert_same_graph
from knn_calls import PATHS, Knn, ReverseGraph, kernels, knn_workspace
from simt_harness import ROOT, Device

FAR = 1 << 31
BLOCKS = 64  # of the last cloud that run, at most
LARGEST_GRID, THREADS = 1 << 20, 256  # of grid_of in cuda/platform.h, where it is called here


def first_of_the_last(batch: int, items: int = 0):
    """The first blocks that the last cloud of a batch takes: every cloud takes as many, or so many items of threads
    that go on by strides of the largest grid."""

    def choose(blocks: int) -> range:
        first = blocks * (batch - 1) // batch
        if blocks == LARGEST_GRID:
            first = (batch - 1) * items % (blocks * THREADS) // THREADS
        return range(first, min(blocks, first + BLOCKS))

    return choose


@pytest.fixture(scope="module")
def library():
    return kernels("plain", "knn", "knn_filter", "knn_tree", "radix_sort", "reverse_graph")


@pytest.fixture
def device(library):
    library.configure()
    yield library
    library.choose_blocks(None)
    library.free()


@pytest.mark.parametrize("narrow", [False, True])
def test_an_offset_that_wraps_around_is_seen(narrow):
    device = Device([Path(__file__).with_name("samples.cu")], "plain")
    device.choose_blocks(lambda blocks: range(blocks - 1, blocks))
    try:
        rows, columns = beyond(50), 50
        x, y = device.sparse((rows, columns), np.float32), device.sparse((rows, columns), np.float32)
        x[-1] = 1 + np.arange(columns)
        device.call("sample_copy_rows", x, rows, columns, narrow, y)
        assert np.array_equal(y[-1], x[-1]) == (not narrow)
    finally:
        device.choose_blocks(None)
        device.free()


def beyond(elements: int) -> int:
    """How many clouds of so many elements have the last one beyond."""
    return FAR // elements + 2


class Far(NamedTuple):
    path: str
    points: tuple[int, int]  # N, C of a cloud
    k: int
    batch: int
    dtype: type = np.float32
    length: int | None = None  # of the last cloud
    large: tuple[str, ...] = ("points", "idx")  # what has more than 2^31 elements


CASES = {
    "general": Far("general", (40, 33), 20, beyond(40 * 20)),
    "general_double": Far("general", (40, 17), 20, beyond(40 * 17), np.float64),
    "cloud": Far("cloud", (40, 3), 20, beyond(40 * 3)),
    "cloud_of_eight_channels": Far("cloud", (40, 8), 20, beyond(40 * 8)),
    "filter": Far("filter", (40, 24), 20, beyond(40 * 20)),
    # The tree takes fewer clouds: rows of 128 neighbours, then clouds of many points.
    "tree": Far("tree", (5120, 3), 128, 4048, length=150, large=("idx",)),
    "tree_of_large_clouds": Far("tree", (1 << 23, 3), 20, 240, length=150),
}


@pytest.mark.parametrize("name", CASES)
def test_the_last_cloud_is_searched(device, name):
    far = CASES[name]
    (n, channels), length = far.points, far.length or far.points[0]
    call = Knn(
        is_double=far.dtype == np.float64,
        batch=far.batch,
        queries=n,
        candidates=n,
        channels=channels,
        k=far.k,
        self=1,
        path=PATHS.index(far.path),
    )
    arrays = {
        "points": device.sparse((far.batch, n, channels), far.dtype),
        "idx": device.sparse((far.batch, n, far.k), np.int64),
        "dist2": device.sparse((far.batch, n, far.k), far.dtype),
        "workspace": device.sparse(knn_workspace(device, call), np.uint8),
    }
    for what in far.large:
        assert arrays[what][:-1].size > FAR, what
    arrays["query"] = arrays["points"]
    # Far from the zeros that stand for what did not run.
    x = 1000 + np.random.default_rng(0).standard_normal((length, channels))
    arrays["points"][-1, :length] = x
    if far.length is not None:
        arrays["lengths_query"] = arrays["lengths_points"] = device.sparse(far.batch, np.int64)
        arrays["lengths_points"][-1] = length
    for what, array in arrays.items():
        setattr(call, what, array.ctypes.data)
    device.choose_blocks(first_of_the_last(far.batch))
    device.call("knn", call)
    cloud = torch.from_numpy(arrays["points"][-1:, :length].copy())
    found = torch.from_numpy(arrays["idx"][-1:, :length].copy())
    assert_same_graph(found, reference.knn_graph(cloud, far.k), cloud)
    nearest = (cloud[0, :, None] - cloud[0]).double().square().sum(-1).sort(1).values[:, : far.k]
    torch.testing.assert_close(
        torch.from_numpy(arrays["dist2"][-1, :length].copy()).double(), nearest, rtol=1e-3, atol=1e-6
    )


def test_the_last_of_many_queries_finds_its_neighbours(device):
    """Of another set than the points, by the tree: rows beyond 2^31 in one cloud."""
    queries, n, k, last = FAR // 128 + 64, 100, 128, 16
    call = Knn(
        batch=1, queries=queries, candidates=n, channels=3, k=k, self=0, path=PATHS.index("tree"), is_double=0
    )
    random = np.random.default_rng(1)
    arrays = {
        "points": device.input(random.standard_normal((1, n, 3)).astype(np.float32)),
        "query": device.sparse((1, queries, 3), np.float32),
        "idx": device.sparse((1, queries, k), np.int64),
        "dist2": device.sparse((1, queries, k), np.float32),
        "workspace": device.output(knn_workspace(device, call), np.uint8),
    }
    arrays["query"][0, -last:] = random.standard_normal((last, 3))
    for what, array in arrays.items():
        setattr(call, what, array.ctypes.data)
    warps = 4  # of a block, each with a query
    device.choose_blocks(
        lambda blocks: range(blocks - last // warps if blocks > queries // warps - 1 else 0, blocks)
    )
    device.call("knn", call)
    points, query = (torch.from_numpy(x.copy()) for x in (arrays["points"], arrays["query"][:, -last:]))
    dist2, idx = reference.knn(query, points, k)
    assert_same_graph(torch.from_numpy(arrays["idx"][:, -last:].copy()), idx, points, query)
    torch.testing.assert_close(torch.from_numpy(arrays["dist2"][:, -last:].copy()), dist2, rtol=1e-5, atol=0)


def test_the_last_graph_is_turned_around(device):
    nodes, k, n = 64, 32, 50
    edges, batch = nodes * k, beyond(nodes * k)
    idx = device.sparse((batch, nodes, k), np.int64)
    start = device.sparse((batch, n + 1), np.int32)
    turned = device.sparse((batch, edges), np.int32)
    args = ReverseGraph(idx.ctypes.data, batch, nodes, k, n, start.ctypes.data, turned.ctypes.data)
    size = device.library.reverse_graph_workspace_bytes(ctypes.byref(args))
    workspace = device.sparse(size, np.uint8)
    idx[-1] = np.random.default_rng(2).integers(-1, n, (nodes, k))

    device.choose_blocks(first_of_the_last(batch, edges + 1))
    device.call("reverse_graph", args, workspace)
    targets = idx[-1].ravel()
    for j in range(n):
        assert np.array_equal(turned[-1, start[-1, j] : start[-1, j + 1]], np.flatnonzero(targets == j))


@pytest.fixture(scope="module")
def gather():
    entry, cuda = Path(__file__).with_name("gather_entry.cpp"), ROOT / "csrc" / "cuda"
    return Device([entry, cuda / "gather_max.cu", cuda / "neighbor_sum.cu"], "plain")


@pytest.mark.parametrize("function", ["neighbor_sum", "gather_max"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_last_rows_are_gathered(gather, function, backward):
    """As those of a cloud alone."""
    x, idx = test_gather.make(1, 40, k=20, channels=16, missing=0.3)
    out, slots = test_gather.run(gather, function, x, idx, 40, None, (0, 1))
    if backward:
        function += "_backward"
        out, _ = test_gather.run(gather, function, x, idx, 40, slots if len(slots) else None, (0, 1))
    start, edges = test_gather.turned(idx, 40)
    given = {"rows": x.numpy(), "idx": idx.numpy(), "start": start, "edges": edges, "out": 0 * out.numpy()}
    given["slots"] = slots.numpy() if backward and len(slots) else np.zeros(out.shape, np.int32)
    batch = beyond(out[0].numel())
    try:
        far = {name: gather.sparse((batch, *x.shape[1:]), x.dtype, name) for name, x in given.items()}
        for name, values in given.items():
            far[name][-1] = values[0]
        call = test_gather.Call(
            0, batch, 40, 40, 20, 16, **{name: array.ctypes.data for name, array in far.items()}
        )
        gather.configure()
        gather.choose_blocks(first_of_the_last(batch, out[0].numel() // 4))
        gather.call(function, call)
        assert np.array_equal(far["out"][-1], out[0].numpy())
        if function == "gather_max":
            assert np.array_equal(far["slots"][-1], slots[0].numpy())
    finally:
        gather.choose_blocks(None)
        gather.free()
