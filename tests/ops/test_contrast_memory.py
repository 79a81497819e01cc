"""The contrastive losses take the memory that their docstrings say, and never that of a matrix of similarities."""

import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from crosspoint import ops
from op_tester import compiled_backends

LOSSES = ("nt_xent", "info_nce", "sup_con")
BACKENDS = compiled_backends("nt_xent")
SLACK = 1 << 20

MEMORY = """
import sys, torch
from crosspoint import ops

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

n, d, loss = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
z = [torch.randn(n, d, requires_grad=True) for _ in range(1 if loss == "sup_con" else 2)]
labels = [torch.randint(10, (n,))] if loss == "sup_con" else []
getattr(ops, loss)(*(x[:8] for x in z + labels), impl="native").backward()
for x in z:
    x.grad = None
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before = status("VmRSS")
getattr(ops, loss)(*z, *labels, impl="native").backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    ("native", "cpu") not in BACKENDS or sys.platform != "linux", reason="reads /proc, native CPU kernels"
)
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_cpu(loss):
    n, d = 16384, 32
    command = [sys.executable, "-c", MEMORY, str(n), str(d), loss]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    padded = -(-n // 96) * 96
    backward = padded * (3 * d * 4 + 128 if loss == "sup_con" else 6 * d * 4 + 64)
    assert int(done.stdout) < backward + (4 << 20), "a matrix of similarities would take 1 GB or more"


N, D = 65536, 128


def inputs(loss: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings, and labels where the loss takes them."""
    z = [torch.randn(N, D, device=device, dtype=dtype) for _ in range(1 if loss == "sup_con" else 2)]
    return z, [torch.randint(100, (N,), device=device)] if loss == "sup_con" else []


def formulas(loss: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes on a GPU: of the forward pass, of what stays of it, and of the backward pass with its gradients."""
    views, s = (1 if loss == "sup_con" else 2), dtype.itemsize
    rows = views * N * D
    kept = 2 * N * 4 + (8 * N if loss == "sup_con" else 0)
    return rows * s + 256 * N, kept, rows * s + rows * 4 + 256 * N + rows * s


ON_GPUS = [pair for pair in BACKENDS if pair[1] == "cuda"]
NONE = pytest.param(None, marks=pytest.mark.skip(reason="needs a GPU"))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


@pytest.mark.parametrize("backend", ON_GPUS or [NONE], ids="-".join if ON_GPUS else None)
@pytest.mark.parametrize("loss", LOSSES)
@dtypes
def test_on_a_gpu(backend, loss, dtype):
    z, labels = inputs(loss, dtype, "cuda")
    for x in z:
        x.requires_grad_()
    forward, _, backward = formulas(loss, dtype)
    getattr(ops, loss)(*(x[:512] for x in z + labels), impl=backend[0]).backward()
    for x in z:
        x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    def extra() -> int:
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return found

    torch.cuda.reset_peak_memory_stats()
    value = getattr(ops, loss)(*z, *labels, impl=backend[0])
    assert extra() < forward + SLACK
    value.backward()
    assert extra() < backward + SLACK


class Untouched:
    """Leaves that do nothing: they allocate nothing either."""

    def __getattr__(self, name):
        return lambda *args: None


def peak_of(run) -> tuple[object, int]:
    """The result, and the most bytes that torch held beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return result, max(accumulate(sizes, initial=0))


@pytest.mark.parametrize("loss", LOSSES)
@dtypes
def test_what_the_gpu_kernels_are_given(loss, dtype):
    """Neither Triton's nor those in CUDA C++ allocate anything: what calls them does, here on a CPU."""
    # They need crosspoint.kernels, which is not there where only the operators are tested.
    from crosspoint.ops._gpu import nt_xent as pairs
    from crosspoint.ops._gpu import sup_con as labelled

    z, labels = inputs(loss, dtype, "cpu")
    t, leaves = torch.tensor(0.1), Untouched()
    settings = () if loss == "sup_con" else (loss == "nt_xent", True)
    of = labelled if loss == "sup_con" else pairs
    forward, kept, backward = formulas(loss, dtype)
    results, most = peak_of(lambda: of.forward(leaves, *z, *labels, t, *settings, 0, N))
    assert 0.5 * forward < most < forward + SLACK
    scalars = results[1:]
    assert sum(x.nbytes for x in (*scalars, *labels)) == kept
    grad = torch.ones(())
    _, most = peak_of(lambda: of.backward(leaves, grad, *z, *labels, t, *scalars, *settings, 0, N))
    assert 0.8 * backward < most < backward + SLACK
