"""csrc/cuda/gather_max.cu and neighbor_sum.cu on the host: values, slots, gradients, in several orders of threads."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crosspoint.ops import reference
from simt_harness import ROOT, Device, builds_here

# (seed, resident blocks)
ORDERS = {"plain": [(0, 1), (1, 2), (2, 1)], "watch": [(0, 1), (4, 2)], "sanitized": [(1, 2)]}


def make(
    batch=2, n=19, nodes=None, k=4, channels=8, *, missing=0.0, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + k)
    x = torch.randn(batch, n, channels, generator=g).to(dtype)
    idx = torch.randint(0, max(n, 1), (batch, nodes or n, k), generator=g)
    return x, torch.where(torch.rand(idx.shape, generator=g) < missing, -1, idx)


def ties() -> tuple[Tensor, Tensor]:
    x, idx = make(2, 24, k=6, channels=12, missing=0.2)
    x = (2 * x).round()
    x[0, 3, 2], x[1, 5], x[1, 6, 0], x[1, 7, 1] = float("nan"), float("nan"), float("inf"), float("-inf")
    return x, idx


def outside() -> tuple[Tensor, Tensor]:
    """Entries that are neither -1 nor a row."""
    x, idx = make(2, 17, k=5)
    idx[0, 3], idx[1, 4, 2], idx[1, 5, 0] = 17, 1 << 40, -7
    return x, idx


CASES = {
    "plain": make(),
    "channels_off_the_vectors": make(3, 21, k=5, channels=7),
    "three_channels": make(1, 100, k=20, channels=3),
    "one_channel": make(1, 30, channels=1),
    "double": make(2, 20, k=3, channels=6, dtype=torch.float64),
    "double_off_the_vectors": make(1, 20, k=3, channels=5, dtype=torch.float64),
    "fewer_nodes": make(2, 30, 9, 6, 16),
    "more_nodes": make(2, 9, 70, 6, 4),
    "missing": make(2, 30, k=6, missing=0.5),
    "nothing_there": make(missing=1.0),
    "one_neighbour": make(k=1),
    "many_neighbours": make(1, 5, 11, 200, 4, missing=0.3),
    "no_neighbours": make(k=0),
    "no_channels": make(channels=0),
    "no_clouds": make(0),
    "ties_and_not_finite": ties(),
    "outside": outside(),
}


class Call(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("is_double", "batch", "n", "nodes", "k", "channels")],
        *[(name, ctypes.c_void_p) for name in ("rows", "idx", "start", "edges", "out", "slots")],
    ]


@pytest.fixture(scope="module", params=builds_here())
def device(request):
    cuda = ROOT / "csrc" / "cuda"
    entry = Path(__file__).with_name("gather_entry.cpp")
    return Device([entry, cuda / "gather_max.cu", cuda / "neighbor_sum.cu"], request.param)


def turned(idx: Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    """start (B, n + 1) and edges, as csrc/cuda/reverse_graph.cu gives them."""
    target = idx.flatten(1).numpy().copy()
    target[(target < 0) | (target >= n)] = n
    edges = np.argsort(target, axis=1, kind="stable").astype(np.int32)
    start = (
        np.stack([np.searchsorted(np.sort(row), np.arange(n + 1)) for row in target])
        if len(idx)
        else np.zeros((0, n + 1))
    )
    return start.astype(np.int32), edges


def run(
    device, function: str, rows: Tensor, idx: Tensor, n: int, slots: Tensor | None, order
) -> tuple[Tensor, Tensor]:
    """What `function` writes: rows (B, ., C), and slots."""
    device.configure(*order)
    (batch, nodes, k), channels = idx.shape, rows.shape[2]
    try:
        start, edges = turned(idx, n)
        shape = (batch, n if "backward" in function else nodes, channels)
        arrays = {
            "rows": device.input(rows.numpy(), "rows"),
            "idx": device.input(idx.numpy(), "idx"),
            "start": device.input(start, "start"),
            "edges": device.input(edges, "edges"),
            "out": device.output(shape, rows.numpy().dtype, "out"),
            "slots": device.output(shape, np.int32, "slots")
            if slots is None
            else device.input(slots.numpy(), "slots"),
        }
        sizes = {"is_double": rows.dtype == torch.float64, "batch": batch, "n": n, "nodes": nodes, "k": k}
        call = Call(**sizes, channels=channels, **{name: array.ctypes.data for name, array in arrays.items()})
        device.call(function, call)
        written = arrays["slots"].copy() if function == "gather_max" else np.zeros(0, np.int32)
        return torch.from_numpy(arrays["out"].copy()), torch.from_numpy(written)
    finally:
        device.free()


def run_in_every_order(device, *arguments) -> tuple[Tensor, Tensor]:
    results = [run(device, *arguments, order) for order in ORDERS[device.kind]]
    for out, slots in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(slots, results[0][1])
    return results[0]


@pytest.mark.parametrize("name", CASES)
def test_neighbor_sum(device, name):
    x, idx = CASES[name]
    n = x.shape[1]
    exact = x.double().clone().requires_grad_()
    expected = reference.neighbor_sum(exact, torch.where((idx >= 0) & (idx < n), idx, -1))
    out, _ = run_in_every_order(device, "neighbor_sum", x, idx, n, None)
    torch.testing.assert_close(out, expected.detach().to(x.dtype), equal_nan=True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    grad_x, _ = run_in_every_order(device, "neighbor_sum_backward", grad, idx, n, None)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(grad_x, expected_grad.to(x.dtype))


@pytest.mark.parametrize("name", CASES)
def test_gather_max(device, name):
    x, idx = CASES[name]
    n = x.shape[1]
    exact = x.double().clone().requires_grad_()
    expected, expected_slots = reference.gather_max(exact, torch.where((idx >= 0) & (idx < n), idx, -1))
    out, slots = run_in_every_order(device, "gather_max", x, idx, n, None)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(slots, expected_slots)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    grad_x, _ = run_in_every_order(device, "gather_max_backward", grad, idx, n, slots)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(grad_x, expected_grad.to(x.dtype))
