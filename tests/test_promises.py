"""docs/promises.md: every test that it names exists; and the promises that no other test holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crosspoint import ops

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "promises.md"
CLASSES = [
    f"tests/ops/{path.name}::{name}"
    for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    for name in re.findall(r"^class (Test\w+)\(", path.read_text(), re.M)
]


def test_every_test_that_is_named_exists():
    named = []
    for test in re.findall(r"`((?:tests/[\w/]+\.py|Test\*)::\w+)`", PAGE.read_text()):
        name = test.removeprefix("Test*::")
        named += [test] if name == test else [f"{tester}::{name}" for tester in CLASSES]
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| (?!promise|---)", line)]
    assert len(named) > len(lines) > 20
    assert all("::test_" in line for line in lines), "a promise without a test"
    files = sorted({test.partition("::")[0] for test in named})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    collected = {line.partition("[")[0] for line in done.stdout.splitlines()}
    assert not set(named) - collected


# ---- ranges, ties, self


def native(op: str) -> bool:
    return any(row.usable for row in ops.describe_backends() if row[:3] == (op, "cpu", "native"))


@pytest.mark.skipif(not native("knn"), reason="no native kernels in this build")
def test_a_cloud_of_too_many_points_is_refused():
    points = torch.zeros(1, 2**31, 0)  # no channels, no memory
    with pytest.raises(RuntimeError, match=r"2\^31 - 1"):
        ops.knn(points[:, :1], points, 1, impl="native")


@pytest.mark.parametrize("channels", [3, 24])
def test_a_point_is_known_by_its_index(channels):
    x = torch.zeros(1, 6, channels)
    x[0, 4:] = 1  # points 0 to 3 are one place, 4 and 5 another
    for impl in ("auto", "reference"):
        assert ops.knn_graph(x, 3, impl=impl)[0].tolist() == [
            [0, 1, 2],
            [1, 0, 2],
            [2, 0, 1],
            [3, 0, 1],
            [4, 5, 0],
            [5, 4, 0],
        ]
        without = ops.knn_graph(x, 3, include_self=False, impl=impl)[0].tolist()
        assert without == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [5, 0, 1], [4, 0, 1]]


def test_a_row_is_never_its_own_negative():
    z = torch.eye(3, dtype=torch.float64)
    same = z[:1].repeat(3, 1)
    for impl in ("auto", "reference"):
        # Three equal samples: 4 negatives as close as the positive, log(5); itself would make it log(6).
        assert ops.nt_xent(same, same, 0.5, impl=impl).item() == pytest.approx(torch.tensor(5.0).log().item())
        # Three orthogonal ones: the positive at 1 / 0.5, 4 negatives at 0.
        expected = torch.log1p(4 * torch.tensor(-2.0, dtype=torch.float64).exp())
        assert ops.nt_xent(z, z, 0.5, impl=impl).item() == pytest.approx(expected.item())


# ---- memory that stays


def kept_bytes(run, inputs) -> int:
    """What autograd keeps of `run()` beside its inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    kept.pop(out.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.skipif(not native("edge_conv"), reason="no native kernels in this build")
@pytest.mark.parametrize(("training", "elements"), [(True, 3.25), (False, 1.25)])
@pytest.mark.parametrize("k", [20, 300])
def test_edge_conv_keeps_what_the_formula_says(training, elements, k):
    batch, n, c_in, c_out = 2, 200, 3, 64
    x = torch.randn(batch, n, c_in, requires_grad=True)
    idx = torch.randint(0, n, (batch, n, k))
    weight = torch.randn(c_out, 2 * c_in, requires_grad=True)
    gamma, beta, mean, var = (torch.ones(c_out) for _ in range(4))
    inputs = (x, idx, weight, gamma, beta, mean, var)

    def run():
        return ops.edge_conv(x, idx, weight, gamma, beta, mean, var, training=training, impl="native")

    m = batch * n * c_out
    slots = 0 if k <= 256 else 0.75  # a slot takes a byte, or four
    small = 8 * batch * n + 4 * batch * c_in + 8 * (batch + 1) * c_out
    assert kept_bytes(run, inputs) == pytest.approx(4 * (elements + slots) * m + small, rel=1e-3)
    with torch.no_grad():
        assert kept_bytes(run, inputs) == 0


@pytest.mark.skipif(not native("nt_xent"), reason="no native kernels in this build")
@pytest.mark.parametrize("op", [ops.nt_xent, ops.info_nce])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nt_xent_keeps_two_numbers_a_sample(op, dtype):
    z1, z2 = (torch.randn(100, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    size = z1.element_size()
    kept = kept_bytes(lambda: op(z1, z2, impl="native"), (z1, z2))
    assert kept == 2 * 100 * size + size  # and the temperature


# ---- importing

STATE = """
import os, signal, sys, logging, threading, warnings
import numpy, torch

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "random numbers": (torch.random.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
        "defaults": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": dict(os.environ),
        "logging": (list(logging.root.handlers), logging.root.level),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "running threads": threading.active_count(),
        "folder": os.getcwd(),
        "start method": torch.multiprocessing.get_start_method(allow_none=True),
    }

before = state()
for name in ("ops", "nn", "models", "data", "train", "evaluate", "testing", "cli", "interop"):
    __import__("crosspoint." + name)
after = state()
print([key for key in before if before[key] != after[key]])
"""


def test_importing_changes_no_state():
    done = subprocess.run(
        [sys.executable, "-c", STATE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
