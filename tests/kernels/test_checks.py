"""Lengths and indices that are out of range: safe by default, errors where CROSSPOINT_CHECK=1 asks for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import conftest  # mends the interpreter for numpy
import torch
from crosspoint import ops
"""
LENGTHS = """
x = torch.randn(2, 9, 3)
idx = ops.knn_graph(x, 3, lengths=torch.tensor([4, 12]), impl="triton")
assert torch.equal(idx, ops.knn_graph(x, 3, lengths=torch.tensor([4, 9]), impl="reference"))
dist2, idx = ops.knn(x, x, 3, lengths_points=torch.tensor([-5, 9]), impl="triton")
assert (idx[0] == -1).all()
"""

GRAPH = """
x = torch.randn(2, 9, 3)
idx = torch.randint(0, 9, (2, 9, 4))
idx[1, 2, 3], idx[1, 4, 0] = 9, 1 << 40
"""

INDICES = """
right = torch.where(idx < 9, idx, -1)
leaves = [x.clone().requires_grad_() for _ in range(2)]
for op in (ops.neighbor_sum, lambda *args, **impl: ops.gather_max(*args, **impl)[0]):
    for leaf, graph, impl in zip(leaves, (idx, right), ("triton", "reference")):
        leaf.grad = None
        op(leaf, graph, impl=impl).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
"""


def run(program: str, check: str) -> subprocess.CompletedProcess:
    battery = Path(__file__).parents[1] / "ops"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(battery), "CROSSPOINT_CHECK": check}
    return subprocess.run(
        [sys.executable, "-c", START + program], env=env, capture_output=True, text=True, timeout=280
    )


def test_lengths_are_clamped():
    done = run(LENGTHS, "0")
    assert done.returncode == 0, done.stderr


def test_lengths_are_checked_where_the_environment_asks():
    done = run(LENGTHS, "1")
    assert "IndexError: lengths[1] is 12: expected a number of points between 0 and 9" in done.stderr


def test_wrong_indices_are_no_edges():
    done = run(GRAPH + INDICES, "0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("neighbor_sum", "ops.neighbor_sum(x, idx, impl='triton')"),
        ("gather_max", "ops.gather_max(x, idx, impl='triton')"),
        ("edge_conv", "ops.edge_conv(x, idx, weight, None, None, training=True, impl='triton')"),
        (
            "edge_conv2",
            "ops.edge_conv2(x, idx, weight, None, None, weight[:, :5], None, None, training=True, impl='triton')",
        ),
    ],
)
def test_indices_are_checked_where_the_environment_asks(op, call):
    done = run(f"{GRAPH}weight = torch.randn(5, 6)\n{call}", "1")
    assert f"IndexError: {op}: idx[1, 2, 3] is 9, but it must be -1 (no edge) or in [0, 9)" in done.stderr
