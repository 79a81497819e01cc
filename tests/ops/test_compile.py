"""torch.compile with its default backend, in a fresh process, on a step that uses every operator."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
from crosspoint import ops

def step(x, weight, gamma, beta, mean, var):
    idx = ops.knn_graph(x, 5)
    y = ops.edge_conv(x, idx, weight, gamma, beta, mean, var, training=True)
    dist2, _ = ops.knn(x, x, 3)
    z1, z2 = y.mean(1), y.amax(1)
    return ops.nt_xent(z1, z2) + ops.info_nce(z1, z1, 0.2) + dist2.mean()

def run(function, n):
    torch.manual_seed(n)
    x = torch.randn(3, n, 3, requires_grad=True)
    weight = torch.randn(8, 6, requires_grad=True)
    gamma, beta = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    mean, var = torch.zeros(8), torch.ones(8)
    loss = function(x, weight, gamma, beta, mean, var)
    loss.backward()
    return [loss.detach(), x.grad, weight.grad, gamma.grad, beta.grad, mean, var]

dynamic = sys.argv[1] == "dynamic"
compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
for n in (20, 33) if dynamic else (20,):
    for a, b in zip(run(compiled, n), run(step, n), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_step_compiles_as_one_graph(sizes):
    done = subprocess.run([sys.executable, "-c", PROGRAM, sizes], capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout.strip()) == (0, "equal"), done.stderr
