"""edge_conv2 stores no tensor of edges by channels in either direction: peak memory against the docstring's formula."""

import subprocess
import sys

import torch

PROGRAM = """
import torch
from crosspoint import ops

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

torch.manual_seed(0)
B, N, k, c_in, c_mid, c_out = 8, 2048, 20, 16, 64, 128
x = torch.randn(B, N, c_in, requires_grad=True)
idx = torch.randint(0, N, (B, N, k))
layers = [
    torch.randn(c_mid, 2 * c_in), torch.ones(c_mid), torch.zeros(c_mid),
    torch.randn(c_out, c_mid), torch.ones(c_out), torch.zeros(c_out),
]
layers = [t.requires_grad_() for t in layers]
grad = torch.ones(B, N, c_out)
def step(b):
    out = ops.edge_conv2(x[:b], idx[:b], *layers, training=True, impl="native")
    return out, torch.autograd.grad(out, (x, *layers), grad[:b])
step(1)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = memory("VmRSS")
kept = step(B)
print(memory("VmHWM") - before)
"""


def test_peak_memory_is_what_the_docstring_says():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    B, N, k, c_in, c_mid, c_out, workers = 8, 2048, 20, 16, 64, 128, torch.get_num_threads()
    kept = 1.25 * B * N * c_out
    parts = 2  # 16 / 8
    backward = (3 + parts) * B * N * c_mid + 16 * c_mid * (2 * c_in + c_mid + c_out)
    working = workers * 2 * 96 * c_mid + max(2 * B * N * c_mid, backward)
    results = B * N * c_out + 2 * B * N * c_in  # the slice of x has a gradient of its own
    formula = 4 * (kept + working + results)
    measured = 1024 * int(done.stdout)
    assert measured < 1.25 * formula
    assert measured > 0.5 * formula  # or the test measures nothing
    assert measured < 0.5 * 4 * B * N * k * c_mid  # half of the smaller tensor of edges by channels
