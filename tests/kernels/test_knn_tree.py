"""The search of large clouds, interpreted, on small ones that it would not be chosen for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import conftest  # mends the interpreter for numpy
import torch, triton.language as tl
from crosspoint.kernels import knn, knn_tree
from crosspoint.ops import reference
from crosspoint.testing import assert_same_graph

knn_tree.LEAST = 0
opened = 0
distances = knn_tree._distances

def counted(*args):
    global opened
    opened += args[5].shape == [knn_tree.FAN.value]
    return distances(*args)

knn_tree._distances = counted

def fan(n):
    "Smaller leaves, groups and regions: small clouds have several of each."
    knn_tree.FAN, knn_tree.GROUP, knn_tree.REGION = (tl.constexpr(n**i) for i in (1, 2, 3))

def cloud(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

def graph(x, k, include_self=True, lengths=None, exact=False):
    lengths = None if lengths is None else torch.tensor(lengths)
    idx = knn.knn_graph(x, k, lengths, include_self)
    expected = reference.knn_graph(x, k, lengths=lengths, include_self=include_self)
    if exact:
        assert torch.equal(idx, expected)
    else:
        assert_same_graph(idx, expected, x)

def two_sets(query, points, k, lengths_query=None, lengths_points=None):
    lengths = [None if n is None else torch.tensor(n) for n in (lengths_query, lengths_points)]
    dist2, idx = knn.knn(query, points, k, *lengths)
    right, expected = reference.knn(query, points, k, lengths_query=lengths[0], lengths_points=lengths[1])
    assert_same_graph(idx, expected, points, query)
    torch.testing.assert_close(dist2, right, rtol=1e-6, atol=0)

"""
CASES = {
    # 40 leaves: more than a group, and every bit of a word.
    "whole_leaves": "graph(cloud(1, 1280, 3).sort(1).values, 16, include_self=False)",
    "levels": """
fan(4)
knn_tree.rows_of_block = lambda rows: 16
graph(cloud(1, 200, 1), 6)
assert 50 <= opened < 0.25 * 50 * 13, f"{opened} leaves were opened by 13 programs"
""",
    "ragged": """
fan(8)
graph(cloud(4, 70, 3), 10, lengths=[70, 33, 1, 0])
graph(cloud(2, 66, 2), 7, include_self=False, lengths=[-3, 99])
""",
    "sets": """
fan(4)
two_sets(cloud(2, 70, 3), cloud(2, 150, 3), 5, [70, 9], [150, 40])
two_sets(cloud(1, 3, 3), cloud(1, 6, 3), 9)
two_sets(cloud(1, 3, 1), cloud(1, 90, 1), 40)
""",
    "duplicates": """
fan(8)
for unique in (1, 3):
    x = cloud(1, unique, 3)[:, torch.randint(0, unique, (190,), generator=torch.Generator().manual_seed(0))]
    graph(x, 20, exact=True)
graph(x, 12, include_self=False, exact=True)
""",
    "overfull": """
knn_tree.TREE = (knn_tree.Tree(20, 4, 32, 32, 32, 255),)
fan(4)
x = cloud(1, 120, 3)
x[:, 60:] *= 1e-3
graph(x, 20)
two_sets(x[:, ::9], x, 20)
""",
    "shapes": """
fan(8)
graph(cloud(1, 120, 3).mul(2).round() + 4096, 20, exact=True)
graph(1000 * cloud(1, 5, 3).repeat_interleave(24, 1) + 1e-3 * cloud(1, 120, 3), 20)
graph(cloud(1, 120, 3) * torch.tensor([1, 0, 1e-4]) + torch.tensor([0, 7, 0]), 20)
""",
    "extremes": """
fan(8)
graph(cloud(1, 64, 3) * 1e30, 12, exact=True)
graph(cloud(1, 64, 3) * 1e-30, 12, exact=True)
x = cloud(1, 64, 3)
x[0, 3, 0], x[0, 8], x[0, 20, 1], x[0, 21, 1], x[0, 22, 2] = (float(v) for v in ("nan", "nan", "inf", "inf", "-inf"))
graph(x, 62, include_self=False)
graph(x, 9)
two_sets(x[:, ::2], x, 62)
""",
    "every_k": """
fan(8)
graph(cloud(1, 64, 3), 1)
graph(cloud(1, 64, 3), 1, include_self=False)
graph(cloud(1, 100, 3), 40)
graph(cloud(1, 180, 3), 128, include_self=False)
""",
}


@pytest.mark.parametrize("case", CASES)
def test_exact(case):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1] / "ops"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PROGRAM + CASES[case]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_size_of_a_cloud_compiles_anything_anew():
    """Of all kernels of k-NN: sizes are no constants, and no kernel depends on what divides them."""
    import knn_variants

    for variant in knn_variants.variants():
        sizes = {parameter for parameter in variant.kernel.params if parameter.name in ("M", "N", "n_block")}
        assert sizes, variant.name
        assert all(parameter.do_not_specialize and not parameter.is_constexpr for parameter in sizes), (
            variant.name
        )
