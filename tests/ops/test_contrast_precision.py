"""What rounded products cost the contrastive losses, and what they cost the usual form."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crosspoint import ops
from crosspoint.ops import reference
from op_tester import compiled_backends

N, D = 1024, 256
# torch's setting for products of float32 -> the name of what they are rounded to.
SETTINGS = {"medium": "bf16", "high": "tf32", "highest": "float32"}
# Temperature, what is rounded to -> the largest error of the gradient; and the least that the usual form has.
LIMITS = {
    (0.1, "bf16"): (3e-4, 1e-2),
    (0.1, "tf32"): (4e-5, 1e-3),
    (0.1, "float32"): (1e-6, 2e-6),
    (0.07, "bf16"): (4e-4, 0.5),
    (0.07, "tf32"): (5e-5, 5e-2),
    (0.07, "float32"): (1e-6, 5e-5),
}
limits = pytest.mark.parametrize(
    "temperature, rounding", LIMITS, ids=[f"{temperature}-{rounding}" for temperature, rounding in LIMITS]
)


def rounded(x: Tensor, rounding: str) -> Tensor:
    """float32 to the nearest of 8 or 11 significant bits."""
    if rounding == "float32":
        return x
    dropped = {"bf16": 16, "tf32": 13}[rounding]
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)


def aligned_pairs() -> Tensor:
    """Unit rows of two views of N samples, as close as they are late in training: cosines of 0.9."""
    generator = torch.Generator().manual_seed(0)

    def unit(x):
        return F.normalize(x.double(), dim=1)

    base = unit(torch.randn(N, D, generator=generator))
    return torch.cat([unit(base + 0.3 * torch.randn(N, D, generator=generator) / D**0.5) for _ in range(2)])


def exact(z: Tensor, temperature: float) -> Tensor:
    leaf = z.clone().requires_grad_()
    reference.nt_xent(leaf[:N], leaf[N:], temperature).backward()
    return leaf.grad


def from_rounded_products(z: Tensor, temperature: float, rounding: str, *, positive_apart: bool) -> Tensor:
    """The gradient from float32 and products of rounded operands, in the usual form, softmax Z - z_p, or in ours."""
    z, pair, own = z.float(), torch.arange(2 * N).roll(N), torch.arange(2 * N)
    narrow = rounded(z, rounding)
    s = narrow @ narrow.t() / temperature
    positive = (z * z[pair]).sum(1) / temperature
    s[own, own] = -torch.inf
    missing = torch.ones(2 * N)
    if positive_apart:
        s[own, pair] = -torch.inf
        missing = -torch.expm1(-F.softplus(s.logsumexp(1) - positive))
    softmax = torch.exp(s - s.logsumexp(1, keepdim=True)) * missing[:, None]
    pull = (missing + missing[pair])[:, None]
    dz = (rounded(softmax + softmax.t(), rounding) @ narrow - pull * z[pair]) / (2 * N * temperature)
    return dz - (dz * z).sum(1, keepdim=True) * z


def error(dz: Tensor, expected: Tensor) -> float:
    return ((dz.double().cpu() - expected).norm() / expected.norm()).item()


@limits
def test_positive_apart_keeps_what_the_usual_form_loses(temperature, rounding):
    z, (most, least) = aligned_pairs(), LIMITS[temperature, rounding]
    expected = exact(z, temperature)
    ours, usual = (
        error(from_rounded_products(z, temperature, rounding, positive_apart=apart), expected)
        for apart in (True, False)
    )
    assert ours < most
    assert usual >= least


def multiply_cut(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """total + x y' of 8 channels, as badly as tensor cores may: each addend, and the sum, are cut to the 24 bits of the
    largest addend."""
    addends = torch.cat([x[:, None] * y[None], total[..., None]], -1)
    unit = torch.exp2(torch.frexp(addends.abs().amax(-1))[1].double() - 24)
    total = ((addends / unit[..., None]).trunc() * unit[..., None]).sum(-1)
    unit = torch.exp2(torch.frexp(total)[1].double() - 24)
    return (total / unit).trunc() * unit


def test_three_products_of_tf32_lose_no_more_than_float32():
    """Cosines as the kernels add them up in their truth mode: products of low digits apart from those of high ones, 32
    channels on tensor cores, the rest in float32. Their error, over the temperature, is what weights are off by."""
    z = aligned_pairs().float()
    x, y = z[:48], z[N + 16 : N + 64]
    pairs = [[rounded(part, "tf32") for part in (v, v - rounded(v, "tf32"))] for v in (x, y)]
    (x_high, x_low), (y_high, y_low) = ([part.double() for part in pair] for pair in pairs)
    found = torch.zeros(48, 48)
    for first in range(0, D, 32):
        high, low = torch.zeros(2, 48, 48, dtype=torch.float64)
        for c in (slice(k, k + 8) for k in range(first, first + 32, 8)):
            low = multiply_cut(x_low[:, c], y_high[:, c], low)
            low = multiply_cut(x_high[:, c], y_low[:, c], low)
            high = multiply_cut(x_high[:, c], y_high[:, c], high)
        found += high.float() + low.float()
    exact, own = x.double() @ y.double().t(), torch.eye(48).roll(16, 0)
    negatives = own == 0  # positives' cosines are formed apart, in float64
    cut, plain = ((c.double() - exact)[negatives] for c in (found, sum_in_order(x, y)))
    assert 0 < cut.square().mean().sqrt() < plain.square().mean().sqrt()
    assert cut.abs().max() < 2.0**-24


def sum_in_order(x: Tensor, y: Tensor) -> Tensor:
    """x y' in float32, channel by channel."""
    total = torch.zeros(len(x), len(y))
    for c in range(x.shape[1]):
        total = total + x[:, c, None] * y[None, :, c]
    return total


@pytest.fixture
def setting():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


# A CPU multiplies float32 as it is, whatever the setting allows; interpreted kernels round as they are told to.
BACKENDS = [pair for pair in compiled_backends("nt_xent") if pair != ("native", "cpu")]
NONE = pytest.param(None, marks=pytest.mark.skip(reason="needs a GPU; make interpret runs it on a CPU"))
on_gpu_kernels = pytest.mark.parametrize("backend", BACKENDS or [NONE], ids="-".join if BACKENDS else None)


@on_gpu_kernels
@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_of_aligned_pairs(setting, backend, name):
    setting(name)
    z, temperature = aligned_pairs(), 0.07
    leaf = z.float().to(backend[1]).requires_grad_()
    ops.nt_xent(leaf[:N], leaf[N:], temperature, impl=backend[0]).backward()
    assert error(leaf.grad, exact(z, temperature)) < LIMITS[temperature, SETTINGS[name]][0]


@on_gpu_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_multiplied_as_they_are(backend, dtype):
    """The loss is that of float32: a row is scaled by a power of two, not by its length, before it is multiplied."""
    z = (3.7 * aligned_pairs()).to(dtype).to(backend[1])
    halves = z.clone().requires_grad_()
    value = ops.nt_xent(halves[:N], halves[N:], 0.07, impl=backend[0])
    expected = reference.nt_xent(z[:N].double(), z[N:].double(), 0.07)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
