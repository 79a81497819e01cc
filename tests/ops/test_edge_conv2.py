"""edge_conv2: the battery, and what only it has: two norms, ties, missing edges, far offsets, memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crosspoint import ops
from crosspoint.ops import reference
from op_tester import Call, OpTester, assert_close, threads, usable_backends

IMPLS = sorted(usable_backends("edge_conv2", "cpu"))
PARAMETERS = (2, 3, 4, 5, 6, 7)
STATISTICS = ("running_mean1", "running_var1", "running_mean2", "running_var2")


def make(
    batch=2,
    n=19,
    k=4,
    c_in=5,
    c_mid=6,
    c_out=7,
    *,
    mode="training",
    seed=0,
    missing=0.0,
    running=True,
    **options,
) -> Call:
    """A random call; mode is "training", "evaluation" or "no_norm"."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = normal(batch, n, c_in)
    idx = torch.randint(0, max(n, 1), (batch, n, k), generator=g)
    idx = torch.where(torch.rand(batch, n, k, generator=g) < missing, -1, idx)
    weight1, gamma1, beta1 = normal(c_mid, 2 * c_in), normal(c_mid), normal(c_mid)
    weight2, gamma2, beta2 = normal(c_out, c_mid), normal(c_out), normal(c_out)
    values = (normal(c_mid), normal(c_mid).square() + 0.5, normal(c_out), normal(c_out).square() + 0.5)
    options["training"] = mode == "training"
    if mode == "no_norm":
        return Call((x, idx, weight1, None, None, weight2, None, None), options)
    statistics = dict(zip(STATISTICS, values, strict=True)) if running else {}
    return Call((x, idx, weight1, gamma1, beta1, weight2, gamma2, beta2), {**options, **statistics})


def change(call: Call, position: int, value) -> Call:
    args = list(call.args)
    args[position] = value(args[position]) if callable(value) else value
    return Call(tuple(args), call.kwargs)


def ragged() -> Call:
    """Clouds of 17, 5 and 0 points among 17 rows; the padding holds NaN and huge values."""
    call = make(3, 17, 6, seed=3)
    lengths = torch.tensor([17, 5, 0])
    row = torch.arange(17)
    idx = torch.where(
        (row < lengths[:, None])[..., None], call.args[1] % lengths[:, None, None].clamp_min(1), -1
    )
    x = call.args[0].clone()
    x[1, 5:11], x[1, 11:], x[2] = float("nan"), 1e4, 1e4
    return change(change(call, 0, x), 1, idx)


def lattice(**options) -> Call:
    """Small integers: without norms and with ReLU every product is exact, so that ties are ties on every backend."""
    call = make(2, 24, 6, 3, 5, 10, seed=4, mode="no_norm", negative_slope=0.0, **options)
    return call.map(lambda t: (2 * t).round() if t.is_floating_point() else t)


def with_nan(mode: str) -> Call:
    call = make(mode=mode, seed=5)
    call.args[0][1, 3, 2] = float("nan")
    return call


def with_gammas(mode: str) -> Call:
    """Zero and negative gammas in both norms."""
    call = make(mode=mode, seed=6)
    for position, size in ((3, 6), (6, 7)):
        gamma = torch.tensor([0.0, -1.5, 0.0, 0.7, -0.0, 2.0, -0.1], dtype=torch.float64)[:size]
        call = change(call, position, gamma)
    return call


