"""nt_xent and info_nce: the battery, then precision, extremes, and the properties of the losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosspoint import ops
from crosspoint.ops import reference
from crosspoint.testing import TOLERANCE
from op_tester import Call, OpTester, compiled_backends, threads

BACKENDS = compiled_backends("nt_xent")
backends = pytest.mark.parametrize("backend", BACKENDS, ids=["-".join(pair) for pair in BACKENDS])
LOSSES = {
    "nt_xent": ("nt_xent", {}),
    "info_nce": ("info_nce", {"symmetric": True}),
    "info_nce_one_way": ("info_nce", {"symmetric": False}),
}
losses = pytest.mark.parametrize("loss", list(LOSSES))


def views(n: int, d: int, *, noise: float = 0.7, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * n + 7 * d + seed)
    base, other = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return base.to(dtype), (base + noise * other).to(dtype)


def evaluate(loss: str, impl: str, z1: Tensor, z2: Tensor, temperature) -> list[Tensor]:
    """Loss and the gradients of z1, z2 and the temperature; impl "plain" calls the reference itself."""
    op, kwargs = LOSSES[loss]
    leaves = [z.detach().clone().requires_grad_() for z in (z1, z2)]
    leaves.append(torch.as_tensor(temperature, dtype=z1.dtype, device=z1.device).clone().requires_grad_())
    if impl == "plain":
        value = getattr(reference, op)(*leaves, **kwargs)
    else:
        value = getattr(ops, op)(*leaves, **kwargs, impl=impl)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_all_close(actual, expected, tolerance: float, floor: float = 1e-300) -> None:
    """Relative to the largest entry of each expected tensor."""
    names = ("loss", "dz1", "dz2", "dtemperature")
    for name, a, e in zip(names if len(actual) == 4 else names[::3], actual, expected, strict=True):
        e = e.double().cpu()
        scale = max(e.abs().max().item() if e.numel() else 0.0, floor)
        error = (a.double().cpu() - e).abs().max().item() / scale if e.numel() else 0.0
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


class NtXentTester(OpTester):
    differentiable = (0, 1, 2)
    within_views: bool

    @classmethod
    def cases(cls):
        def case(n, d, temperature, **kwargs):
            return lambda: Call((*views(n, d), temperature), kwargs)

        tensor = torch.tensor(0.2, dtype=torch.float64)
        found = {
            "tensor_temperature": case(7, 5, tensor),
            "several_blocks": case(200, 33, tensor),
            "default_temperature": case(6, 8, 0.1),
            "one_element_temperature": case(5, 3, torch.tensor([0.5], dtype=torch.float64)),
            "two_samples": case(2, 4, 0.5),
            "one_sample": case(1, 4, tensor),
            "no_samples": case(0, 4, tensor),
            "duplicates": lambda: Call((torch.ones(5, 4, dtype=torch.float64),) * 2 + (0.3,)),
            "hot": case(20, 16, 10.0),
        }
        if cls.op == "info_nce":
            found["one_way"] = case(120, 7, tensor, symmetric=False)
        return found

    @classmethod
    def bad_calls(cls):
        def bad(change, error, pattern):
            def build():
                z1, z2 = views(4, 3)
                return Call(change(z1, z2))

            return build, error, pattern

        return {
            "not_a_tensor": bad(lambda a, b: ([[1.0]], b), TypeError, "z1 must be a tensor, got list"),
            "one_dimension": bad(lambda a, b: (a[0], b[0]), ValueError, r"z1 must be \(N, D\)"),
            "integers": bad(lambda a, b: (a.long(), b.long()), TypeError, "floating dtype, got torch.int64"),
            "sizes": bad(lambda a, b: (a, b[:3]), ValueError, r"got \(4, 3\) and \(3, 3\)"),
            "dtypes": bad(lambda a, b: (a, b.float()), TypeError, "torch.float64 and torch.float32"),
            "devices": bad(lambda a, b: (a, b.to("meta")), ValueError, "cpu and meta"),
            "zero": bad(lambda a, b: (a, b, 0.0), ValueError, "temperature must be positive, got 0.0"),
            "negative": bad(lambda a, b: (a, b, -1), ValueError, "temperature must be positive, got -1"),
            "nan": bad(lambda a, b: (a, b, math.nan), ValueError, "temperature must be positive, got nan"),
            "text": bad(lambda a, b: (a, b, "hot"), TypeError, "one-element tensor, got str"),
            "vector": bad(lambda a, b: (a, b, torch.ones(2)), ValueError, r"one element, got shape \(2,\)"),
            "whole": bad(lambda a, b: (a, b, torch.tensor(1)), TypeError, "floating dtype, got torch.int64"),
        }

    @classmethod
    def operator_calls(cls):
        def forward():
            z1, z2 = (z.float() for z in views(5, 3))
            return torch.ops.crosspoint.nt_xent.default, (
                z1,
                z2,
                torch.tensor(0.1),
                cls.within_views,
                True,
                1,
                3,
            )

        def backward():
            z1, z2 = (z.half() for z in views(5, 3))
            args = (z1, z2, torch.tensor(0.1), cls.within_views, True, 0, 5)
            _, row_losses = torch.ops.crosspoint.nt_xent(*args)
            grads = (torch.tensor(1.0), *args[:3], row_losses, *args[3:5], 1, 3)
            return torch.ops.crosspoint.nt_xent_backward.default, grads

        return {"forward": forward, "backward": backward}

    @classmethod
    def gradcheck_cases(cls):
        return ("tensor_temperature", "default_temperature")


class TestNtXent(NtXentTester):
    op = "nt_xent"
    within_views = True


class TestInfoNce(NtXentTester):
    op = "info_nce"
    within_views = False


# ---- precision


@losses
@backends
@pytest.mark.parametrize(
    "n, d, temperature",
    [
        *((n, 40, 0.1) for n in (2, 3, 31, 95, 96, 97, 193)),
        *((37, d, 0.1) for d in (3, 255, 256, 1024)),
        *((101, 33, t) for t in (0.0005, 0.005, 0.0143, 0.0146, 0.02, 0.07, 0.5, 1.0, 10.0)),
    ],
)
def test_float64_equals_reference_to_its_last_digits(backend, loss, n, d, temperature):
    z1, z2 = views(n, d)
    expected = evaluate(loss, "plain", z1, z2, temperature)
    actual = evaluate(loss, backend[0], *(z.to(backend[1]) for z in (z1, z2)), temperature)
    assert_all_close(actual, expected, 2e-12)


@losses
@backends
def test_one_channel_has_no_gradient(backend, loss):
    actual = evaluate(loss, backend[0], *(z.to(backend[1]) for z in views(9, 1)), 0.5)
    expected = evaluate(loss, "plain", *views(9, 1), 0.5)
    torch.testing.assert_close(actual[0].cpu(), expected[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(actual[3].cpu(), expected[3], rtol=1e-12, atol=0)
    assert all(g.abs().max() < 1e-13 for g in actual[1:3])


@backends
@pytest.mark.parametrize(
    "noise, temperature, tolerance",
    [
        *((1.0, t, 1.5e-7) for t in (0.5, 0.1, 0.07)),
        *((0.3, t, 3e-7) for t in (0.5, 0.1, 0.07)),
        (0.3, 0.02, 4e-6),  # the rounding of a cosine, 50 times
    ],
)
def test_float32_gradient_of_aligned_pairs(backend, noise, temperature, tolerance):
    """Plain float32 cross entropy is off by 3e-5 at 0.07, and by half at 0.02, where the loss is 1e-15. A GPU is
    held to the same: three products of tf32 lose no more than float32's (test_contrast_precision)."""
    n, d = 512, 256
    generator = torch.Generator().manual_seed(0)
    base = F.normalize(torch.randn(n, d, generator=generator).double(), dim=1)
    z1, z2 = (
        F.normalize(base + noise * torch.randn(n, d, generator=generator).double() / d**0.5, dim=1)
        for _ in range(2)
    )
    expected = evaluate("nt_xent", "plain", z1, z2, temperature)
    actual = evaluate("nt_xent", backend[0], *(z.float().to(backend[1]) for z in (z1, z2)), temperature)
    error = sum(
        (a.double().cpu() - e).square().sum() for a, e in zip(actual[1:3], expected[1:3], strict=True)
    )
    norm = sum(e.square().sum() for e in expected[1:3])
    assert (error / norm).sqrt() < tolerance
    torch.testing.assert_close(actual[0].double().cpu(), expected[0], rtol=max(tolerance, 2e-7), atol=0)


