"""Lengths that are out of range: safe by default, errors where CROSSPOINT_CHECK=1 asks for them."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import conftest  # mends the interpreter for numpy
import torch
from crosspoint import ops

x = torch.randn(2, 9, 3)
idx = ops.knn_graph(x, 3, lengths=torch.tensor([4, 12]), impl="triton")
assert torch.equal(idx, ops.knn_graph(x, 3, lengths=torch.tensor([4, 9]), impl="reference"))
dist2, idx = ops.knn(x, x, 3, lengths_points=torch.tensor([-5, 9]), impl="triton")
assert (idx[0] == -1).all()
"""


def run(check: str) -> subprocess.CompletedProcess:
    battery = Path(__file__).parents[1] / "ops"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(battery), "CROSSPOINT_CHECK": check}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=280
    )


def test_lengths_are_clamped():
    done = run("0")
    assert done.returncode == 0, done.stderr


def test_lengths_are_checked_where_the_environment_asks():
    done = run("1")
    assert "IndexError: lengths[1] is 12: expected a number of points between 0 and 9" in done.stderr