class TestEdgeConv2(OpTester):
    op = "edge_conv2"
    differentiable = (0, *PARAMETERS)

    @classmethod
    def cases(cls):
        return {
            "training": make,
            "sizes_off_the_vectors": lambda: make(3, 37, 5, 13, 35, 77, seed=1),
            "evaluation": lambda: make(mode="evaluation"),
            "no_norm": lambda: make(mode="no_norm"),
            "no_running_statistics": lambda: make(running=False),
            "part_segmentation": lambda: make(2, 70, 20, 3, 64, 64, seed=2),
            "t_net": lambda: make(1, 150, 8, 3, 64, 128, seed=7),
            "wide_to_narrow": lambda: make(2, 30, 8, 4, 40, 3, seed=7),
            # A norm cancels the scale of its only weight, but for eps: were that small, the gradient would be rounding.
            "one_channel_each": lambda: make(2, 30, 8, 1, 1, 1, eps=0.5, seed=7),
            "many_clouds": lambda: make(19, 6, 3, 4, 9, 16, seed=8),
            "several_parts": lambda: make(1, 600, 2, 3, 4, 5, seed=8),
            "missing_edges": lambda: make(2, 30, 6, missing=0.5, seed=9),
            "missing_edges_evaluation": lambda: make(2, 30, 6, missing=0.5, mode="evaluation", seed=9),
            "missing_edges_no_norm": lambda: make(2, 30, 6, missing=0.5, mode="no_norm", seed=9),
            "no_edge_at_all": lambda: make(missing=1.0),
            "ragged": ragged,
            "one_neighbour": lambda: make(k=1),
            "many_neighbours": lambda: make(1, 11, 260, seed=10),
            "many_neighbours_some_missing": lambda: make(1, 11, 260, missing=0.3, seed=10),
            "one_node": lambda: make(3, 1, 2),
            "empty_batch": lambda: make(batch=0),
            "no_nodes": lambda: make(n=0),
            "no_neighbours": lambda: make(k=0),
            "relu": lambda: make(negative_slope=0.0, seed=11),
            "steep_slope": lambda: make(negative_slope=1.5, seed=11),
            "gammas_zero_and_negative": lambda: with_gammas("training"),
            "gammas_zero_evaluation": lambda: with_gammas("evaluation"),
            "lattice": lattice,
            "lattice_missing": lambda: lattice(missing=0.3),
            "nan": lambda: with_nan("training"),
            "nan_evaluation": lambda: with_nan("evaluation"),
            "nan_no_norm": lambda: with_nan("no_norm"),
            "momentum_and_eps": lambda: make(momentum=0.7, eps=0.3),
        }

    @classmethod
    def compile_cases(cls):
        return ["training", "sizes_off_the_vectors"]

    @classmethod
    def gradcheck_cases(cls):
        return ("training", "evaluation", "no_norm", "missing_edges")

    @classmethod
    def operator_calls(cls):
        operators = torch.ops.crosspoint

        def forward(build, dtype=torch.float32, backward=True):
            call = build().to(dtype)
            statistics = [call.kwargs.get(name) for name in STATISTICS]
            args = (*call.args, *statistics, call.kwargs["training"], 0.1, 1e-5, 0.2, backward, False)
            return operators.edge_conv2.default, args

        def backward(build, dtype=torch.float32):
            operator, args = forward(build, dtype)
            out, *saved = operator(*args)
            return operators.edge_conv2_backward.default, (
                torch.ones_like(out), *args[:8], *saved, args[12], 0.2, True, True, True, False, None, None,
            )  # fmt: skip

        return {
            "forward": lambda: forward(make),
            "forward_half": lambda: forward(make, torch.bfloat16),
            "forward_many_neighbours": lambda: forward(lambda: make(2, 5, 300)),
            "forward_no_norm": lambda: forward(lambda: make(mode="no_norm"), torch.float64),
            "forward_without_gradients": lambda: forward(make, backward=False),
            "forward_empty": lambda: forward(lambda: make(batch=0)),
            "backward": lambda: backward(make),
            "backward_half": lambda: backward(make, torch.float16),
            "backward_no_norm": lambda: backward(lambda: make(mode="no_norm"), torch.float64),
            "backward_empty": lambda: backward(lambda: make(n=0)),
        }

    @classmethod
    def bad_calls(cls):
        def index(value, *places):
            def build():
                call = make()
                for place in places:
                    call.args[1][place] = value
                return call

            return build

        def option(**options):
            return lambda: Call(make().args, {**make().kwargs, **options})

        def argument(position, value):
            return lambda: change(make(), position, value)

        def wrong_index(place, value):
            return rf"edge_conv2: idx\[{place}\] is {value}, but it must be -1 \(no edge\) or in \[0, 19\)"

        no_second_norm = change(change(make(), 6, None), 7, None)
        no_second_norm.kwargs.update(running_mean2=None, running_var2=None)
        return {
            "index_too_large": (index(19, (1, 3, 2), (1, 4, 0)), IndexError, wrong_index("1, 3, 2", 19)),
            "index_too_small": (index(-2, (0, 18, 3)), IndexError, wrong_index("0, 18, 3", -2)),
            "x_dim": (argument(0, lambda x: x[0]), ValueError, r"x must be .*got shape \(19, 5\)"),
            "x_dtype": (argument(0, lambda x: x.long()), TypeError, "x must be float64.*got torch.int64"),
            "idx_dtype": (argument(1, lambda i: i.int()), TypeError, "idx must be int64, got torch.int32"),
            "idx_shape": (
                argument(1, lambda i: i[:, :7]),
                ValueError,
                r"idx must be \(B, N, k\) = \(2, 19, k\)",
            ),
            "weight1_shape": (
                argument(2, lambda w: w[:, :5]),
                ValueError,
                r"weight1 must be .*\(C_mid, 10\)",
            ),
            "weight2_shape": (argument(5, lambda w: w[:, :5]), ValueError, r"weight2 must be .*\(C_out, 6\)"),
            "weight2_dtype": (
                argument(5, lambda w: w.float()),
                TypeError,
                "weight2 is torch.float32 and x is",
            ),
            "gamma1_shape": (argument(3, lambda g: g[:3]), ValueError, r"gamma1 must be .*\(6,\), got"),
            "gamma2_shape": (argument(6, lambda g: g[:3]), ValueError, r"gamma2 must be .*\(7,\), got"),
            "only_gamma1": (argument(4, None), ValueError, "go together: got gamma1 but beta1 is None"),
            "only_beta2": (argument(6, None), ValueError, "both layers have a norm, or neither"),
            "only_first_norm": (lambda: no_second_norm, ValueError, "got gamma1 but gamma2 is None"),
            "only_running_mean2": (
                option(running_var2=None),
                ValueError,
                "got running_mean2 but running_var2",
            ),
            "no_channels": (lambda: make(c_out=0), ValueError, "must be positive, got 5, 6 and 0"),
            "negative_slope": (option(negative_slope=-0.1), ValueError, "must be >= 0, got -0.1"),
            "nan_slope": (option(negative_slope=float("nan")), ValueError, "negative_slope must be >= 0"),
            "single_value": (lambda: make(1, 1, 1), ValueError, "more than 1 value per channel"),
            "evaluation_without_statistics": (
                lambda: make(mode="evaluation", running=False),
                RuntimeError,
                "must be given in evaluation mode",
            ),
        }


