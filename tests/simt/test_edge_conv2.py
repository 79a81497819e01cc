"""csrc/cuda/edge_conv2*.cu on the host, under the orchestrator that calls them on a GPU: whole layers, both passes."""

import ctypes
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conv_leaves import ConvLeaves
from torch import Tensor

from crosspoint.ops import reference
from crosspoint.ops._gpu import edge_conv2 as orchestrator
from crosspoint.testing import TOLERANCE
from op_tester import assert_close
from simt_harness import ROOT, Device, builds_here

ORDERS = {"plain": [(0, 1), (1, 2)], "watch": [(4, 2)], "sanitized": [(1, 2)]}


@pytest.fixture(scope="module", params=builds_here())
def device(request):
    names = (
        "edge_conv2",
        "edge_conv2_backward",
        "edge_conv",
        "edge_conv_backward",
        "edge_layer",
        "reverse_graph",
        "radix_sort",
    )
    entries = [Path(__file__).with_name(f"{name}_entry.cpp") for name in ("edge_conv2", "edge_conv")]
    device = Device([*entries, *(ROOT / "csrc" / "cuda" / f"{name}.cu" for name in names)], request.param)
    device.library.reverse_graph_bytes.restype = ctypes.c_int64
    return device


class Tiles(ctypes.Structure):
    """`Tiles` of edge_conv2_entry.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("is_double", "batch", "n", "k", "c_mid", "c_out")),
        *((name, ctypes.c_void_p) for name in ("idx", "nodes", "gain", "shift")),
        ("negative_slope", ctypes.c_double),
        ("product", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("g", "slot", "rows", "q")),
        ("slot_bytes", ctypes.c_int64),
        ("row_count", ctypes.c_int64),
    ]


class Leaves(ConvLeaves):
    """Those that it shares with edge_conv, and its own."""

    def tiles(self, nodes, idx, gain, shift, negative_slope, product, c_out, slot=None, **backward) -> Tiles:
        tensors = {"idx": idx, "nodes": nodes, "gain": gain, "shift": shift, "slot": slot, **backward}
        pointers = {
            name: None if t is None else self.device.input(t.numpy()).ctypes.data
            for name, t in tensors.items()
        }
        batch, n, k = idx.shape
        return Tiles(
            is_double=int(nodes.dtype == torch.float64), batch=batch, n=n, k=k, c_mid=gain.shape[0], c_out=c_out,
            negative_slope=negative_slope, product=product, slot_bytes=1 if slot is None else slot.element_size(),
            row_count=backward["rows"].shape[0] if "rows" in backward else 0, **pointers,
        )  # fmt: skip

    def edge_max(self, nodes, idx, gain, shift, weight, gamma, negative_slope, product, winner, slot, sums):
        tiles = self.tiles(nodes, idx, gain, shift, negative_slope, product, winner.shape[2])
        tiles.slot_bytes = 1 if slot is None else slot.element_size()
        sums = sums if sums.numel() else None
        self.run("tile_max", tiles, weight, gamma, winner, slot, sums, filled=(winner, slot, sums))

    def activate(self, winner, degrees, scale, shift, negative_slope, out):
        arrays = (winner.clone(), degrees, scale, shift, float(negative_slope), out)
        self.run("activate", int(out.dtype == torch.float64), *out.shape, *arrays, filled=(out,))

    def own_gradient(self, nodes, idx, gain, shift, g, slot, negative_slope, product, rows, q, routed, sums):
        backward = {"g": g, "slot": slot, "rows": rows, "q": q}
        tiles = self.tiles(nodes, idx, gain, shift, negative_slope, product, g.shape[2], **backward)
        routed.zero_()  # its first half is not the kernel's, and is copied with the rest
        self.run("own_gradient", tiles, routed, sums, given=(routed,), filled=(routed, sums))

    def neighbour_gradient(
        self, nodes, idx, gain, shift, g, slot, negative_slope, product, rows, q, start, edges, runs
    ):
        backward = {"g": g, "slot": slot, "rows": rows, "q": q}
        tiles = self.tiles(nodes, idx, gain, shift, negative_slope, product, g.shape[2], **backward)
        runs.fill_(float("nan"))  # what no run has is left alone, and must not be read
        self.run("neighbour_gradient", tiles, start, edges, runs, given=(runs,), filled=(runs,))

    def add_runs(self, runs, start, k, routed):
        batch, n, _ = routed.shape
        arguments = (int(runs.dtype == torch.float64), runs, start, batch, n, k, runs.shape[2], routed)
        self.run("add_runs", *arguments, given=(routed,), filled=(routed,))

    def edge_products(self, nodes, idx, gain, shift, g, slot, negative_slope, product, out):
        tiles = self.tiles(nodes, idx, gain, shift, negative_slope, product, g.shape[2], slot=slot, g=g)
        tiles.row_count = out.shape[2]
        self.run("products", tiles, out.shape[1], out, filled=(out,))


def block(
    batch=2, n=13, k=4, c_in=3, c_mid=6, c_out=5, *,
    mode="training", missing=0.2, seed=0, gamma2=None, slope=0.2, dtype="float32",
) -> SimpleNamespace:  # fmt: skip
    """Arguments of the reference: a random block, some edges missing, gammas of both signs."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    x = normal(batch, n, c_in) + 3
    idx = torch.randint(0, n, (batch, n, k), generator=g)
    idx = torch.where(torch.rand(batch, n, k, generator=g) < missing, -1, idx)
    weight1, gamma1, beta1 = normal(c_mid, 2 * c_in), normal(c_mid), normal(c_mid)
    weight2, beta2 = normal(c_out, c_mid), normal(c_out)
    gamma2 = normal(c_out) if gamma2 is None else torch.tensor(gamma2)
    statistics = [normal(c_mid), normal(c_mid).square() + 0.5, normal(c_out), normal(c_out).square() + 0.5]
    parameters = [x, weight1, gamma1, beta1, weight2, gamma2, beta2]
    if mode == "no_norm":
        parameters = [x, weight1, None, None, weight2, None, None]
        statistics = [None] * 4
    convert = [None if t is None else t.to(getattr(torch, dtype)) for t in (*parameters, *statistics)]
    return SimpleNamespace(
        idx=idx, parameters=convert[:7], statistics=convert[7:], training=mode == "training", slope=slope
    )


