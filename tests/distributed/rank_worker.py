"""What the processes of these tests run: every call once, the results saved for the tests to judge."""

import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import norm_layers
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from crosspoint import ops
from crosspoint.interop import lightly
from crosspoint.nn import NTXentLoss

D = 12
SIZES = {1: [130], 2: [97, 33], 3: [60, 0, 70], 4: [20, 64, 1, 45]}  # samples of each rank
LOSSES = ("nt_xent", "info_nce", "one_way", "sup_con")
RINGS = LOSSES[:3]  # those that also pass embeddings on
MEMORY = (192, 4096)  # embeddings of each rank in test_a_ring_holds_no_more_on_more_ranks
TEMPERATURE = 0.3
TINY = 0.01  # of that temperature: losses that are lost beside 1
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Two views of all samples, and labels of which some occur once."""
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(130, D, generator=generator, dtype=torch.float64)
    z2 = z1 + 0.5 * torch.randn(130, D, generator=generator, dtype=torch.float64)
    return z1, z2, torch.randint(100, (130,), generator=generator)


def call(loss: str, z1: Tensor, z2: Tensor, labels: Tensor, temperature: Tensor | float, **kwargs) -> Tensor:
    if loss == "sup_con":
        return ops.sup_con(z1, labels, temperature, **kwargs)
    if loss == "one_way":
        return ops.info_nce(z1, z2, temperature, symmetric=False, **kwargs)
    return getattr(ops, loss)(z1, z2, temperature, **kwargs)


def gradients(function: Callable[..., Tensor], z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """function(z1, z2, temperature) and its gradients."""
    leaves = [z.clone().requires_grad_() for z in (z1, z2)]
    leaves.append(torch.tensor(TEMPERATURE, dtype=z1.dtype if z1.dtype.itemsize > 2 else torch.float32))
    value = function(*leaves[:2], leaves[2].requires_grad_())
    (2 * value).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return dict(zip(("loss", "dz1", "dz2", "dtemperature"), [value.detach(), *grads], strict=True))


class Encoder(nn.Module):
    """A small network and its loss, whose temperature is learned too."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.loss = loss

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z = self.layers(torch.cat([x1, x2]))
        return self.loss(z[: len(x1)], z[len(x1) :])


def learned(**kwargs) -> NTXentLoss:
    return NTXentLoss(nn.Parameter(torch.tensor(TEMPERATURE, dtype=torch.float64)), **kwargs)


def said(function: Callable[[], object]) -> str:
    """The error that a call ends with."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world
    )
    found = {**results(rank, world), "norms": norm_layers.results(rank, world, distributed.group.WORLD)}
    torch.save(found, f"{folder}/results{world}.{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


def results(rank: int, world: int) -> dict:
    everyone = distributed.group.WORLD
    first = sum(SIZES[world][:rank])
    z1, z2, labels = (x[first : first + SIZES[world][rank]] for x in samples())
    found = {}
    settings = list(itertools.product(LOSSES, ("native", "reference"), ("mean", "sum")))
    if INTERPRETED and world == 2:
        sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
        importlib.import_module("conftest")  # mends the interpreter for numpy
        settings += [(loss, "triton", "sum") for loss in LOSSES]
    for loss, impl, reduction in settings:

        def whole(a, b, t, loss=loss, impl=impl, reduction=reduction):
            return call(loss, a, b, labels, t, group=everyone, grad_reduction=reduction, impl=impl)

        found[loss, impl, reduction] = gradients(whole, z1, z2)
    found.update(rings(everyone, z1, z2))
    for dtype in (torch.float32, torch.bfloat16):
        narrow = functools.partial(ops.nt_xent, group=everyone)
        found[dtype] = gradients(narrow, z1.to(dtype), z2.to(dtype))

    model = DistributedDataParallel(Encoder(learned(gather_distributed=True)))
    value = model(z1, z2)
    value.backward()
    found["ddp"] = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    found["ddp"]["value"] = value.detach()
    found["summed"] = gradients(
        lambda a, b, t: NTXentLoss(t, gather_distributed=True, grad_reduction="sum")(a, b), z1, z2
    )
    with torch.no_grad():
        found["no_grad"] = ops.nt_xent(z1, z2, TEMPERATURE, group=everyone)

    equal = [z[30 * rank : 30 * rank + 30] for z in samples()[:2]]
    found["lightly"] = gradients(
        lambda a, b, t: lightly.NTXentLoss(TEMPERATURE, gather_distributed=True)(a, b), *equal
    )

    found["empty"] = ops.nt_xent(z1[:0], z2[:0], group=everyone)
    found["other_channels"] = said(lambda: ops.nt_xent(z1[:, rank:], z2[:, rank:], group=everyone))
    other = z1.float() if rank == 0 else z1
    found["other_dtype"] = said(lambda: ops.sup_con(other, labels, group=everyone))
    for loss in ("nt_xent", "sup_con"):
        function = functools.partial(call, loss, group=everyone)
        found["second", loss] = said(lambda function=function: second_derivative(function, z1, z2, labels))
    if world == 3:
        ends = distributed.new_group([0, 2])
        call_ends = functools.partial(ops.nt_xent, group=ends)
        found["ends"] = said(lambda: call_ends(z1, z2)) if rank == 1 else gradients(call_ends, z1, z2)
    return found


def rings(everyone: distributed.ProcessGroup, z1: Tensor, z2: Tensor) -> dict:
    found = {}
    settings = [(loss, "native", reduction) for loss in RINGS for reduction in ("mean", "sum")]
    if INTERPRETED and distributed.get_world_size() == 2:
        settings += [(loss, "triton", "sum") for loss in RINGS]
    for loss, impl, reduction in settings:
        options = {"group": everyone, "grad_reduction": reduction, "exchange": "ring", "impl": impl}
        ring = functools.partial(call, loss, labels=None, **options)
        found["ring", loss, impl, reduction] = gradients(
            lambda a, b, t, ring=ring: ring(a, b, temperature=t), z1, z2
        )
    passed_on = functools.partial(ops.nt_xent, group=everyone, exchange="ring")
    found["ring", "again"] = gradients(passed_on, z1, z2)
    found["ring", "tiny"] = gradients(lambda a, b, t: passed_on(a, b, t * TINY), z1, z1 + 0.01 * z2)
    for dtype in (torch.float32, torch.bfloat16):
        found["ring", dtype] = gradients(passed_on, z1.to(dtype), z2.to(dtype))
    found["ring", "module"] = gradients(
        lambda a, b, t: NTXentLoss(t, gather_distributed=True, exchange="ring")(a, b), z1, z2
    )
    found["ring", "second"] = said(
        lambda: second_derivative(lambda a, b, _, t: passed_on(a, b, t), z1, z2, None)
    )
    found["ring", "reference"] = said(lambda: passed_on(z1, z2, impl="reference"))
    found["ring", "empty"] = passed_on(z1[:0], z2[:0])
    found["ring", "memory"] = peak_memory(passed_on)
    found["gather", "memory"] = peak_memory(functools.partial(ops.nt_xent, group=everyone))
    return found


def peak_memory(loss: Callable[..., Tensor]) -> int:
    """The most bytes that torch holds at a time in both passes, beyond float32 embeddings of MEMORY on every rank."""
    z1, z2 = (torch.randn(MEMORY, requires_grad=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss(z1, z2).backward()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def second_derivative(function: Callable[..., Tensor], z1: Tensor, z2: Tensor, labels: Tensor) -> None:
    z1 = z1.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(z1, z2, labels, TEMPERATURE), z1, create_graph=True)
    (z1 + grad).square().sum().backward()
