"""The filter's bound, against products that lose what tensor cores may lose: the answer must not change."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import conftest  # mends the interpreter for numpy
import numpy as np, torch, triton.language as tl
from triton.runtime.interpreter import TensorHandle
from crosspoint.kernels import knn, knn_filter
from crosspoint.ops import reference
from crosspoint.testing import assert_same_graph

bits = int(sys.argv[1])
worst = 0.0

def widened(handle):
    return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

def rough_dot(left, right):
    "Sums of 16 exact products and what came before, each cut off at 2^-bits of the largest."
    global worst
    a, b = widened(left.handle), widened(right.handle)
    total = np.zeros((a.shape[0], b.shape[1]))
    for c in range(0, a.shape[1], 16):
        terms = a[:, c : c + 16, None] * b[None, c : c + 16, :]
        terms = np.concatenate([total[:, None], terms], 1)
        largest = np.abs(terms).max(1, keepdims=True)
        unit = np.exp2(np.floor(np.log2(np.maximum(largest, 1e-300))) - bits)
        total = np.trunc(terms / unit).sum(1) * unit[:, 0]
    worst = max(worst, np.abs(total - a @ b).max())
    data = total.astype(np.float32)
    return tl.core.tensor(TensorHandle(data, tl.float32), tl.block_type(tl.float32, list(data.shape)))

knn_filter.dot = rough_dot
torch.manual_seed(0)
base = torch.randn(1, 150, 48)
clouds = {
    "normal": base,
    "far": base + 100,
    "flat": base * torch.logspace(0, -4, 48),
    "clusters": 30 * base[:, :10].repeat(1, 15, 1) + 0.01 * base,
    "near ties": 1 + 1e-4 * base,
}
for name, x in clouds.items():
    for k, include_self in ((20, True), (5, False)):
        idx = knn.knn_graph(x, k, None, include_self)
        assert_same_graph(idx, reference.knn_graph(x, k, include_self=include_self), x)
assert worst > 0, "the product was not replaced"
print("exact")
"""


def run(bits: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, str(bits)]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1] / "ops"),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_exact_though_products_lose_what_they_may():
    done = run(23)
    assert (done.returncode, done.stdout.strip()) == (0, "exact"), done.stderr


def test_larger_losses_show():
    assert "AssertionError" in run(4).stderr