def wrong_index() -> SimpleNamespace:
    """What lies outside the cloud is no edge, and is looked at nowhere."""
    case = block(2, 11, 5, 5, 4, seed=6)
    case.idx[0, 2, 1], case.idx[1, 10, 4] = 11, -(2**62)
    return case


def hub() -> SimpleNamespace:
    """A node that more edges lead to than a tile holds."""
    case = block(1, 40, 5, 4, 9, 7, seed=12)
    case.idx[0, :, :4] = 3
    return case


def far() -> SimpleNamespace:
    """Clouds far from the origin and from one another."""
    case = block(2, 14, 4, missing=0.0, seed=11)
    case.parameters[0] += torch.tensor([300.0, -500.0])[:, None, None]
    return case


CASES = {
    "training": block(),
    "far_from_the_origin": far(),
    "by_fours": block(1, 21, 3, 4, 20, 12, seed=1),
    "evaluation": block(mode="evaluation"),
    "no_norm": block(mode="no_norm", slope=0.0),
    "gamma_zero": block(2, 15, 3, gamma2=[0.0, -1.0, 0.5, -0.0, 2.0], seed=2),
    "no_edge_at_all": block(1, 5, 3, missing=1.0),
    "double": block(2, 9, 3, 4, 7, 6, dtype="float64", seed=4),
    "wrong_index": wrong_index(),
    "hub": hub(),
}
# More work than the slower builds do in a second.
LARGE = {
    "several_tiles": block(1, 150, 3, 3, 8, 9, seed=7),
    "several_slices": block(1, 20, 3, 5, 70, 75, seed=8),
    "more_than_shared_memory": block(1, 9, 2, 3, 140, 200, seed=9),
    "many_neighbours": block(1, 5, 260, mode="evaluation", missing=0.3, seed=3),
    "double_by_slices": block(1, 20, 2, 5, 40, 70, seed=8, dtype="float64"),
    "several_parts": block(1, 600, 1, 3, 4, 4, missing=0.0, seed=10),
}


