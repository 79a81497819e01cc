"""csrc/cuda/conv_bn_act_pool.cu on the host, under the orchestrator of GPUs: whole layers, both passes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from crosspoint.ops import reference
from crosspoint.ops._gpu import conv_bn_act_pool as orchestrator
from crosspoint.testing import TOLERANCE
from op_tester import assert_close
from simt_harness import ROOT, Device, builds_here

# (seed, resident blocks); the slower builds look for other things than values.
ORDERS = {"plain": [(0, 1), (1, 2)], "watch": [(4, 2)], "sanitized": [(1, 2)]}


@pytest.fixture(scope="module", params=builds_here())
def device(request):
    entry = Path(__file__).with_name("conv_bn_act_pool_entry.cpp")
    return Device([entry, ROOT / "csrc" / "cuda" / "conv_bn_act_pool.cu"], request.param)


class Leaves:
    """The leaves as operators bind them, on CPU tensors: given ones are copied to the harness, filled ones back."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def run(self, function: str, *arguments, filled: tuple[Tensor | None, ...], kept: tuple = ()) -> None:
        """Tensors in `filled` are written, all of them but for those in `kept`."""
        buffers = []

        def place(argument):
            if not isinstance(argument, Tensor):
                return argument
            bits = argument.view(torch.int16) if argument.dtype == torch.bfloat16 else argument
            if not any(argument is t for t in filled):
                return self.device.input(bits.numpy())
            if any(argument is t for t in kept):
                buffers.append((bits, self.device.input(bits.numpy(), written=True)))
            else:
                buffers.append((bits, self.device.output(bits.shape, bits.numpy().dtype)))
            return buffers[-1][1]

        try:
            self.device.call(function, *map(place, arguments))
            for tensor, buffer in buffers:
                tensor.copy_(torch.from_numpy(buffer.copy()))
        finally:
            self.device.free()

    def sums(self, x, lengths, out):
        self.run("sums", *_cloud(x, lengths), out.shape[1], out, filled=(out,))

    def gram(self, x, lengths, centre, product, gram, first):
        self.run("gram", *_cloud(x, lengths), centre, product, len(gram), gram, first, filled=(gram, first))

    def pool(self, x, lengths, centre, weight, gamma, scale, shift, product, values, places, mask):
        self.run(
            *("pool", *_cloud(x, lengths), centre, weight, gamma, scale, shift, product, len(weight)),
            *(values.shape[2], values, places, mask),
            filled=(values, places, mask),
        )

    def finish(self, values, places, lengths, n, gamma, scale, shift, mean, rstd, slope, out, winner, slopes):
        _, batch, tiles, channels = values.shape
        self.run(
            *("finish", _double(values), batch, n, channels, tiles, values, places, lengths, gamma, scale),
            *(shift, mean, rstd, float(slope), out, winner, slopes),
            filled=(out, winner, slopes),
        )

    def terms(
        self,
        grad,
        slopes,
        lengths,
        n,
        count,
        gamma,
        scale,
        shift,
        mean,
        rstd,
        slope,
        training,
        spread,
        affine,
    ):
        self.run(
            *("terms", _double(grad), len(grad), n, spread.shape[2], grad, slopes, lengths, count, gamma),
            *(scale, shift, mean, rstd, float(slope), int(training), spread, affine),
            filled=(spread, affine),
            kept=(affine,),
        )

    def x_gradient(self, mask, spread, winner, weight, x, lengths, centre, square, product, out):
        self.run(
            *("x_gradient", *_cloud(x, lengths), centre, product, len(weight), mask, winner, spread, weight),
            *(square, out),
            filled=(out,),
        )

    def weight_gradient(self, mask, spread, winner, x, lengths, centre, product, out):
        parts, c_out, _ = out.shape
        self.run(
            *(
                "weight_gradient",
                *_cloud(x, lengths),
                centre,
                product,
                c_out,
                parts,
                mask,
                winner,
                spread,
                out,
            ),
            filled=(out,),
        )


def _cloud(x: Tensor, lengths: Tensor | None) -> tuple:
    return *x.shape, x, x.element_size(), lengths


def _double(x: Tensor) -> int:
    return int(x.dtype == torch.float64)


