"""Triton's kernels of k-NN and of gathering reach beyond 2^31 elements."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(what: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1] / "ops"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, Path(__file__).with_name("far_offsets.py"), what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("what", ["knn", "gather"])
def test_the_last_cloud_is_as_the_first(what):
    done = run(what)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_offset_of_32_bits_is_found():
    assert "AssertionError: narrow_kernel: p_y" in run("narrow").stderr
