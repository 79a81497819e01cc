"""csrc/cuda/nt_xent*.cu on the host, under the orchestrators that call them on a GPU: whole losses, both passes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crosspoint.ops import reference
from crosspoint.ops._gpu import nt_xent as pairs
from crosspoint.ops._gpu import nt_xent_visit as visits
from crosspoint.ops._gpu import sup_con as labelled
from crosspoint.testing import TOLERANCE
from simt_harness import ROOT, Device, SimtError, builds_here
from simt_leaves import SimtLeaves

# (seed, resident blocks); the slower builds look for other things than values.
ORDERS = {"plain": [(0, 1), (1, 2)], "watch": [(4, 2)], "sanitized": [(1, 2)]}
TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture(scope="module", params=builds_here())
def device(request):
    names = ("nt_xent", "nt_xent_backward", "nt_xent_plain", "nt_xent_wgmma")
    sources = [
        Path(__file__).with_name("nt_xent_entry.cpp"),
        *(ROOT / "csrc" / "cuda" / f"{n}.cu" for n in names),
    ]
    return Device(sources, request.param)


class Leaves(SimtLeaves):
    """The leaves of csrc/torch/cuda/nt_xent.cpp."""

    order, prefix = 0, ""  # of RowOrder; of the passes' names

    def normalise(self, z, product, rows, scale):
        sizes = (TYPES.index(z.dtype), *z.shape)
        self.run(
            "normalise", *sizes, z, product, self.order, rows.shape[1], rows, scale, filled=(rows, scale)
        )

    def positives(self, left, right, partner, cosine):
        sizes = (TYPES.index(left.dtype), *left.shape)
        self.run("positives", *sizes, left, right, partner, cosine, filled=(cosine,))

    def row_sums(self, rows, scale, temperature, labels, target, product, first_row, within_views, sums):
        parts, _, views, count = sums.shape
        self.run(
            *(f"{self.prefix}row_sums", product, *rows.shape, rows, scale, temperature, labels, target),
            *(int(within_views), first_row, count, parts, views, sums),
            filled=(sums,),
        )

    def gradient(
        self,
        rows,
        scale,
        temperature,
        exponents,
        labels,
        target,
        product,
        first_row,
        within_views,
        partial,
        moments,
    ):
        _, parts, count, _ = partial.shape
        self.run(
            *(f"{self.prefix}gradient", product, *rows.shape, rows, scale, temperature, labels, target),
            *(int(within_views), first_row, count, parts, exponents, partial, moments),
            filled=(partial, moments),
        )

    def finish(self, partial, z, other, partner, pull, factors, first_row, dz):
        sizes = (TYPES.index(z.dtype), *z.shape)
        self.run(
            *("finish", *sizes, z, other, first_row, partial.shape[1], partial.shape[0], partial.shape[2]),
            *(partial, partner, pull, factors, dz),
            filled=(dz,),
        )


class WgmmaLeaves(Leaves):
    order, prefix = 1, "wgmma_"


def case(
    loss="nt_xent", n=37, d=20, *, dtype="float32", temperature=0.1, noise=0.7, ranges=None, seed=0, least=512
):
    """Embeddings of two views, or rows with labels, and the ranges of rows that are computed apart."""
    generator = torch.Generator().manual_seed(1000 * n + d + seed)
    base, other = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    lengths = torch.rand(2, n, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    z = (torch.stack([base, base + noise * other]) * lengths).to(getattr(torch, dtype))
    labels = None
    if loss == "sup_con":
        # Labels of one, of two, and of several rows.
        labels = torch.randint(0, n, (n,), generator=generator).clamp(n // 3)
        z = z[:1]
    return SimpleNamespace(
        loss=loss,
        z=list(z),
        labels=labels,
        temperature=torch.tensor(temperature, dtype=torch.float64 if dtype == "float64" else torch.float32),
        ranges=ranges or [(0, n)],
        least=least,
    )


def run(device: Device, c: SimpleNamespace, order: tuple[int, int], kernels=Leaves) -> list[Tensor]:
    """The loss, the gradients of the embeddings, and that of the temperature."""
    device.configure(*order)
    leaves, grad = kernels(device), torch.tensor(1.5, dtype=c.temperature.dtype)
    if c.loss == "sup_con":
        z, labels, t = c.z[0], c.labels, c.temperature
        found = [labelled.forward(leaves, z, labels, t, *rows) for rows in c.ranges]
        scalars = [torch.cat([f[i] for f in found]) for i in (1, 2)]
        counted = (scalars[1] != torch.inf).sum().clamp_min(1)
        loss = scalars[0].double().sum() / counted
        gradients = [labelled.backward(leaves, grad, z, labels, t, *scalars, *rows) for rows in c.ranges]
    else:
        settings = (c.loss == "nt_xent", c.loss != "one_way")
        found = [pairs.forward(leaves, *c.z, c.temperature, *settings, *rows) for rows in c.ranges]
        row_losses = torch.cat([f[1] for f in found], dim=1)
        loss = row_losses.double().sum() / (row_losses.shape[1] * (1 + settings[1]))
        gradients = [
            pairs.backward(leaves, grad, *c.z, c.temperature, row_losses, *settings, *rows)
            for rows in c.ranges
        ]
    if len(c.ranges) == 1:
        torch.testing.assert_close(found[0][0].double(), loss, rtol=1e-6, atol=0, equal_nan=True)
    *dz, dtemperature = zip(*gradients, strict=True)
    return [loss, *map(torch.cat, dz), torch.stack(dtemperature).sum()]


def expected_of(c: SimpleNamespace) -> list[Tensor]:
    leaves = [x.to(torch.float64, copy=True).requires_grad_() for x in (*c.z, c.temperature)]
    if c.loss == "sup_con":
        loss = reference.sup_con(leaves[0], c.labels, leaves[1])
    elif c.loss == "nt_xent":
        loss = reference.nt_xent(*leaves)
    else:
        loss = reference.info_nce(*leaves, symmetric=c.loss == "info_nce")
    return [loss.detach(), *(1.5 * g for g in torch.autograd.grad(loss, leaves))]


def check(
    device: Device, c: SimpleNamespace, monkeypatch, tolerance: float | None = None, kernels=Leaves
) -> None:
    monkeypatch.setattr(pairs, "_LEAST_COLUMNS", c.least)
    found = [run(device, c, order, kernels) for order in ORDERS[device.kind]]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    expected = expected_of(c)
    names = ("loss", *(f"dz{i + 1}" for i in range(len(c.z))), "dtemperature")
    for name, a, e in zip(names, found[0], expected, strict=True):
        scale = e.abs().max().item()
        error = (a.double() - e).abs().max().item() / scale
        print(f"{device.kind} {c.loss} {c.z[0].dtype} {name}: {error:.1e} (largest {scale:.1e})")
        limit = TOLERANCE[c.z[0].dtype] if tolerance is None else tolerance
        assert error <= limit, f"{name}: relative error {error:.1e}"


SMALL = {
    **{
        f"{loss}-{dtype}": case(loss, dtype=dtype)
        for loss in ("nt_xent", "sup_con")
        for dtype in ("bfloat16", "float16", "float32", "float64")
    },
    "info_nce": case("info_nce", n=21),
    "one_way": case("one_way", n=21, dtype="float16"),
    "ranges": case(n=25, ranges=[(0, 11), (11, 0), (11, 14)], dtype="bfloat16"),
    "ranges_of_one_set": case("sup_con", n=25, ranges=[(0, 11), (11, 14)]),
    "two_samples": case(n=2, d=3),
    "two_channels": case(n=9, d=2, dtype="float64"),
    "several_tiles": case(n=100, d=9, dtype="float16"),
    "wider_than_tiles": case(n=5, d=1030),
    "wider_than_tiles_in_halves": case("sup_con", n=9, d=1030, dtype="bfloat16"),
}
# More work than the watched build does in a few seconds: several blocks and tiles, in each size of them.
LARGE = {
    "bfloat16_128": case(n=150, d=100, dtype="bfloat16", ranges=[(0, 75), (75, 75)], least=100),
    "bfloat16_256": case(n=101, d=256, dtype="bfloat16", temperature=0.07),
    "float16_256": case("info_nce", n=140, d=130, dtype="float16", ranges=[(0, 1), (1, 139)]),
    "float16_640": case("sup_con", n=140, d=600, dtype="float16", least=64),
    "float32_256": case(n=101, d=131, temperature=0.07, least=100),
    "float32_512": case(n=40, d=400),
    "float32_1024": case(n=40, d=1000),
    "bfloat16_1024": case("one_way", n=140, d=1001, dtype="bfloat16"),
    "float64": case("sup_con", n=70, d=50, dtype="float64", least=16),
    "cold_float64": case(n=40, d=16, dtype="float64", temperature=0.001),
}


@pytest.mark.parametrize("name", SMALL)
def test_small(device, name, monkeypatch):
    check(device, SMALL[name], monkeypatch)


@pytest.mark.parametrize("name", LARGE)
def test_large(device, name, monkeypatch):
    if device.kind == "plain":
        check(device, LARGE[name], monkeypatch)


# Widths 64, 128 and 256, of views whose last tile is full or not, and with fewer or more tiles than there are stages.
WGMMA = {
    "bfloat16_64": case(n=37, d=50, dtype="bfloat16"),
    "float16_64": case("sup_con", n=41, d=64, dtype="float16"),
    "one_way_64": case("one_way", n=21, d=33, dtype="bfloat16"),
    "ranges": case("info_nce", n=45, d=50, dtype="bfloat16", ranges=[(0, 11), (11, 0), (11, 34)]),
}
WGMMA_LARGE = {
    "many_tiles_64": case(n=270, d=40, dtype="float16", temperature=0.07),
    "full_tiles_128": case(n=128, d=100, dtype="bfloat16"),
    "parts_256": case(
        n=150, d=256, dtype="bfloat16", temperature=0.07, least=100, ranges=[(0, 75), (75, 75)]
    ),
    "labels_256": case("sup_con", n=300, d=200, dtype="bfloat16"),
    "across_256": case("info_nce", n=140, d=130, dtype="float16", ranges=[(0, 1), (1, 139)]),
    "cold_128": case(n=140, d=128, dtype="float16", temperature=0.005, noise=2.0),
}


@pytest.mark.parametrize("name", [*WGMMA, *WGMMA_LARGE])
def test_wgmma(device, name, monkeypatch):
    if name in WGMMA or device.kind == "plain":
        c = {**WGMMA, **WGMMA_LARGE}[name]
        cold = exponent_error(0.005) if name.startswith("cold") else 0
        check(device, c, monkeypatch, TOLERANCE[c.z[0].dtype] + cold, WgmmaLeaves)


# Rows, columns that visit them, channels; rows that end within a tile of columns, or with one.
VISITS = {
    "bfloat16_64": (37, 45, 50, "bfloat16", Leaves),
    "float32": (21, 70, 20, "float32", Leaves),
    "float64": (9, 20, 5, "float64", Leaves),
    "wgmma_64": (45, 50, 33, "bfloat16", WgmmaLeaves),
    "wgmma_full_tiles_64": (128, 20, 64, "float16", WgmmaLeaves),
}
VISITS_LARGE = {
    "bfloat16_256": (150, 260, 256, "bfloat16", Leaves),
    "wgmma_parts_128": (150, 300, 128, "bfloat16", WgmmaLeaves),
}


@pytest.mark.parametrize("name", [*VISITS, *VISITS_LARGE])
def test_columns_that_visit(device, name, monkeypatch):
    if name in VISITS_LARGE and device.kind != "plain":
        return
    n, m, d, dtype, kernels = {**VISITS, **VISITS_LARGE}[name]
    monkeypatch.setattr(pairs, "_LEAST_COLUMNS", 100)
    z, columns = case(n=n, d=d, dtype=dtype).z[0], case(n=m, d=d, dtype=dtype, seed=1).z[1]
    t = torch.tensor(0.1, dtype=torch.float64 if dtype == "float64" else torch.float32)
    u, v = (F.normalize(x.double(), dim=1) for x in (z, columns))
    s = u @ v.t() / t.double()
    row_lse, column_lse = s.amax(1) + 10, s.amax(0) + 10
    row_lse[::4], column_lse[::5] = torch.inf, torch.inf
    w = torch.exp(s - row_lse[:, None]) + torch.exp(s - column_lse)
    expected = [s.logsumexp(1), w @ v, (w * s).sum()]
    scalars = row_lse, column_lse, torch.tensor(-10, dtype=torch.float64).exp()
    for order in ORDERS[device.kind]:
        device.configure(*order)
        leaves = kernels(device)
        found = [
            visits.forward(leaves, z, columns, t),
            *visits.backward(leaves, z, columns, t, *scalars),
        ]
        for name, a, e in zip(("lse", "sums", "moment"), found, expected, strict=True):
            error = (a.double() - e).abs().max() / e.abs().max()
            assert error <= TOLERANCE[z.dtype], f"{name}: relative error {error:.1e}"


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def aligned(n: int, d: int, noise: float) -> list[Tensor]:
    """Unit rows whose pairs point much the same way, as late in training."""
    generator = torch.Generator().manual_seed(0)
    base, *others = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    base = F.normalize(base, dim=1)
    return [F.normalize(base + noise * x / d**0.5, dim=1).float() for x in others]


def rounded(x: Tensor, product: str) -> Tensor:
    """As the product rounds float32: to bfloat16, or ten digits after the point."""
    if product == "bf16":
        return x.bfloat16().double()
    unit = torch.exp2(x.abs().clamp_min(1e-30).log2().floor() - 10)
    return (x / unit).round() * unit if product == "tf32" else x


def emulated(c: SimpleNamespace, product: str) -> Tensor:
    """The gradients of nt_xent in float64, but for what is rounded before a product: rows, and weights."""
    z, t, n = torch.cat(c.z).double(), c.temperature.double(), len(c.z[0])
    length = z.norm(dim=1)
    power = torch.exp2(-length.log2().floor())
    rows, scale = rounded(z * power[:, None], product), 1 / (length * power)
    partner = torch.arange(2 * n).roll(n)
    unit = z / length[:, None]
    positive = (unit * unit[partner]).sum(1) / t
    s = (rows @ rows.t()) * scale[:, None] * scale / t
    s.fill_diagonal_(-torch.inf)[torch.arange(2 * n), partner] = -torch.inf
    losses = F.softplus(s.logsumexp(1) - positive)
    q, lse = -torch.expm1(-losses), positive + losses
    w = rounded((torch.exp(s - lse[:, None]) + torch.exp(s - lse)) * scale, product)
    v = w @ rows - (q + q[partner])[:, None] * unit[partner]
    return (v - (v * unit).sum(1, keepdim=True) * unit) / length[:, None] * 1.5 / (2 * n * t)


@pytest.mark.parametrize("product", ["bf16", "tf32", "tf32x3"])
@pytest.mark.parametrize("temperature, noise", [(0.5, 1.0), (0.07, 0.3)])
def test_nothing_is_rounded_but_rows_and_weights(device, product, temperature, noise, monkeypatch):
    """The rest is float32, in which exponents are off by `exponents` (see test_low_temperature), and sums by 1e-6. Of
    weights spaced by `spacing`, 2 exponents / spacing are therefore rounded to the other side, off by all of it and not
    by its twelfth's root as others are on average: that part of what rounding costs is another's."""
    if device.kind != "plain":
        return
    monkeypatch.setattr(pairs, "product_of", lambda dtype: product)
    c = case(n=100, temperature=temperature)
    c.z = aligned(100, 128, noise)
    found, expected = torch.cat(run(device, c, (0, 1))[1:3]), torch.cat(expected_of(c)[1:3])
    rounding = relative_error(emulated(c, product), expected)
    spacing = {"bf16": 2.0**-8, "tf32": 2.0**-11, "tf32x3": 1.0}[product]
    other = math.sqrt(12 * 2 * exponent_error(temperature) / spacing)
    assert relative_error(found, emulated(c, product)) <= 1e-6 + other * rounding
    if product == "tf32x3":
        assert relative_error(found, expected) <= 1e-6


def exponent_error(temperature: float) -> float:
    """Exponents are float32 and up to log2(e) / t in size: each of the eight roundings that one goes through may be
    2^-24 of that, and the weight it makes is off by log(2) times it."""
    return 8 * math.log2(math.e) / temperature * 2.0**-24 * math.log(2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("loss", ["nt_xent", "sup_con"])
def test_low_temperature(device, loss, dtype, monkeypatch):
    c = case(loss, n=33, d=40, dtype=dtype, temperature=0.005, noise=2.0)
    check(device, c, monkeypatch, TOLERANCE[c.z[0].dtype] + exponent_error(0.005))


def test_rows_of_any_length(device, monkeypatch):
    """Those shorter than 1e-12 are divided by 1e-12, and their gradient is not projected."""
    c = case(n=12, d=24, temperature=0.3)
    c.z[0][3] *= 1e-14
    c.z[1][5] = 0
    c.z[0][7] *= 1e25
    c.z[1][8] *= 1e-10
    expected = expected_of(c)
    found = run(device, c, ORDERS[device.kind][0])
    for a, e in zip(found, expected, strict=True):
        e = e.view(e.shape[0] if e.dim() else 1, -1)
        error = (a.double().view_as(e) - e).abs().amax(1) / e.abs().amax(1)
        assert error.max() <= TOLERANCE[torch.float32], error


def test_not_a_number(device):
    """A row that is not finite has none, nor have the rows that are contrasted with it."""
    c = case(n=9, d=5, temperature=0.3)
    c.z[0][3, 2] = float("nan")
    c.z[1][4, 1] = float("inf")
    for found in run(device, c, ORDERS[device.kind][0]):
        assert found.isnan().all()


def test_one_sample_has_nothing_to_be_contrasted_with(device):
    for loss in ("nt_xent", "info_nce", "sup_con"):
        for dtype in ("float32", "float64"):
            for found in run(device, case(loss, n=1, d=4, dtype=dtype), ORDERS[device.kind][0]):
                assert (found == 0).all()


def test_rows_too_many_to_count_are_refused(device):
    wide = torch.zeros(1)
    with pytest.raises(SimtError, match="cannot run this"):
        Leaves(device).run(
            *("row_sums", 0, 2, 2**30, 16, wide, wide, wide, None, None, 1, 0, 1, 1, 1, wide), filled=(wide,)
        )
