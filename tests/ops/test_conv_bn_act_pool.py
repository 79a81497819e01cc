"""conv_bn_act_pool: the battery, and what only it has: statistics, ragged clouds, far offsets, memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from crosspoint import ops
from crosspoint.ops import _dispatch, reference
from op_tester import Call, OpTester, assert_close, compiled_backends, usable_backends

IMPLS = sorted(usable_backends("conv_bn_act_pool", "cpu"))
compiled = pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])


def make(batch=2, n=19, c_in=5, c_out=7, *, training=True, running=True, seed=0, **options) -> Call:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, weight, gamma, beta = normal(batch, n, c_in), normal(c_out, c_in), normal(c_out), normal(c_out)
    statistics = {"running_mean": normal(c_out), "running_var": normal(c_out).square() + 0.5}
    return Call(
        (x, weight, gamma, beta), {"training": training, **options, **(statistics if running else {})}
    )


def change(call: Call, position: int, value) -> Call:
    args = list(call.args)
    args[position] = value(args[position]) if callable(value) else value
    return Call(tuple(args), call.kwargs)


def ragged(**options) -> Call:
    """Clouds of 17, 5, 0 and 1 points among 17 rows; the padding holds NaN and huge values."""
    call = make(4, 17, seed=3, lengths=torch.tensor([17, 5, 0, 1]), **options)
    x = call.args[0].clone()
    x[1, 5:11], x[1, 11:], x[2], x[3, 1:] = float("nan"), 1e30, float("inf"), -1e30
    return change(call, 0, x)


def half_ragged(**options) -> Call:
    """As `ragged`, within the range of float16."""
    return change(ragged(**options), 0, lambda x: x.clamp(-1e4, 1e4))


def lattice(**options) -> Call:
    """Small integers: every product is exact, so that ties are ties on every backend."""
    whole = make(2, 24, 3, 10, seed=4, **options).map(
        lambda t: (2 * t).round() if t.is_floating_point() else t
    )
    if "running_var" in whole.kwargs:
        whole.kwargs["running_var"] = whole.kwargs["running_var"].abs() + 1
    return whole


def with_nan(**options) -> Call:
    x = make(seed=5).args[0].clone()
    x[1, 3, 2] = float("nan")
    return change(make(seed=5, **options), 0, x)


def zero_gamma(**options) -> Call:
    gamma = torch.tensor([0.0, -1.5, 0.0, 0.7, -0.0, 2.0, -0.1], dtype=torch.float64)
    return change(make(seed=6, **options), 2, gamma)


class TestConvBnActPool(OpTester):
    op = "conv_bn_act_pool"
    differentiable = (0, 1, 2, 3)

    @classmethod
    def cases(cls):
        return {
            "training": make,
            "sizes_off_the_vectors": lambda: make(3, 37, 13, 77, seed=1),
            "evaluation": lambda: make(training=False),
            "no_running_statistics": lambda: make(running=False),
            "several_chunks": lambda: make(2, 600, 9, 33, seed=2),
            "several_chunks_evaluation": lambda: make(2, 600, 9, 33, training=False, seed=2),
            "deep": lambda: make(1, 20, 300, 40, seed=7),
            "many_clouds": lambda: make(19, 6, 4, 16, seed=8),
            "ragged": half_ragged,
            "ragged_evaluation": lambda: half_ragged(training=False),
            "all_empty": lambda: make(lengths=torch.zeros(2, dtype=torch.int64)),
            "one_row": lambda: make(3, 1),
            "one_row_evaluation": lambda: make(1, 1, training=False),
            "one_valid_row": lambda: make(lengths=torch.tensor([1, 0])),
            "empty_batch": lambda: make(batch=0),
            "no_points": lambda: make(n=0),
            "no_outputs": lambda: make(c_out=0),
            "relu": lambda: make(negative_slope=0.0, seed=11),
            "steep_slope": lambda: make(negative_slope=1.5, seed=11),
            "gamma_zero_and_negative": zero_gamma,
            "gamma_zero_evaluation": lambda: zero_gamma(training=False),
            "lattice": lattice,
            "lattice_relu": lambda: lattice(negative_slope=0.0),
            "lattice_evaluation": lambda: lattice(training=False),
            "nan": with_nan,
            "nan_evaluation": lambda: with_nan(training=False),
            "momentum_and_eps": lambda: make(momentum=0.7, eps=0.3),
        }

    @classmethod
    def compile_cases(cls):
        return ["training", "sizes_off_the_vectors"]

    @classmethod
    def gradcheck_cases(cls):
        return ("training", "evaluation", "relu")

    @classmethod
    def operator_calls(cls):
        def forward(build, dtype=torch.float32, backward=True, backend="native"):
            call = build().to(dtype)
            options = {"running_mean": None, "running_var": None, "lengths": None, **call.kwargs}
            given = (options[name] for name in ("running_mean", "running_var", "lengths", "training"))
            operator = _dispatch.operator("conv_bn_act_pool", backend).default
            return operator, (*call.args, *given, 0.1, 1e-5, 0.2, backward)

        def backward(build, dtype=torch.float32, backend="native"):
            operator, args = forward(build, dtype, backend=backend)
            out, *saved = operator(*args)
            return _dispatch.operator("conv_bn_act_pool_backward", backend).default, (
                torch.ones_like(out), *args[:4], args[6], *saved, args[7], 0.2, True, True,
            )  # fmt: skip

        calls = {
            "forward": lambda: forward(make),
            "forward_half": lambda: forward(make, torch.bfloat16),
            "forward_ragged": lambda: forward(ragged),
            "forward_without_gradients": lambda: forward(make, backward=False),
            "forward_evaluation": lambda: forward(
                lambda: make(training=False), torch.float64, backward=False
            ),
            "forward_empty": lambda: forward(lambda: make(batch=0)),
            "backward": lambda: backward(make),
            "backward_half": lambda: backward(make, torch.float16),
            "backward_ragged": lambda: backward(ragged, torch.float64),
            "backward_empty": lambda: backward(lambda: make(n=0)),
        }
        if ("triton", "cpu") in compiled_backends(cls.op):
            calls["forward-triton-cpu"] = lambda: forward(ragged, torch.bfloat16, backend="triton")
            calls["forward_empty-triton-cpu"] = lambda: forward(lambda: make(batch=0), backend="triton")
            calls["backward-triton-cpu"] = lambda: backward(ragged, backend="triton")
            calls["backward_empty-triton-cpu"] = lambda: backward(lambda: make(n=0), backend="triton")
        return calls

    @classmethod
    def bad_calls(cls):
        def option(**options):
            return lambda: Call(make().args, {**make().kwargs, **options})

        def argument(position, value):
            return lambda: change(make(), position, value)

        return {
            "x_dim": (argument(0, lambda x: x[0]), ValueError, r"x must be \(B, N, C_in\), got .*\(19, 5\)"),
            "x_dtype": (argument(0, lambda x: x.long()), TypeError, "x must be float64.*got torch.int64"),
            "weight_shape": (argument(1, lambda w: w[:, :3]), ValueError, r"weight must be .*\(C_out, 5\)"),
            "weight_dtype": (argument(1, lambda w: w.float()), TypeError, "weight is torch.float32 and x is"),
            "gamma_shape": (argument(2, lambda g: g[:3]), ValueError, r"gamma must be .*\(7,\), got"),
            "no_gamma": (argument(2, None), TypeError, "gamma and beta must be tensors"),
            "only_running_mean": (option(running_var=None), ValueError, "got running_mean but running_var"),
            "negative_slope": (option(negative_slope=-0.1), ValueError, "must be >= 0, got -0.1"),
            "single_value": (lambda: make(1, 1), ValueError, "more than 1 value per channel"),
            "evaluation_without_statistics": (
                lambda: make(training=False, running=False),
                RuntimeError,
                "must be given in evaluation mode",
            ),
            "lengths_shape": (option(lengths=torch.tensor([1])), ValueError, "one number per cloud of x"),
            "lengths_dtype": (option(lengths=torch.tensor([1.0, 2.0])), ValueError, "must be integers"),
            "length_too_large": (option(lengths=torch.tensor([3, 20])), IndexError, r"lengths\[1\] is 20"),
            "length_negative": (option(lengths=torch.tensor([-1, 2])), IndexError, r"lengths\[0\] is -1"),
        }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_equals_conv1d_batchnorm1d_leakyrelu_and_pooling(impl, training, slope):
    torch.manual_seed(0)
    x = torch.randn(3, 300, 6, dtype=torch.float64, requires_grad=True)
    conv, bn = nn.Conv1d(6, 9, 1, bias=False).double(), nn.BatchNorm1d(9).double()
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    bn.train(training)

    y = F.leaky_relu(bn(conv(x.transpose(1, 2))), slope)
    expected = torch.cat([y.max(-1).values, y.mean(-1)], 1)
    parameters = [x, conv.weight, bn.weight, bn.bias]
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), parameters)

    actual = ops.conv_bn_act_pool(
        x,
        conv.weight.flatten(1),
        bn.weight,
        bn.bias,
        mean,
        var,
        training=training,
        negative_slope=slope,
        impl=impl,
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((actual * weights).sum(), parameters)
    for a, e in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)
    torch.testing.assert_close((mean, var), (bn.running_mean, bn.running_var), rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_ragged_equals_one_cloud_at_a_time(impl):
    """In evaluation clouds are independent, so padding cannot matter."""
    call = ragged(training=False)
    out = ops.conv_bn_act_pool(*call.args, **call.kwargs, impl=impl)
    options = {**call.kwargs, "lengths": None}
    for b, length in enumerate(call.kwargs["lengths"].tolist()):
        alone = ops.conv_bn_act_pool(call.args[0][b : b + 1, :length], *call.args[1:], **options, impl=impl)
        torch.testing.assert_close(out[b], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_are_those_of_the_valid_rows(impl):
    call = ragged(momentum=1.0)
    x, weight, *_ = call.args
    ops.conv_bn_act_pool(*call.args, **call.kwargs, impl=impl)
    lengths = call.kwargs["lengths"].tolist()
    h = torch.cat([x[b, :length] for b, length in enumerate(lengths)]) @ weight.t()
    torch.testing.assert_close(call.kwargs["running_mean"], h.mean(0))
    torch.testing.assert_close(call.kwargs["running_var"], h.var(0))


@compiled
def test_empty_batches_leave_the_running_statistics_alone(impl):
    for call in (make(batch=0), make(lengths=torch.zeros(2, dtype=torch.int64))):
        before = call.clone().kwargs
        ops.conv_bn_act_pool(*call.args, **call.kwargs, impl=impl)
        assert torch.equal(call.kwargs["running_mean"], before["running_mean"])
        assert torch.equal(call.kwargs["running_var"], before["running_var"])


@compiled
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_far_offsets_lose_nothing(impl, offset):
    """The product's own rounding is given to both sides: weights of one input channel that is exact in float32."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 500, 1, generator=g) * 64).round() / 64 + offset
    weight, gamma, beta = torch.ones(1, 1), torch.ones(1), torch.zeros(1)
    args = (x, weight, gamma, beta)
    actual = ops.conv_bn_act_pool(*args, training=True, impl=impl)
    expected = reference.conv_bn_act_pool(*(t.double() for t in args), training=True)
    assert_close(actual, expected, 1e-6, "offset")


