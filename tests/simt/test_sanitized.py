"""Correct kernels once more, built with the address and undefined-behaviour sanitizers, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from simt_harness import sanitizer_environment


@pytest.mark.timeout(2400)  # it compiles everything once more
@pytest.mark.parametrize(
    "tests",
    [
        "test_samples.py",
        "test_knn.py",
        "test_reverse_graph.py",
        "test_gather.py",
        "test_edge_conv.py",
        "test_edge_conv2.py",
        "test_nt_xent.py",
        "test_conv_bn_act_pool.py",
    ],
)
def test_under_the_sanitizers(tests):
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-o", "timeout=800"]
    ran = subprocess.run(
        [*pytest_here, Path(__file__).with_name(tests)],
        cwd=Path(__file__).parents[2],
        env=sanitizer_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