@backends
@pytest.mark.parametrize(
    "dtype, temperature", [(torch.float64, 0.0275), (torch.float32, 0.055), (torch.float32, 0.02)]
)
def test_tiny_loss_keeps_its_digits(backend, dtype, temperature):
    """Orthogonal samples with equal views: the loss is log(1 + (2N - 2) exp(-1 / temperature)) exactly."""
    n = 16
    z = torch.eye(n, 24, dtype=dtype, device=backend[1])
    value, dz1, _, _ = evaluate("nt_xent", backend[0], z, z, temperature)
    temperature = torch.tensor(temperature, dtype=dtype).double().item()
    others = (2 * n - 2) * math.exp(-1 / temperature)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert value.item() == pytest.approx(math.log1p(others), rel=tolerance)
    # Each row is pushed from every other sample by both its own loss and theirs, in both views.
    push = 4 * math.exp(-1 / temperature) / (1 + others) / (2 * n * temperature)
    expected = push * (1 - torch.eye(n, 24, dtype=torch.float64)) * (torch.arange(24) < n)
    torch.testing.assert_close(dz1.double().cpu(), expected, rtol=tolerance, atol=0)


@losses
@backends
@pytest.mark.parametrize("temperature", [0.005, 0.0144, 0.0145, 0.03])
def test_float32_at_low_temperature(backend, loss, temperature):
    """Weakly aligned: the largest exponents of two rows differ by more than the range of a float."""
    z1, z2 = views(150, 6, noise=2.0)
    z1[7] = z2[7] = z1[3]
    expected = evaluate(loss, "plain", z1, z2, temperature)
    actual = evaluate(loss, backend[0], *(z.float().to(backend[1]) for z in (z1, z2)), temperature)
    assert_all_close(actual, expected, 4e-7 / temperature)