def run(device: Device, case: SimpleNamespace, order: tuple[int, int]) -> list[Tensor]:
    """out, the gradients of x and the parameters, and the running statistics."""
    device.configure(*order)
    leaves = Leaves(device)
    x, *layers = case.parameters
    statistics = [None if t is None else t.clone() for t in case.statistics]
    out, *saved = orchestrator.forward(
        leaves, x, case.idx, *layers, *statistics, case.training, 0.1, 1e-5, case.slope, True, False
    )
    gradients = orchestrator.backward(
        *(leaves, weights_of(out), x, case.idx, *layers, *saved, case.training, case.slope, True, True, True),
        *(False, None, None),
    )
    there = [t is not None for t in case.parameters]
    gradients = [g for g, wanted in zip(gradients, there, strict=True) if wanted]
    return [out, *gradients, *(t for t in statistics if t is not None)]


def weights_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)


def expected_of(case: SimpleNamespace) -> list[Tensor]:
    copies = [None if t is None else t.double().clone() for t in (*case.parameters, *case.statistics)]
    x, *layers = (None if t is None else t.requires_grad_() for t in copies[:7])
    statistics = copies[7:]
    idx = torch.where((case.idx >= 0) & (case.idx < x.shape[1]), case.idx, -1)
    out = reference.edge_conv2(
        x, idx, *layers, *statistics, training=case.training, negative_slope=case.slope
    )
    leaves = [t for t in (x, *layers) if t is not None]
    gradients = torch.autograd.grad(out, leaves, weights_of(out))
    return [out.detach(), *gradients, *(t for t in statistics if t is not None)]


def check(device: Device, case: SimpleNamespace, tolerance: float) -> None:
    found = [run(device, case, order) for order in ORDERS[device.kind]]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for a, e in zip(found[0], expected_of(case), strict=True):
        assert_close(a, e, tolerance, "edge_conv2")


@pytest.mark.parametrize("name", CASES)
def test_small(device, name):
    check(device, CASES[name], TOLERANCE[CASES[name].parameters[0].dtype])


@pytest.mark.parametrize("name", LARGE)
def test_large(device, name):
    if device.kind == "plain":
        check(device, LARGE[name], TOLERANCE[LARGE[name].parameters[0].dtype])


def test_statistics_of_other_ranks(device):
    """A first norm that is given in training, and terms that are not of these edges alone: as on a CPU."""
    case = block(2, 13, 4, 3, 6, 5, seed=3)
    generator = torch.Generator().manual_seed(1)
    terms = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5), 5)]
    settings = (case.slope, True, True, True, True, *terms)

    def both(forward, backward, dtype):
        x, *layers, mean, var = (t.to(dtype) for t in (*case.parameters, *case.statistics[:2]))
        options = (True, 0.1, 1e-5, case.slope, True, True)
        out, *saved = forward(x, case.idx, *layers, mean, var, None, None, *options)
        grad = weights_of(out)
        return [out, *saved[-2:], *backward(grad, x, case.idx, *layers, *saved, True, *settings)]

    device.configure(*ORDERS[device.kind][0])
    passes = (functools.partial(f, Leaves(device)) for f in (orchestrator.forward, orchestrator.backward))
    found = both(*passes, torch.float32)
    native = torch.ops.crosspoint
    for a, e in zip(found, both(native.edge_conv2, native.edge_conv2_backward, torch.float64), strict=True):
        assert_close(a, e, TOLERANCE[torch.float32], "edge_conv2")


@pytest.mark.parametrize(("setting", "tolerance"), [("high", 5e-3), ("medium", 4e-2)])
def test_lower_precision_where_torch_allows_it(device, setting, tolerance):
    """tf32 and bfloat16: another product, the same algebra. Coordinates keep float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        case = block(1, 20, 3, 3, 24, 20, mode="evaluation", seed=5)
        found = run(device, case, (0, 1))
    finally:
        torch.set_float32_matmul_precision(before)
    expected = expected_of(case)
    assert_close(found[0], expected[0], tolerance, "output")
    assert (found[0] - expected[0]).abs().max() > 1e-4 * expected[0].abs().max()  # or the setting did nothing