def leaves(call: Call) -> list[Tensor]:
    return [call.args[i].requires_grad_() for i in (0, *PARAMETERS) if call.args[i] is not None]


def run(call: Call, impl: str) -> Tensor:
    return ops.edge_conv2(*call.args, **call.kwargs, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_equals_two_layers_of_plain_pytorch(impl, training, slope):
    torch.manual_seed(0)
    x = torch.randn(3, 21, 6, dtype=torch.float64, requires_grad=True)
    idx = torch.randint(0, 21, (3, 21, 5))
    convs = nn.Conv2d(12, 9, 1, bias=False).double(), nn.Conv2d(9, 11, 1, bias=False).double()
    norms = nn.BatchNorm2d(9).double(), nn.BatchNorm2d(11).double()
    for bn in norms:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        bn.train(training)
    before = [t.clone() for bn in norms for t in (bn.running_mean, bn.running_var)]

    neighbours = x[torch.arange(3)[:, None, None], idx]
    centres = x[:, :, None].expand_as(neighbours)
    h = torch.cat([neighbours - centres, centres], -1).permute(0, 3, 1, 2)
    for conv, bn in zip(convs, norms, strict=True):
        h = F.leaky_relu(bn(conv(h)), slope)
    expected = h.max(-1).values.transpose(1, 2)
    parameters = [
        x,
        *(p for conv, bn in zip(convs, norms, strict=True) for p in (conv.weight, bn.weight, bn.bias)),
    ]
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), parameters)

    flat = [p.flatten(1) if p.dim() == 4 else p for p in parameters[1:]]
    actual = ops.edge_conv2(x, idx, *flat, *before, training=training, negative_slope=slope, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((actual * weights).sum(), parameters)
    for a, e in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)
    after = [t for bn in norms for t in (bn.running_mean, bn.running_var)]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_layer_of_one_identity_is_edge_conv(impl):
    """With weight2 = 1, no second norm to speak of and ReLU, the first layer is all there is."""
    call = make(2, 30, 6, missing=0.3, c_mid=7, negative_slope=0.0, mode="no_norm", seed=2)
    call = change(call, 5, torch.eye(7, dtype=torch.float64))
    x, idx, weight1, *_ = call.args
    expected = ops.edge_conv(x, idx, weight1, None, None, training=False, negative_slope=0.0)
    torch.testing.assert_close(run(call, impl), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("empty", [{"batch": 0}, {"n": 0}, {"k": 0}, {"missing": 1.0}], ids=str)
def test_empty_batch_leaves_running_statistics_alone(impl, empty):
    call = make(**empty)
    before = call.clone().kwargs
    assert not run(call, impl).any()
    for name in STATISTICS:
        torch.testing.assert_close(call.kwargs[name], before[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_statistics_of_another_dtype_are_updated(dtype):
    call = make(2, 23, 5)
    half = Call(call.to(dtype).args, call.to(torch.float32).kwargs)
    run(half, "native")
    rounded = Call(call.to(dtype).to(torch.float32).args, call.to(torch.float32).kwargs)
    run(rounded, "reference")
    before = call.to(torch.float32).kwargs
    for name in STATISTICS:
        assert half.kwargs[name].dtype == torch.float32 and not torch.equal(half.kwargs[name], before[name])
        torch.testing.assert_close(half.kwargs[name], rounded.kwargs[name], rtol=1e-5, atol=1e-5)
    strided = make(2, 23, 5).to(torch.float32)
    plain = strided.clone()
    for name in STATISTICS:
        strided.kwargs[name] = torch.stack([strided.kwargs[name]] * 2, 1)[:, 0]
    run(strided, "native")
    run(plain, "native")
    for name in STATISTICS:
        assert torch.equal(strided.kwargs[name], plain.kwargs[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["training", "evaluation", "no_norm"])
def test_padding_reaches_nothing(impl, mode):
    """Whatever the padding of a batch holds, the results are the same, and it takes no gradient."""
    lengths, n, k = (9, 14, 4), 14, 3
    call = make(3, n, k, mode=mode, seed=2)
    x, idx = call.args[:2]
    for b, length in enumerate(lengths):
        idx[b] %= length
        idx[b, length:] = -1
    results = []
    for filler in (0.0, 1e30, float("nan")):
        filled = x.clone()
        for b, length in enumerate(lengths):
            filled[b, length:] = filler
        fresh = change(call.clone(), 0, filled)
        tensors = leaves(fresh)
        out = run(fresh, impl)
        gradients = torch.autograd.grad(out.square().sum(), tensors)
        assert all(not out[b, length:].any() for b, length in enumerate(lengths))
        assert all(not gradients[0][b, length:].any() for b, length in enumerate(lengths))
        results.append([out, *gradients])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["training", "evaluation", "no_norm"])
def test_missing_slots_count_for_nothing(mode):
    """Edges first, then -1: the same as the shorter list."""
    call = make(2, 12, 6, mode=mode)
    padded = change(call, 1, lambda idx: torch.cat([idx, torch.full_like(idx, -1)], 2))
    torch.testing.assert_close(run(call, "native"), run(padded.clone(), "native"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["evaluation", "no_norm"])
def test_ties_go_to_the_lowest_valid_slot(impl, mode):
    """Two copies of a node: all of the gradient goes to the one in the lower slot."""
    call = make(1, 8, 4, 3, 6, 5, mode=mode)
    x = call.args[0]
    x[0, 7] = x[0, 0]
    call.args[1][0] = torch.tensor([-1, 7, 0, 7])
    (x,) = leaves(call)[:1]
    winners = torch.autograd.grad(run(call, impl)[0, 3].sum() + run(call, impl)[0, 0].sum(), x)[0][0]
    call.args[1][0] = torch.tensor([-1, 0, 7, 0])
    others = torch.autograd.grad(run(call, impl)[0, 3].sum() + run(call, impl)[0, 0].sum(), x)[0][0]
    assert winners[7].abs().min() > 0
    assert not torch.allclose(winners[7], others[7])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_gamma2_zero_ties_all_edges(impl, mode):
    """gamma2's gradient is then that of the lowest valid slot, and nothing reaches the first layer."""
    call = make(2, 15, 5, missing=0.3, mode=mode, seed=3)
    call.args[6].zero_()
    tensors = leaves(call)
    fresh = call.clone()
    gradients = torch.autograd.grad(run(Call(call.args, fresh.kwargs), impl).square().sum(), tensors)
    assert not any(g.any() for g in gradients[:5])
    assert gradients[5].abs().min() > 0 and gradients[6].abs().min() > 0
    reordered = change(call.clone(), 1, lambda idx: idx.flip(2))
    reordered_leaves = leaves(reordered)
    others = torch.autograd.grad(run(reordered, impl).square().sum(), reordered_leaves)
    assert not torch.allclose(gradients[5], others[5])


@pytest.mark.parametrize("offset", [0.0, 5.0, 1000.0])
@pytest.mark.parametrize("beta1", [0.0, 1000.0])
def test_float32_variances_far_from_the_origin(offset, beta1):
    """Clouds far away, and activations far from zero between the layers."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 300, 3, generator=g) * 0.4 + offset * torch.rand(4, 1, 3, generator=g)
    idx = ops.knn_graph(x, 12, impl="reference")
    weights = torch.randn(64, 6, generator=g), torch.randn(32, 64, generator=g)
    layers = [
        weights[0],
        torch.ones(64),
        torch.full((64,), beta1),
        weights[1],
        torch.ones(32),
        torch.ones(32),
    ]
    results = {}
    for impl, dtype in (("native", torch.float32), ("reference", torch.float64)):
        statistics = [torch.full((c,), v, dtype=dtype) for c in (64, 32) for v in (0.0, 1.0)]
        args = (x.to(dtype), idx, *(t.to(dtype) for t in layers), *statistics)
        results[impl] = ops.edge_conv2(*args, training=True, momentum=1.0, impl=impl), statistics
    assert_close(results["native"][0], results["reference"][0], 6e-6, "output")
    for name, a, e in zip(STATISTICS, results["native"][1], results["reference"][1], strict=True):
        if "var" in name:
            assert ((a.double() - e) / e).abs().max() < 5e-6, name


@pytest.mark.parametrize("mode", ["training", "evaluation", "no_norm"])
def test_float32_gradients_far_from_the_origin(mode):
    call = make(4, 200, 10, 3, 24, 32, mode=mode, seed=12)
    shift = 300 * torch.rand(4, 1, 3, generator=torch.Generator().manual_seed(1))
    call = change(call, 0, lambda x: x * 0.4 + shift).to(torch.float32)
    results = {}
    for impl, dtype in (("native", torch.float32), ("reference", torch.float64)):
        fresh = call.clone().to(dtype)
        tensors = leaves(fresh)
        out = run(fresh, impl)
        weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).cos().view_as(out)
        results[impl] = torch.autograd.grad((out * weights).sum(), tensors)
    for a, e in zip(results["native"], results["reference"], strict=True):
        assert_close(a, e, 2e-5, mode)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["evaluation", "no_norm"])
def test_non_finite_nodes_reach_their_edges_alone(impl, value, mode):
    call = make(2, 16, 3, mode=mode, seed=4)
    clean = run(call, impl)
    call.args[0][1, 5, 0] = value
    out = run(call, impl)
    touched = (call.args[1] == 5).any(2)
    touched[0], touched[1, 5] = False, True
    torch.testing.assert_close(out[~touched], clean[~touched], rtol=0, atol=1e-12)
    assert out[touched].isnan().any() and not out[~touched].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_wanted_gradients_are_computed(impl):
    for wanted in (*((position,) for position in (0, *PARAMETERS)), (0, 3), ()):
        call, everything = make(), make()
        for position in wanted:
            call.args[position].requires_grad_()
        out = run(call, impl)
        assert out.requires_grad == bool(wanted)
        if wanted:
            out.square().sum().backward()
        leaves(everything)
        run(everything, impl).square().sum().backward()
        for position in (0, *PARAMETERS):
            got, full = call.args[position].grad, everything.args[position].grad
            assert (got is not None) == (position in wanted)
            if got is not None:
                torch.testing.assert_close(got, full)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_nothing_else(impl, dtype):
    call = make(seed=13).to(torch.float32)
    tensors = leaves(call)
    with torch.autocast("cpu", dtype=dtype):
        out = run(Call(call.args, call.clone().kwargs), impl)
        gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    assert out.dtype == dtype
    assert all(g.dtype == torch.float32 for g in gradients)
    rounded = change(call, 0, lambda x: x.detach().to(dtype))
    assert torch.equal(out, run(Call(rounded.args, rounded.clone().kwargs), impl))


def test_compiled_step_updates_running_statistics():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda args, kwargs: ops.edge_conv2(*args, **kwargs),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for n in (9, 12):
        eager, traced = make(2, n).to(torch.float32), make(2, n).to(torch.float32)
        torch.testing.assert_close(compiled(traced.args, traced.kwargs), run(eager, "auto"), rtol=0, atol=0)
        for name in STATISTICS:
            assert not torch.equal(eager.kwargs[name], make(2, n).to(torch.float32).kwargs[name])
            torch.testing.assert_close(traced.kwargs[name], eager.kwargs[name], rtol=0, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    n=st.integers(1, 40),
    k=st.integers(1, 9),
    c_in=st.integers(1, 12),
    c_mid=st.integers(1, 40),
    c_out=st.integers(1, 70),
    mode=st.sampled_from(["training", "evaluation", "no_norm"]),
    missing=st.sampled_from([0.0, 0.3, 0.9]),
    slope=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_any_shape_equals_the_reference(batch, n, k, c_in, c_mid, c_out, mode, missing, slope):
    if batch * n * k == 1:
        n = 2
    call = make(
        batch, n, k, c_in, c_mid, c_out,
        mode=mode, missing=missing, negative_slope=slope, eps=1e-2, seed=n * 71 + c_out,
    )  # fmt: skip
    results = []
    for impl in ("native", "reference"):
        fresh = call.clone()
        tensors = leaves(fresh)
        out = run(fresh, impl)
        weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).cos().view_as(out)
        gradients = torch.autograd.grad((out * weights).sum(), tensors)
        results.append([out, *gradients, *(fresh.kwargs[s] for s in STATISTICS if s in fresh.kwargs)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_same_bits_on_any_number_of_threads_for_large_shapes(batch):
    call = make(batch, 300, 20, 8, 64, 100, seed=14).to(torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            fresh = call.clone()
            tensors = leaves(fresh)
            out = run(fresh, "native")
            gradients = torch.autograd.grad(out.square().sum(), tensors)
            results.append([out, *gradients, *(fresh.kwargs[name] for name in STATISTICS)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_reference_runs_on_any_float_dtype():
    call = make().to(torch.bfloat16)
    assert reference.edge_conv2(*call.args, **call.kwargs).dtype == torch.bfloat16
