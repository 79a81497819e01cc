"""gather_max: the battery, and what only it has: slots, ties, NaN."""

import pytest
import torch

import graph_calls
from crosspoint import ops
from crosspoint.ops import _dispatch
from graph_calls import make
from op_tester import OpTester, compiled_backends, threads, usable_backends

IMPLS = usable_backends("gather_max", "cpu")


class TestGatherMax(OpTester):
    op = "gather_max"
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
            return operator("gather_max", backend), build().to(dtype).args

        def backward(build, dtype=torch.float32, backend="native"):
            run, (x, idx) = forward(build, dtype, backend)
            values, slots = run(x, idx)
            return operator("gather_max_backward", backend), (torch.ones_like(values), idx, slots, x.shape[1])

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

    def compare(self, actual, expected, call, dtype, what):
        """A maximum is one of its inputs: nothing is rounded."""
        values, slots = actual
        assert values.dtype == dtype and slots.dtype == torch.int32
        torch.testing.assert_close(values.double(), expected[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(slots.cpu(), expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_torch_max_over_gathered_rows(impl):
    x, idx = make(3, 21, 33, 5, 9, seed=1).args
    x.requires_grad_()
    expected = x[torch.arange(3)[:, None, None], idx].max(2)
    values, slots = ops.gather_max(x, idx, impl=impl)
    assert torch.equal(values, expected.values) and torch.equal(slots.long(), expected.indices)
    weights = torch.randn_like(values)
    actual, wanted = (torch.autograd.grad((v * weights).sum(), x)[0] for v in (values, expected.values))
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties_nan_and_missing(impl, dtype):
    nan = float("nan")
    x = torch.tensor([[[1.0], [1.0], [2.0], [nan], [nan], [float("-inf")]]], dtype=dtype, requires_grad=True)
    idx = torch.tensor([[[0, 1, -1], [-1, 1, 0], [2, 3, 4], [4, 3, 2], [-1, -1, -1], [-1, 5, 5]]])
    values, slots = ops.gather_max(x, idx, impl=impl)
    assert slots.flatten().tolist() == [0, 1, 1, 0, -1, 1]
    expected = torch.tensor([1.0, 1.0, nan, nan, 0.0, float("-inf")], dtype=dtype)
    torch.testing.assert_close(values.flatten(), expected, rtol=0, atol=0, equal_nan=True)
    (grad,) = torch.autograd.grad(values, x, torch.tensor([1.0, 2, 4, 8, 16, 32], dtype=dtype).view(1, 6, 1))
    assert grad.flatten().tolist() == [1, 2, 0, 4, 8, 32]


@pytest.mark.parametrize("impl", IMPLS)
def test_slots_lead_to_the_values(impl):
    x, idx = make(2, 30, k=6, missing=0.5, seed=9).args
    values, slots = ops.gather_max(x, idx, impl=impl)
    winners = idx.gather(2, slots.clamp_min(0).long())
    assert torch.equal(values, torch.where(slots < 0, 0, x.gather(1, winners.clamp_min(0))))
    assert not slots.requires_grad


def test_same_bits_on_any_number_of_threads_for_large_shapes():
    x, idx = make(3, 600, k=20, channels=200, seed=14).to(torch.float32).args
    results = []
    for count in (1, 2, 3):
        with threads(count):
            leaf = x.clone().requires_grad_()
            values, slots = ops.gather_max(leaf, idx, impl="native")
            results.append([values, slots, *torch.autograd.grad(values.square().sum(), leaf)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_row_that_wins_everywhere_sums_in_double():
    x = torch.zeros(1, 4, 3)
    x[0, 2] = 1
    x.requires_grad_()
    idx = torch.arange(4).expand(1, 100_000, 4)
    values, _ = ops.gather_max(x, idx, impl="native")
    (grad,) = torch.autograd.grad(values, x, torch.full_like(values, 0.1))
    torch.testing.assert_close(grad[0, 2], torch.full((3,), 1e5 * 0.1), rtol=2e-7, atol=0)
    assert not grad[0, [0, 1, 3]].any()