def layer(
    batch=2,
    n=13,
    c_in=10,
    c_out=7,
    *,
    training=True,
    lengths=None,
    seed=0,
    gamma=None,
    dtype="float32",
    **options,
):
    """Arguments of the reference: a random layer, gamma of both signs; `half`: x as autocast leaves it."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, c_in, generator=g) + 3
    weight = torch.randn(c_out, c_in, generator=g)
    gamma = torch.randn(c_out, generator=g) if gamma is None else torch.tensor(gamma)
    beta, mean = torch.randn(c_out, generator=g), torch.randn(c_out, generator=g)
    var = torch.rand(c_out, generator=g) + 0.5
    lengths = None if lengths is None else torch.tensor(lengths)
    for b, length in enumerate([] if lengths is None else lengths.tolist()):
        x[b, length:] = float("nan")
    tensors = [t.to(getattr(torch, dtype)) for t in (x, weight, gamma, beta, mean, var)]
    if options.get("half"):
        tensors[0] = tensors[0].bfloat16()
    precision = options.get("precision", "highest")
    return SimpleNamespace(tensors=tensors, lengths=lengths, training=training, precision=precision)


def not_a_number() -> SimpleNamespace:
    case = layer(2, 12, 9, training=False, seed=5)
    case.tensors[0][0, 3, 1] = float("nan")
    return case


CASES = {
    "training": layer(),
    "points": layer(2, 40, 3, 33, seed=1),
    "evaluation": layer(training=False),
    "ragged": layer(4, 17, 9, 5, lengths=[17, 5, 0, 1], seed=3),
    "gamma_zero": layer(2, 15, 9, 6, gamma=[0.0, -1.0, 0.5, -0.0, 2.0, -0.3], seed=2),
    "one_valid_row": layer(2, 3, 9, lengths=[1, 0]),
    "double": layer(2, 35, 5, 7, dtype="float64", seed=4),
    "tf32": layer(1, 20, 12, 6, precision="high", seed=6),
    "medium": layer(1, 20, 12, 6, precision="medium", seed=6),
    "autocast": layer(1, 20, 12, 6, half=True, seed=6),
    "not_a_number": not_a_number(),
}
# More work than the watched build does in a second.
LARGE = {
    "several_tiles": layer(2, 300, 40, 70, seed=7),
    "several_parts": layer(3, 200, 140, 40, seed=8),
    "deep_autocast": layer(1, 140, 70, 66, half=True, seed=9),
    "double_tiles": layer(1, 70, 40, 70, dtype="float64", seed=10),
}


def run(device: Device, case: SimpleNamespace, order: tuple[int, int]) -> list[Tensor]:
    """out, the gradients of x, weight, gamma and beta, and the running statistics."""
    device.configure(*order)
    leaves = Leaves(device)
    x, weight, gamma, beta, mean, var = (t.clone() for t in case.tensors)
    layer = (x, weight, gamma, beta)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    try:
        out, *saved = orchestrator.forward(
            leaves, *layer, mean, var, case.lengths, case.training, 0.1, 1e-5, 0.2, True
        )
        grad = torch.where(out.isfinite(), weights_of(out), 0)
        gradients = orchestrator.backward(
            leaves, grad, *layer, case.lengths, *saved, case.training, 0.2, True, True
        )
    finally:
        torch.set_float32_matmul_precision(before)
    return [out, *gradients, mean, var]


def weights_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)


def expected_of(case: SimpleNamespace) -> list[Tensor]:
    x, weight, gamma, beta, mean, var = (t.double().clone() for t in case.tensors)
    parameters = [t.requires_grad_() for t in (x, weight, gamma, beta)]
    out = reference.conv_bn_act_pool(*parameters, mean, var, lengths=case.lengths, training=case.training)
    grad = torch.where(out.isfinite(), weights_of(out), 0)
    gradients = torch.autograd.grad(out, parameters, grad)
    return [out.detach(), *gradients, mean, var]


def check(device: Device, case: SimpleNamespace) -> None:
    found = [run(device, case, order) for order in ORDERS[device.kind]]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    # tf32 has the digits of float16
    rough = {"high": torch.float16, "medium": torch.bfloat16}.get(case.precision, case.tensors[0].dtype)
    for a, e in zip(found[0], expected_of(case), strict=True):
        assert_close(a, e, TOLERANCE[rough], "conv_bn_act_pool")


@pytest.mark.parametrize("name", CASES)
def test_small(device, name):
    check(device, CASES[name])


@pytest.mark.parametrize("name", LARGE)
def test_large(device, name):
    if device.kind == "plain":
        check(device, LARGE[name])
