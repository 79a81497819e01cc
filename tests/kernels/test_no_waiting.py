"""The host never waits for the device: no operator by Triton looks at a value, or at how many there are of a kind."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import torch

implementations = {}
implement = torch.library.Library.impl

def recorded(library, name, run, *key, **options):
    implementations[name] = run
    return implement(library, name, run, *key, **options)

torch.library.Library.impl = recorded

import conftest  # mends the interpreter for numpy
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from benchmarks.gpu_check import forward_backward
from benchmarks.small_calls import Small, small_calls
from crosspoint import ops
from crosspoint.kernels import knn, knn_tree

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
launched = set()

class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "crosspoint":
            with self:
                return implementations[operator._opname](*arguments, **(options or {}))
        waits = WAITS & set(operator.tags) or operator.name() in ("aten::is_nonzero", "aten::item")
        if operator.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            waits = any(i is not None and i.dtype == torch.bool for i in arguments[1])  # indices do not
        assert not waits, f"{operator} waits for the device"
        result = operator(*arguments, **(options or {}))
        return result.zero_() if "empty" in operator.name() else result  # no kernel fills it

def launch(self, *args, **options):
    launched.add(self.fn.__name__)

interpreter.GridExecutor.__call__ = launch
calls = list(small_calls("cpu", None))
x, y = torch.rand(2, 60, 3), torch.rand(2, 70, 3)
lengths = torch.tensor([60, 9])
calls += [
    Small("knn_graph", "many", [x], lambda impl, x: ops.knn_graph(x, 140, lengths=lengths, impl=impl)),
    Small("knn", "float64", [x.double(), y.double()], lambda impl, x, y: ops.knn(x, y, 3, impl=impl)),
]
if sys.argv[1:] == ["waits"]:
    widened = knn.widened
    knn.widened = lambda x: widened(x) if x.sum() > 0 else x
with NoWaiting():
    for least in (knn_tree.LEAST, 0):
        knn_tree.LEAST = least
        for small in calls:
            forward_backward(small, "triton")
for name in "direct merge sweep filter rerank tree plant sum winners".split():
    assert name + "_kernel" in launched, launched
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests" / "ops"))),
        "CROSSPOINT_CHECK": "0",
    }
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_no_operator_waits():
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]


def test_waiting_is_seen():
    assert "AssertionError: aten.is_nonzero.default waits for the device" in run("waits").stderr
