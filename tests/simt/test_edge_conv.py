"""csrc/cuda/edge_conv*.cu on the host, under the orchestrator that calls them on a GPU: whole layers, both passes."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conv_leaves import ConvLeaves
from torch import Tensor

from crosspoint.ops import reference
from crosspoint.ops._gpu import edge_conv as orchestrator
from crosspoint.testing import TOLERANCE
from op_tester import assert_close
from simt_harness import ROOT, Device, builds_here

# (seed, resident blocks); the slower builds look for other things than values.
ORDERS = {"plain": [(0, 1), (1, 2), (2, 1)], "watch": [(0, 1), (4, 2)], "sanitized": [(1, 2)]}


@pytest.fixture(scope="module", params=builds_here())
def device(request):
    cuda = ROOT / "csrc" / "cuda"
    names = ("edge_conv", "edge_conv_backward", "edge_layer", "reverse_graph", "radix_sort")
    sources = [Path(__file__).with_name("edge_conv_entry.cpp"), *(cuda / f"{name}.cu" for name in names)]
    device = Device(sources, request.param)
    device.library.reverse_graph_bytes.restype = ctypes.c_int64
    return device


def layer(
    batch=2, n=13, k=4, c_in=3, c_out=6, *, mode="training", missing=0.2, seed=0, gamma=None, dtype="float32"
):
    """Arguments of the reference: a random layer, some edges missing, gamma of both signs and 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, c_in, generator=g) + 3
    idx = torch.randint(0, n, (batch, n, k), generator=g)
    idx = torch.where(torch.rand(batch, n, k, generator=g) < missing, -1, idx)
    weight = torch.randn(c_out, 2 * c_in, generator=g)
    gamma = torch.randn(c_out, generator=g) if gamma is None else torch.tensor(gamma)
    beta, mean = torch.randn(c_out, generator=g), torch.randn(c_out, generator=g)
    var = torch.rand(c_out, generator=g) + 0.5
    if mode == "no_norm":
        gamma = beta = mean = var = None
    tensors = [
        None if t is None else t.to(getattr(torch, dtype)) for t in (x, weight, gamma, beta, mean, var)
    ]
    return SimpleNamespace(idx=idx, tensors=tensors, training=mode == "training")


def not_a_number() -> SimpleNamespace:
    case = layer(1, 12, 4, mode="evaluation", seed=5)
    case.tensors[0][0, 3, 1] = float("nan")
    return case


def wrong_index() -> SimpleNamespace:
    """What lies outside the cloud is no edge, and is looked at nowhere."""
    case = layer(2, 11, 5, 5, 4, seed=6)
    case.idx[0, 2, 1], case.idx[1, 10, 4] = 11, -(2**62)
    return case


def far(mode: str) -> SimpleNamespace:
    """Clouds far from the origin and from one another."""
    case = layer(2, 14, 4, mode=mode, missing=0.0, seed=11)
    case.tensors[0] += torch.tensor([300.0, -500.0])[:, None, None]
    return case


CASES = {
    "training": layer(),
    "far_from_the_origin": far("training"),
    "far_evaluation": far("evaluation"),
    "by_fours": layer(2, 21, 5, 8, 20, seed=1),
    "evaluation": layer(mode="evaluation"),
    "no_norm": layer(mode="no_norm", c_in=4, c_out=16),
    "gamma_zero": layer(2, 15, 5, gamma=[0.0, -1.0, 0.5, -0.0, 2.0, -0.3], seed=2),
    "no_edge_at_all": layer(1, 5, 3, missing=1.0),
    "one_node": layer(3, 1, 2, missing=0.0),
    "many_neighbours": layer(1, 6, 300, missing=0.3, seed=3),
    "double": layer(2, 11, 4, 5, 7, dtype="float64", seed=4),
    "double_by_fours": layer(1, 9, 3, 20, 4, dtype="float64", seed=4),
    "not_a_number": not_a_number(),
    "wrong_index": wrong_index(),
}
# More work than the watched build does in a second; what is above 96 kB of a cloud is gathered where it is.
LARGE = {
    "several_parts": layer(1, 600, 3, 3, 8, seed=7),
    "several_slices": layer(2, 140, 6, 18, 70, seed=8),
    "wide": layer(1, 30, 4, 70, 12, seed=9),
    "larger_than_shared_memory": layer(1, 6200, 2, 3, 5, seed=10),
}