# ---- extremes


@losses
@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_contrast(backend, loss, dtype, n):
    result = evaluate(loss, backend[0], *(z.to(backend[1]) for z in views(n, 3, dtype=dtype)), 0.1)
    assert result[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in result)


@losses
@backends
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e8, 1e18, 1e25])
def test_length_of_rows_does_not_matter(backend, loss, scale):
    z1, z2 = (z.float().to(backend[1]) for z in views(11, 20))
    plain = evaluate(loss, backend[0], z1, z2, 0.1)
    scaled = evaluate(loss, backend[0], z1 * scale, z2, 0.1)
    scaled[1] = scaled[1].double() * scale
    assert_all_close([x.cpu() for x in scaled], [x.cpu() for x in plain], 2e-6)


@losses
@backends
@pytest.mark.parametrize("length", [0.0, 3e-13, 1e-12])
def test_rows_shorter_than_the_least_divisor(backend, loss, length):
    z1, z2 = views(9, 5)
    z1[4] = F.normalize(z1[4], dim=0) * length
    z2[0] = 0
    expected = evaluate(loss, "plain", z1, z2, 0.1)
    actual = evaluate(loss, backend[0], *(z.to(backend[1]) for z in (z1, z2)), 0.1)
    assert_all_close(actual, expected, 1e-12)


