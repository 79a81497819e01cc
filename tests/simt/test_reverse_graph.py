"""csrc/cuda/reverse_graph.cu on the host: edges by the node that they lead to, whatever the order of threads."""

import ctypes

import numpy as np
import pytest

from knn_calls import ReverseGraph, kernels
from simt_harness import Device, builds_here


@pytest.fixture(scope="module", params=builds_here())
def device(request):
    return kernels(request.param, "reverse_graph", "radix_sort")


def reverse(device: Device, idx: np.ndarray, n: int, order: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    batch, nodes, k = idx.shape
    device.configure(*order)
    try:
        given = device.input(idx, "idx")
        start = device.output((batch, n + 1), np.int32, "start")
        edges = device.output((batch, nodes * k), np.int32, "edges")
        args = ReverseGraph(given.ctypes.data, batch, nodes, k, n, start.ctypes.data, edges.ctypes.data)
        size = device.library.reverse_graph_workspace_bytes(ctypes.byref(args))
        workspace = device.output(size, np.uint8, "workspace")
        device.call("reverse_graph", args, workspace)
        return start.copy(), edges.copy()
    finally:
        device.free()


def check(idx: np.ndarray, n: int, start: np.ndarray, edges: np.ndarray) -> None:
    for targets, begin, listed in zip(idx.reshape(len(idx), -1), start, edges, strict=True):
        for j in range(n):
            assert np.array_equal(listed[begin[j] : begin[j + 1]], np.flatnonzero(targets == j))


@pytest.mark.parametrize(
    ("batch", "nodes", "k", "n"),
    [
        (2, 30, 4, 30),
        (1, 1, 1, 1),
        (3, 20, 7, 5),
        (1, 40, 60, 300),
        (1, 700, 4, 700),
        (1, 0, 3, 4),
        (2, 1024, 3, 1024),
        (1, 20, 90, 3072),  # with fewer warps, for there are more counters
        (2, 40, 60, 3073),  # too many of them: sorted
        (1, 1, 3, 0),
    ],
)
def test_edges_come_by_target_then_in_order(device, batch, nodes, k, n):
    random = np.random.default_rng(nodes)
    idx = random.integers(-1, n, (batch, nodes, k))
    idx[:, : nodes // 3, 0] = 0  # one node that many edges lead to
    idx[:, 1:2, 0] = n + 7  # no node: it must do no harm
    for order in ((0, 1), (5, 3)):
        check(idx, n, *reverse(device, idx, n, order))


def test_launches(device):
    """One for a cloud that a block holds; four that sort; many tiles are summed first, by a launch more in each of two
    passes."""
    for nodes, n, expected in ((20, 500, 1), (20, 5000, 4), (3000, 500, 6)):
        idx = np.random.default_rng(0).integers(-1, n, (1, nodes, 90))
        before = device.counts()["launches"]
        check(idx, n, *reverse(device, idx, n, (0, 1)))
        assert device.counts()["launches"] - before == expected
