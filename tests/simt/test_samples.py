"""The harness runs correct kernels correctly in every order of threads and blocks, and finds no fault with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from simt_harness import Device, builds_here

ORDERS = [(0, 1), (1, 1), (2, 3), (5, 8)]  # (seed, resident blocks)


@pytest.fixture(scope="module", params=builds_here())
def library(request):
    return Device([Path(__file__).with_name("samples.cu")], request.param)


@pytest.fixture(params=ORDERS, ids=lambda order: f"seed{order[0]}-resident{order[1]}")
def device(library, request):
    library.configure(*request.param)
    yield library
    library.free()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_sum_by_the_last_block(device, rng):
    x = rng.integers(-8, 8, 1000).astype(np.float32)  # small whole numbers add up exactly in any order
    total = device.output(1, np.float32, "total")
    ticket = device.output(1, np.uint32, "ticket")
    device.call("sample_sum", device.input(x), 1000, 5, device.output(5, np.float32), ticket, total)
    assert total[0] == x.sum()


def test_scan_by_shuffles(device, rng):
    x = rng.integers(0, 100, (3, 77)).astype(np.int32)
    y = device.output(x.shape, np.int32)
    device.call("sample_scan", device.input(x), 3, 77, y)
    np.testing.assert_array_equal(y, x.cumsum(1))


def test_transpose_through_shared_memory(device, rng):
    x = rng.random((45, 70), dtype=np.float32)
    y = device.output((70, 45), np.float32)
    device.call("sample_transpose", device.input(x), 45, 70, y)
    np.testing.assert_array_equal(y, x.T)


def test_histogram_by_ballots_and_atomics(device, rng):
    x = rng.integers(0, 7, 500).astype(np.int32)
    counts = device.output(7, np.int32)
    device.call("sample_histogram", device.input(x), 500, 7, counts)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=7))


def test_bf16_product_by_ldmatrix_and_delayed_copies(device):
    torch.manual_seed(0)
    a, b = torch.randn(32, 48).bfloat16(), torch.randn(16, 48).bfloat16()
    c = device.output((32, 16), np.float32)
    bits = [device.input(m.view(torch.uint16).numpy()) for m in (a, b)]
    device.call("sample_product_bf16", *bits, 32, 16, 48, c)
    torch.testing.assert_close(torch.from_numpy(c), a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def test_tf32_product(device):
    torch.manual_seed(0)
    a, b = torch.randn(32, 24), torch.randn(16, 24)
    c = device.output((32, 16), np.float32)
    device.call("sample_product_tf32", device.input(a.numpy()), device.input(b.numpy()), 32, 16, 24, c)
    expected = a @ b.T
    assert not torch.allclose(torch.from_numpy(c), expected, rtol=1e-6, atol=1e-6)  # operands are rounded
    torch.testing.assert_close(torch.from_numpy(c), expected, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_types(device, dtype):
    # Every 61st number of the type, those midway to the next, those beside them, and both zeros.
    held = torch.arange(-32768, 32768, 61, dtype=torch.int16).view(dtype).float()
    step = torch.arange(-32767, 32769, 61).to(torch.int16).view(dtype).float()
    midway = ((held.double() + step.double()) / 2).float()
    around = [midway, torch.nextafter(midway, held), torch.nextafter(midway, step)]
    x = torch.cat([torch.tensor([0.0, -0.0, 65519.9, 65520.0, -1e9]), held, *around])
    bits = [device.output(len(x), np.uint16, name) for name in ("half", "bf16")]
    back = [device.output(len(x), np.float32, name) for name in ("from_half", "from_bf16")]
    device.call("sample_round_trip", device.input(x.numpy()), len(x), *bits, *back)
    which = (torch.float16, torch.bfloat16).index(dtype)
    found, expected = torch.from_numpy(bits[which]).view(torch.int16), x.to(dtype)
    there = ~x.isnan()
    assert torch.equal(found[there], expected.view(torch.int16)[there])
    assert np.isnan(back[which][~there]).all()
    assert torch.equal(torch.from_numpy(back[which])[there], expected.float()[there])


def test_what_ran_is_counted(device, rng):
    before = device.counts()
    test_transpose_through_shared_memory(device, rng)
    after = device.counts()
    assert after["launches"] == before["launches"] + 1
    assert (
        after["switches"] - before["switches"] >= 2 * 6 * 256
    )  # each thread starts, and comes back from the barrier
    watched = after["watched"] - before["watched"]
    assert watched == (4 * 45 * 70 if device.kind == "watch" else 0)