@losses
@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n, temperature", [(1, 0.1), (6, 0.1), (120, 0.1), (120, 0.001)])
def test_nan_is_not_hidden(backend, loss, bad, n, temperature):
    for view in range(2):
        z = [z.to(backend[1]) for z in views(n, 4, dtype=torch.float32)]
        z[view][n // 2, 1] = bad
        result = evaluate(loss, backend[0], *z, temperature)
        assert result[0].isnan()
        assert result[1 + view][n // 2].isnan().all()


@losses
@backends
def test_negative_and_nan_temperature_tensors(backend, loss):
    z1, z2 = (z.to(backend[1]) for z in views(20, 8))
    assert_all_close(evaluate(loss, backend[0], z1, z2, -0.3), evaluate(loss, "plain", z1, z2, -0.3), 1e-12)
    assert evaluate(loss, backend[0], z1, z2, math.nan)[0].isnan()


# ---- dtypes, autocast, compilation


@losses
@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_widened(backend, loss, dtype):
    """Not what they are multiplied from on a GPU, which is the same; but weights are rounded there."""
    z1, z2 = (z.to(backend[1]) for z in views(30, 16, dtype=dtype))
    half = evaluate(loss, backend[0], z1, z2, 0.125)
    wide = evaluate(loss, backend[0], z1.float(), z2.float(), 0.125)
    assert half[0].dtype == torch.float32
    if backend != ("native", "cpu"):
        torch.testing.assert_close(half[0], wide[0], rtol=1e-5, atol=0)
        once_rounded = 1e-5 + torch.finfo(dtype).eps / 2  # a temperature's gradient has its dtype
        torch.testing.assert_close(half[3].float(), wide[3], rtol=once_rounded, atol=0)
        assert_all_close(half, wide, TOLERANCE[dtype])
        return
    for a, b in zip(half, wide, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0)


@losses
@backends
def test_autocast_changes_nothing(backend, loss):
    z1, z2 = (z.to(backend[1]) for z in views(30, 16, dtype=torch.float32))
    outside = evaluate(loss, backend[0], z1, z2, 0.1)
    with torch.autocast(backend[1], dtype=torch.bfloat16):
        inside = evaluate(loss, backend[0], z1, z2, 0.1)
        reference_inside, *_ = evaluate(loss, "reference", z1, z2, 0.1)
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(reference_inside, outside[0], rtol=1e-6, atol=0)


@backends
def test_float_temperature_compiles(backend):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(a, b, temperature):
        return ops.nt_xent(a, b, temperature, impl=backend[0])

    for n, temperature in ((5, 0.1), (12, 0.3)):
        z1, z2 = (z.to(backend[1]).requires_grad_() for z in views(n, 8, dtype=torch.float32))
        compiled(z1, z2, temperature).backward()
        expected = evaluate("nt_xent", backend[0], z1, z2, temperature)
        torch.testing.assert_close(z1.grad, expected[1], rtol=1e-6, atol=1e-7)


@losses
@backends
def test_only_what_requires_a_gradient_gets_one(backend, loss):
    op, kwargs = LOSSES[loss]
    z1, z2 = (z.to(backend[1]) for z in views(8, 4))
    temperature = torch.tensor([[0.2]], dtype=torch.float64, device=backend[1], requires_grad=True)
    (3 * getattr(ops, op)(z1, z2, temperature, **kwargs, impl=backend[0])).backward()
    assert temperature.grad.shape == (1, 1)
    expected = 3 * evaluate(loss, "plain", z1.cpu(), z2.cpu(), 0.2)[3]
    torch.testing.assert_close(temperature.grad.cpu().reshape(()), expected, rtol=1e-12, atol=0)


# ---- what the losses are


def test_reference_is_cross_entropy():
    n = 13
    z1, z2 = views(n, 6)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.t() / 0.3).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(
        reference.nt_xent(z1, z2, 0.3), F.cross_entropy(s, torch.arange(2 * n).roll(n))
    )
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t() / 0.3
    one, other = (F.cross_entropy(m, torch.arange(n)) for m in (s, s.t()))
    torch.testing.assert_close(reference.info_nce(z1, z2, 0.3), (one + other) / 2)
    torch.testing.assert_close(reference.info_nce(z1, z2, 0.3, symmetric=False), one)


sizes = st.tuples(st.integers(2, 110), st.integers(2, 9), st.sampled_from([0.004, 0.05, 0.2, 3.0]))


@losses
@backends
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=sizes, seed=st.integers(0, 1000))
def test_order_of_the_samples_does_not_matter(backend, loss, size, seed):
    n, d, temperature = size
    z1, z2 = (z.to(backend[1]) for z in views(n, d, noise=2.0, seed=seed))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(backend[1])
    value, dz1, dz2, dt = evaluate(loss, backend[0], z1, z2, temperature)
    permuted = evaluate(loss, backend[0], z1[order], z2[order], temperature)
    expected = [x.cpu() for x in (value, dz1[order], dz2[order], dt)]
    assert_all_close([x.cpu() for x in permuted], expected, 1e-11, floor=1e-12)


@backends
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=sizes, seed=st.integers(0, 1000))
def test_views_are_symmetric(backend, size, seed):
    n, d, temperature = size
    z1, z2 = (z.to(backend[1]) for z in views(n, d, noise=2.0, seed=seed))
    for loss in ("nt_xent", "info_nce"):
        value, dz1, dz2, dt = (x.cpu() for x in evaluate(loss, backend[0], z1, z2, temperature))
        swapped = [x.cpu() for x in evaluate(loss, backend[0], z2, z1, temperature)]
        assert_all_close(swapped, [value, dz2, dz1, dt], 1e-11, floor=1e-12)
    there = evaluate("info_nce_one_way", backend[0], z1, z2, temperature)
    back = evaluate("info_nce_one_way", backend[0], z2, z1, temperature)
    back[1], back[2] = back[2], back[1]
    mean = [(a + b).cpu() / 2 for a, b in zip(there, back, strict=True)]
    both = [x.cpu() for x in evaluate("info_nce", backend[0], z1, z2, temperature)]
    assert_all_close(both, mean, 1e-11, floor=1e-12)


# ---- determinism


@losses
@backends
@pytest.mark.parametrize("n, temperature", [(500, 0.1), (500, 0.005), (2000, 0.1)])
def test_any_number_of_threads_gives_the_same_bits(backend, loss, n, temperature):
    z1, z2 = (z.to(backend[1]) for z in views(n, 20, noise=2.0, dtype=torch.float32))
    results = []
    for count in (1, 2, 3, 8, 2):
        with threads(count):
            results.append(evaluate(loss, backend[0], z1, z2, temperature))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@losses
@backends
def test_many_blocks(backend, loss):
    """So many that several make up a task."""
    z1, z2 = views(1830, 3)
    expected = evaluate(loss, "plain", z1, z2, 0.1)
    actual = evaluate(loss, backend[0], *(z.to(backend[1]) for z in (z1, z2)), 0.1)
    assert_all_close(actual, expected, 1e-11)
