"""The operators of the contrastive losses on a range of rows: what one process of several computes."""

import pytest
import torch
from torch import Tensor

from crosspoint.ops import _dispatch, reference
from op_tester import compiled_backends, poisoned_memory, threads

BACKENDS = compiled_backends("nt_xent")
NATIVE = [pair for pair in BACKENDS if pair[0] == "native"]
# Samples of each process; blocks have 96 rows.
SPLITS = [[40], [1, 5], [0, 7, 0], [96, 96], [95, 97, 3], [200, 1, 130], [500, 700], [0, 0]]
# Interpreted kernels take the smaller ones.
CASES = [(b, s) for b in BACKENDS for s in SPLITS if b != ("triton", "cpu") or sum(s) <= 200]
losses = pytest.mark.parametrize(
    "within, symmetric", [(True, True), (False, True), (False, False)], ids=["nt_xent", "info_nce", "one_way"]
)


def ranges(split: list[int]) -> list[tuple[int, int]]:
    ends = torch.tensor(split).cumsum(0).tolist()
    return [(end - rows, rows) for end, rows in zip(ends, split, strict=True)]


def expected(within: bool, symmetric: bool, z: Tensor, temperature: Tensor) -> list[Tensor]:
    leaves = [*(view.clone().requires_grad_() for view in z), temperature.clone().requires_grad_()]
    loss = reference.nt_xent(*leaves) if within else reference.info_nce(*leaves, symmetric=symmetric)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def by_parts(impl, split, within, symmetric, z, temperature) -> list[Tensor]:
    """Loss and gradients from the rows of each part alone, and the row losses of all."""
    forward, backward = (_dispatch.operator(name, impl) for name in ("nt_xent", "nt_xent_backward"))
    parts = [forward(*z, temperature, within, symmetric, *rows) for rows in ranges(split)]
    row_losses = torch.cat([row_losses for _, row_losses in parts], dim=1)
    grad = torch.ones((), dtype=temperature.dtype, device=temperature.device)
    found = [backward(grad, *z, temperature, row_losses, within, symmetric, *rows) for rows in ranges(split)]
    dz1, dz2, dtemperature = zip(*found, strict=True)
    averaged = row_losses.sum() / max(1, (1 + symmetric) * sum(split))
    return [averaged, torch.cat(dz1), torch.cat(dz2), torch.stack(dtemperature).sum()]


@losses
@pytest.mark.parametrize(
    "backend, split", CASES, ids=["-".join(b) + "-" + "+".join(map(str, s)) for b, s in CASES]
)
@pytest.mark.parametrize("temperature", [0.2, 0.001])
def test_parts_make_the_whole(backend, split, within, symmetric, temperature):
    impl, device = backend
    generator = torch.Generator().manual_seed(sum(split))
    z = torch.randn(2, sum(split), 17, generator=generator, dtype=torch.float64)
    z[1] += z[0]
    temperature = torch.tensor(temperature, dtype=torch.float64)
    want = expected(within, symmetric, z, temperature)
    with poisoned_memory():
        found = by_parts(impl, split, within, symmetric, z.to(device), temperature.to(device))
    for name, a, b in zip(("loss", "dz1", "dz2", "dtemperature"), found, want, strict=True):
        scale = b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-11 * scale, msg=lambda m, n=name: f"{n}: {m}")


# Rows, columns that visit them, and channels.
VISITS = [(1, 1, 3), (40, 7, 17), (97, 200, 33), (5, 700, 17), (300, 260, 600), (0, 4, 3), (4, 0, 3)]
VISITED = [(b, v) for b in BACKENDS for v in VISITS if b != ("triton", "cpu") or v[2] < 100]


def visit(impl: str, z: Tensor, columns: Tensor, temperature: Tensor, *scalars: Tensor) -> list[Tensor]:
    forward, backward = (
        _dispatch.operator(name, impl) for name in ("nt_xent_visit", "nt_xent_visit_backward")
    )
    return [forward(z, columns, temperature), *backward(z, columns, temperature, *scalars)]


@pytest.mark.parametrize("backend, shape", VISITED, ids=["-".join(b) + f"-{v}" for b, v in VISITED])
@pytest.mark.parametrize("temperature", [0.2, 0.001])
def test_columns_that_visit(backend, shape, temperature):
    (impl, device), (n, m, d) = backend, shape
    generator = torch.Generator().manual_seed(n + m)
    z, columns = (5 * torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, m))
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in (z, columns))
    temperature = torch.tensor(temperature, dtype=torch.float64)
    s = u @ v.t() / temperature
    # Some rows and columns have no loss; the softmaxes reach e^-10.
    row_lse, column_lse = (s.amax(dim) + 10 if s.numel() else s.sum(dim) for dim in (1, 0))
    row_lse[1::5], column_lse[::3] = torch.inf, torch.inf
    w = torch.exp(s - row_lse[:, None]) + torch.exp(s - column_lse)
    want = [s.logsumexp(1), w @ v, (w * s).sum()]
    scalars = row_lse, column_lse, torch.tensor(-10, dtype=torch.float64).exp()
    with poisoned_memory():
        found = visit(impl, *(x.to(device) for x in (z, columns, temperature, *scalars)))
    for name, a, b in zip(("lse", "sums", "moment"), found, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = b.abs().max().item() if b.numel() and m else 0
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-11 * scale, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("device", [device for _, device in NATIVE])
def test_visits_are_the_same_bits_with_any_number_of_threads(device):
    z, columns = torch.randn(900, 12, device=device), torch.randn(700, 12, device=device)
    row_lse, column_lse = (
        torch.full((len(x),), 8.0, dtype=torch.float64, device=device) for x in (z, columns)
    )
    given = torch.tensor(0.1, device=device), row_lse, column_lse, row_lse.new_ones(())
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            results.append(visit("native", z, columns, *given))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("device", [device for _, device in NATIVE])
@losses
def test_parts_are_the_same_bits_with_any_number_of_threads(device, within, symmetric):
    z = torch.randn(2, 1500, 12, device=device)
    temperature = torch.tensor(0.1, device=device)
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            results.append(by_parts("native", [900, 250, 350], within, symmetric, z, temperature))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