def run(device: Device, case: SimpleNamespace, order: tuple[int, int]) -> list[Tensor]:
    """out, the gradients of x, weight, gamma and beta, and the running statistics."""
    device.configure(*order)
    leaves = ConvLeaves(device)
    x, weight, gamma, beta, mean, var = (None if t is None else t.clone() for t in case.tensors)
    out, *saved = orchestrator.forward(
        leaves, x, case.idx, weight, gamma, beta, mean, var, case.training, 0.1, 1e-5, 0.2, True
    )
    grad = torch.where(out.isfinite(), weights_of(out), 0)
    gradients = orchestrator.backward(
        leaves, grad, x, case.idx, weight, gamma, beta, *saved, case.training, 0.2, True, True
    )
    return [
        out,
        *(gradients if gamma is not None else gradients[:2]),
        *(t for t in (mean, var) if t is not None),
    ]


def weights_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)


def expected_of(case: SimpleNamespace) -> list[Tensor]:
    x, weight, gamma, beta, mean, var = (
        None if t is None else t.to(torch.float64, copy=True) for t in case.tensors
    )
    parameters = [t.requires_grad_() for t in (x, weight, gamma, beta) if t is not None]
    idx = torch.where((case.idx >= 0) & (case.idx < x.shape[1]), case.idx, -1)
    out = reference.edge_conv(x, idx, weight, gamma, beta, mean, var, training=case.training)
    grad = torch.where(out.isfinite(), weights_of(out), 0)
    gradients = torch.autograd.grad(out, parameters, grad)
    return [out.detach(), *gradients, *(t for t in (mean, var) if t is not None)]


def check(device: Device, case: SimpleNamespace) -> None:
    found = [run(device, case, order) for order in ORDERS[device.kind]]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for a, e in zip(found[0], expected_of(case), strict=True):
        assert_close(a, e, TOLERANCE[case.tensors[0].dtype], "edge_conv")


@pytest.mark.parametrize("name", CASES)
def test_small(device, name):
    check(device, CASES[name])


@pytest.mark.parametrize("name", LARGE)
def test_large(device, name):
    if device.kind == "plain":
        check(device, LARGE[name])


@pytest.mark.parametrize("channels", [1, 17, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 5e-7), (np.float64, 1e-15)])
def test_moments_of_any_width(device, channels, dtype, tolerance):
    """Each of the squares that a block takes, and rows and columns that do not fill one. On tensor cores sums keep
    float32's digits: relative to what is added, in absolute values."""
    generator = np.random.default_rng(channels)
    x, sums = (torch.from_numpy(generator.standard_normal((2, 37, channels)).astype(dtype)) for _ in range(2))
    degrees = torch.from_numpy(generator.integers(0, 5, (2, 2, 37)).astype(np.int32))
    gram, first = (
        x.new_empty((2, 3, 3, channels, channels)),
        torch.empty(2, 3, 2, channels, dtype=torch.float64),
    )
    device.configure(3, 2)
    ConvLeaves(device).moments(x, sums, degrees, gram, first)
    x, sums, (out, into) = x.double(), sums.double(), degrees.double()[..., None]
    for found, left in zip(gram.double().sum(1).unbind(1), (into * x, sums, out * x), strict=True):
        error = (found - left.transpose(1, 2) @ x).abs()
        assert (error <= tolerance * (left.abs().transpose(1, 2) @ x.abs())).all()
    for found, degree in zip(first.sum(1).unbind(1), (into, out), strict=True):
        assert ((found - (degree * x).sum(1)).abs() <= tolerance * (degree * x.abs()).sum(1)).all()
