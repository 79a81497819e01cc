"""neighbor_sum: the battery, and the sums themselves."""

import pytest
import torch

import graph_calls
from crosspoint import ops
from crosspoint.ops import _dispatch
from graph_calls import make
from op_tester import OpTester, compiled_backends, threads, usable_backends

IMPLS = usable_backends("neighbor_sum", "cpu")


class TestNeighborSum(OpTester):
    op = "neighbor_sum"
    differentiable = (0,)
    twice_differentiable = True

    @classmethod
    def cases(cls):
        return graph_calls.cases()

    @classmethod
    def bad_calls(cls):
        return graph_calls.bad_calls()

    @classmethod
    def compile_cases(cls):
        return ["plain", "sizes_off_the_vectors"]

    @classmethod
    def gradcheck_cases(cls):
        return ("few",)

    @classmethod
    def operator_calls(cls):
        def operator(name, backend):
            return _dispatch.operator(name, backend).default

        def forward(build, dtype=torch.float32, backend="native"):
            return operator("neighbor_sum", backend), build().to(dtype).args

        def backward(build, dtype=torch.float32, backend="native"):
            run, (x, idx) = forward(build, dtype, backend)
            return operator("neighbor_sum_backward", backend), (
                torch.ones_like(run(x, idx)),
                idx,
                x.shape[1],
            )

        few = graph_calls.cases()["fewer_nodes_than_points"]
        calls = {
            "forward": lambda: forward(few),
            "forward_half": lambda: forward(make, torch.bfloat16),
            "forward_empty": lambda: forward(lambda: make(batch=0)),
            "backward": lambda: backward(few),
            "backward_half": lambda: backward(make, torch.float16),
            "backward_empty": lambda: backward(lambda: make(nodes=0)),
        }
        if ("triton", "cpu") in compiled_backends(cls.op):
            calls["forward-triton-cpu"] = lambda: forward(few, torch.bfloat16, "triton")
            calls["backward-triton-cpu"] = lambda: backward(few, backend="triton")
        return calls


@pytest.mark.parametrize("impl", IMPLS)
def test_is_a_product_with_the_adjacency_matrix(impl):
    x, idx = make(2, 13, 17, 6, 5, missing=0.3, seed=1).args
    x.requires_grad_()
    adjacency = torch.zeros(2, 17, 14, dtype=torch.float64)
    adjacency.scatter_add_(2, torch.where(idx < 0, 13, idx), torch.ones(idx.shape, dtype=torch.float64))
    expected = adjacency[:, :, :13] @ x
    actual = ops.neighbor_sum(x, idx, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    weights = torch.randn_like(actual)
    (grad,) = torch.autograd.grad(actual, x, weights)
    torch.testing.assert_close(grad, adjacency[:, :, :13].mT @ weights, rtol=0, atol=1e-13)


def test_sums_are_formed_in_double():
    x = torch.full((1, 1, 3), 0.1, requires_grad=True)
    idx = torch.zeros(1, 2, 100_000, dtype=torch.int64)
    out = ops.neighbor_sum(x, idx, impl="native")
    torch.testing.assert_close(out, torch.full((1, 2, 3), 1e5 * 0.1), rtol=2e-7, atol=0)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(out, 0.1))
    torch.testing.assert_close(grad, torch.full((1, 1, 3), 2e5 * 0.1), rtol=2e-7, atol=0)


def test_same_bits_on_any_number_of_threads_for_large_shapes():
    x, idx = make(3, 600, k=20, channels=200, seed=14).to(torch.float32).args
    results = []
    for count in (1, 2, 3):
        with threads(count):
            leaf = x.clone().requires_grad_()
            out = ops.neighbor_sum(leaf, idx, impl="native")
            results.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_equals_the_numpy_operator():
    import crosspoint.numpy as xp

    x, idx = make(2, 40, 30, 6, 8, missing=0.3, seed=3).to(torch.float32).args
    out = ops.neighbor_sum(x, idx, impl="native")
    assert torch.equal(out, torch.from_numpy(xp.neighbor_sum(x.numpy(), idx.numpy())))