@compiled
def test_ties_go_to_the_first_row(impl):
    x = torch.tensor([[[1.0], [3.0], [3.0], [2.0]]], requires_grad=True)
    statistics = torch.zeros(1), torch.ones(1)
    out = ops.conv_bn_act_pool(
        x, torch.ones(1, 1), torch.ones(1), torch.zeros(1), *statistics, training=False, impl=impl
    )
    out[0, 0].backward()
    assert (x.grad.flatten() != 0).tolist() == [False, True, False, False]


@compiled
def test_half_types_are_computed_in_float32(impl):
    call = make(3, 40, 16, 24)
    for dtype in (torch.bfloat16, torch.float16):
        half = call.to(dtype)
        out = ops.conv_bn_act_pool(*half.args, **half.clone().kwargs, impl=impl)
        wide = ops.conv_bn_act_pool(*half.to(torch.float32).args, **half.to(torch.float32).kwargs, impl=impl)
        assert out.dtype == dtype
        assert torch.equal(out, wide.to(dtype))


@compiled
def test_autocast_casts_x(impl):
    call = make().to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.conv_bn_act_pool(*call.args, **call.kwargs, impl=impl)
    assert out.dtype == torch.bfloat16


def test_a_gpu_keeps_a_bit_of_each_value():
    """By the shapes that the operator declares, which opcheck compares with those that it gives."""
    batch, n, c_in, c_out = 8, 1000, 512, 1024
    with FakeTensorMode():
        x, weight, affine = torch.empty(batch, n, c_in), torch.empty(c_out, c_in), torch.empty(c_out)
        given = (x, weight, affine, affine, None, None, None, True, 0.1, 1e-5, 0.2)
        _, *kept = torch.ops.crosspoint.conv_bn_act_pool_triton(*given, True)
        _, *nothing = torch.ops.crosspoint.conv_bn_act_pool_triton(*given, False)
    assert sum(t.nbytes for t in kept) == (
        batch * n * c_out // 8 + 28 * batch * c_out + 16 * c_out + 8 * (c_in + 1) * c_in
    )
    assert sum(t.nbytes for t in nothing) == 16 * c_out


PEAK = """
import resource, torch
from crosspoint import ops

torch.set_num_threads(2)
x, weight = torch.randn({batch}, {n}, 64, requires_grad=True), torch.randn(1024, 64, requires_grad=True)
gamma, beta = torch.ones(1024, requires_grad=True), torch.zeros(1024, requires_grad=True)

def step():
    ops.conv_bn_act_pool(x, weight, gamma, beta, training=True, impl="native").sum().backward()

small = torch.randn(1, 300, 64)
ops.conv_bn_act_pool(small, weight, gamma, beta, training=True, impl="native").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_the_product_is_stored_once():
    batch, n = 16, 2048
    product = 4 * batch * n * 1024
    code = PEAK.format(batch=batch, n=n)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    others = 4 * (2 * batch * n * 64 + 16 * 64 * 1024 + 12 * 1024 * batch * n // 256)
    assert int(done.stdout) < product + 1.2 * others + (8 << 20), f"{int(done.stdout) / product:.2f} products"
