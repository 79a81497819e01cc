"""csrc/cuda/reverse_graph.cu on the host: edges by the node that they lead to, whatever the order of threads."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from simt_harness import ROOT, Device, builds_here


class Args(ctypes.Structure):
    _fields_ = [
        ("idx", ctypes.c_void_p),
        *[(n, ctypes.c_int64) for n in ("batch", "nodes", "k", "n")],
        ("start", ctypes.c_void_p),
        ("edges", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module", params=builds_here())
def device(request):
    cuda = ROOT / "csrc" / "cuda"
    sources = [Path(__file__).with_name("reverse_graph_entry.cpp"), cuda / "reverse_graph.cu"]
    device = Device([*sources, cuda / "radix_sort.cu"], request.param)
    device.library.reverse_graph_workspace_bytes.restype = ctypes.c_int64
    return device


def reverse(device: Device, idx: np.ndarray, n: int, order: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    batch, nodes, k = idx.shape
    device.configure(*order)
    try:
        given = device.input(idx, "idx")
        start = device.output((batch, n + 1), np.int32, "start")
        edges = device.output((batch, nodes * k), np.int32, "edges")
        args = Args(given.ctypes.data, batch, nodes, k, n, start.ctypes.data, edges.ctypes.data)
        size = device.library.reverse_graph_workspace_bytes(ctypes.byref(args))
        workspace = device.output(size, np.uint8, "workspace")
        device.call("reverse_graph", args, workspace)
        return start.copy(), edges.copy()
    finally:
        device.free()


@pytest.mark.parametrize(
    ("batch", "nodes", "k", "n"),
    [(2, 30, 4, 30), (1, 1, 1, 1), (3, 20, 7, 5), (1, 40, 60, 300), (1, 700, 4, 700), (1, 0, 3, 4)],
)
def test_edges_come_by_target_then_in_order(device, batch, nodes, k, n):
    random = np.random.default_rng(nodes)
    idx = random.integers(-1, n, (batch, nodes, k))
    idx[:, : nodes // 3, 0] = 0  # one node that many edges lead to
    idx[:, 1:2, 0] = n + 7  # no node: it must do no harm
    results = [reverse(device, idx, n, order) for order in ((0, 1), (5, 3))]
    for b in range(batch):
        targets = idx[b].ravel()
        for start, edges in results:
            for j in range(n):
                expected = np.flatnonzero(targets == j)
                assert np.array_equal(edges[b, start[b, j] : start[b, j + 1]], expected)
