"""Layers with batch norm, as every rank calls them on its clouds and one process on all; the clouds of each rank."""

import functools
import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from crosspoint import models, ops
from crosspoint.models.blocks import checkpoint_activations, shard
from crosspoint.models.resnet import _BasicBlock
from crosspoint.nn import EdgeConv2, SharedLinear, SyncBatchNorm, convert_sync_batch_norm
from crosspoint.train import PretrainConfig
from crosspoint.train.cached import cached_backward
from crosspoint.train.optim import make_optimizer
from crosspoint.train.ranks import Ranks

CLOUDS = {1: [8], 2: [5, 3], 3: [4, 0, 4], 4: [1, 3, 2, 2]}  # of each rank
N, K, C_IN, C_OUT = 20, 4, 5, 7
LAYERS = ("edge_conv", "edge_conv2", "conv_bn_act_pool")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARDED = (1, 2, 3)  # worlds
OPTIMIZERS = ("adam", "lars", "lamb")
ABLATIONS = {
    "sharded, in parts": {},
    "sharded, without images": {"cross_weight": 0.0},
    "sharded, frozen": {"freeze_image_encoder": True},
}


@functools.cache
def inputs() -> dict[str, Tensor]:
    """What belongs to clouds: x, far-off centres in it, a graph with edges that do not exist, lengths, gradients."""
    generator = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    x = draw(8, N, C_IN) + 3 * draw(8, 1, C_IN)
    idx = torch.randint(-1, N, (8, N, K), generator=generator)
    idx[2] = -1  # a cloud without edges
    lengths = torch.randint(0, N + 1, (8,), generator=generator)
    return {"x": x, "idx": idx, "lengths": lengths, "grad": draw(8, N, C_OUT), "pooled": draw(8, 2 * C_OUT)}


def layer(op: str, given: dict[str, Tensor], dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The output of an op on clouds, all gradients and the running statistics it leaves."""
    generator = torch.Generator().manual_seed(4)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)

    def norm():
        return [draw(C_OUT).to(dtype), draw(C_OUT).to(dtype)]

    running = [t.to(dtype) for t in (draw(C_OUT), draw(C_OUT).exp(), draw(C_OUT), draw(C_OUT).exp())]
    first = draw(C_OUT, C_IN if op == "conv_bn_act_pool" else 2 * C_IN).to(dtype)
    leaves = [given["x"].to(dtype), first, *norm()]
    grad = given["grad"]
    if op == "edge_conv2":
        leaves += [draw(C_OUT, C_OUT).to(dtype), *norm()]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    x, *parameters = leaves
    common = {"training": True, "momentum": 0.3, **options}
    if op == "conv_bn_act_pool":
        y = ops.conv_bn_act_pool(x, *parameters, *running[:2], lengths=given["lengths"], **common)
        grad = given["pooled"]
    else:
        statistics = running if op == "edge_conv2" else running[:2]
        y = getattr(ops, op)(x, given["idx"], *parameters, *statistics, **common)
    y.backward(grad.to(dtype))
    found = {f"d{i}": leaf.grad for i, leaf in enumerate(parameters)}
    return {"y": y.detach(), "dx": x.grad, **found, **{f"running{i}": t for i, t in enumerate(running)}}


class Plain(nn.Module):
    """Norms of other layers, and fused layers that hold one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6, momentum=None),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.linear = SharedLinear(C_IN, 6)
        self.edges = EdgeConv2(C_IN, 5, 6)
        self.last = nn.Sequential(nn.Linear(18, 4, bias=False), nn.BatchNorm1d(4, affine=False))

    def forward(self, x: Tensor, idx: Tensor, lengths: Tensor) -> Tensor:
        image = self.image(x[:, :18, :3].reshape(-1, 3, 6, 3))
        points = self.linear(x, lengths)[:, 0] + self.linear(x)[:, 1]
        return self.last(torch.cat([image, points, self.edges(x, idx).sum(1)], 1))


def module(given: dict[str, Tensor], convert: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    model = convert(Plain().double())
    x = given["x"].clone().requires_grad_()
    y = model(x, given["idx"], given["lengths"])
    (y * given["pooled"][:, :4]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(model.named_buffers())}


class TinyImages(nn.Module):
    feature_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            _BasicBlock(6, 6, 1),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


class Pinned(models.DGCNN):
    """On graphs that are given: neighbours must not depend on the last digit of a feature."""

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points, graphs=[self.graph] * 4)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def crosspoint(given: dict[str, Tensor], convert: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """A whole step of CrossPoint: its gradients and their norm."""
    torch.manual_seed(6)
    model = models.CrossPoint(Pinned(K, projection_dim=8), TinyImages()).double()
    graph = given["idx"].clamp_min(0)
    model.point_encoder.graph = torch.cat([graph, graph])
    x = given["x"]
    step = convert(model)  # kept until gradients are there: with it would go what averages them
    out = step(x[..., :3], x[..., 2:5], x[:, :18, :3].reshape(-1, 3, 6, 3))
    out.loss.backward()
    found = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    found["norm"] = whole(nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]))
    return {"loss": out.loss.detach(), **found, **dict(model.named_buffers())}


def optimised(kind: str, convert: Callable[[nn.Module], nn.Module]) -> tuple[list[Tensor], int]:
    """Parameters after two steps by given gradients, of which a parameter without one is no part; and how many values
    of parameters and of the optimizer's state this process holds."""
    torch.manual_seed(8)
    model = convert(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2), nn.Linear(2, 1)).double())
    optimizer = make_optimizer(PretrainConfig(optimizer=kind, lr=0.1, weight_decay=0.1), model.parameters())
    for _ in range(2):
        for parameter in model[:2].parameters():
            parameter.grad = parameter.detach().abs() + 0.1
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = sum(getattr(t, "to_local", lambda t=t: t)().numel() for t in (*model.parameters(), *states))
    return [whole(parameter.detach()) for parameter in model.parameters()], held


PARTS = 2


def in_parts(
    ranks: list[dict[str, Tensor]],
    backward: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    **options: object,
) -> dict:
    """A step of CrossPoint on a batch that is cut: part i is that of all ranks. backward(model, (view1, view2, images))
    gives the loss, of the clouds of all `ranks` one behind the other."""
    torch.manual_seed(7)
    model = models.CrossPoint(models.PointNet(projection_dim=8), TinyImages(), **options).double()
    x = torch.cat([own["x"] for own in ranks])
    loss = backward(model, (x[..., :3], x[..., 2:5], x[:, :18, :3].reshape(-1, 3, 6, 3)))
    known = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: whole(grad) for name, grad in known.items()}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


def cached(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    loss = cached_backward(model.synchronise(), *batch, parts=PARTS).loss
    Ranks(torch.device("cpu"), world=distributed.get_world_size()).average(
        [p.grad for p in model.parameters()]
    )
    return loss


def cached_and_sharded(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cached_backward(sharded(model), *batch, parts=PARTS).loss


def sharded(model: nn.Module) -> nn.Module:
    return shard(model.synchronise(), Ranks(torch.device("cpu"), world=distributed.get_world_size()).mesh())


def plainly(world: int, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Part i of every rank together, all parts' activations kept."""
    ends = list(itertools.accumulate(CLOUDS[world], initial=0))
    cuts = [torch.arange(*pair).tensor_split(PARTS) for pair in itertools.pairwise(ends)]
    z = [model.project(*(t[torch.cat(part)] for t in batch)) for part in zip(*cuts, strict=True)]
    loss = model.losses(*(torch.cat(parts) for parts in zip(*z, strict=True))).loss
    loss.backward()
    return loss


def share(rank: int, world: int) -> dict[str, Tensor]:
    """What a rank has of the inputs."""
    first = sum(CLOUDS[world][:rank])
    return {name: t[first : first + CLOUDS[world][rank]] for name, t in inputs().items()}


def results(rank: int, world: int, group) -> dict:
    own = share(rank, world)
    found = {}
    settings = list(itertools.product(LAYERS, ("native", "reference")))
    if INTERPRETED and world == 2:
        settings.append(("edge_conv2", "triton"))
    for op, impl in settings:
        found[op, impl] = layer(op, own, torch.float64, impl=impl, group=group)
    far = {**own, "x": own["x"] + 1000}
    for op in LAYERS:
        found[op, "far"] = layer(op, far, torch.float32, group=group)
        found[op, "half"] = layer(op, own, torch.bfloat16, group=group)
    found["module"] = module(own, convert_sync_batch_norm)
    norm = SyncBatchNorm(C_IN)
    with torch.autocast("cpu", torch.bfloat16):
        found["half"] = norm(own["x"].flatten(0, 1).bfloat16())
    found["running"] = norm.running_var
    found["crosspoint"] = crosspoint(own, lambda model: DistributedDataParallel(model.synchronise()))
    found["computed again"] = crosspoint(
        own, lambda model: DistributedDataParallel(checkpoint_activations(model.synchronise()))
    )
    found["cached"] = in_parts([own], cached)
    if world in SHARDED:
        from torch.distributed.fsdp import fully_shard  # takes a second

        found["sharded"] = crosspoint(own, lambda model: sharded(checkpoint_activations(model)))
        for name, options in ABLATIONS.items():
            found[name] = in_parts([own], cached_and_sharded, **options)
        mesh = Ranks(torch.device("cpu"), world=world).mesh()
        for kind in OPTIMIZERS:
            found[kind] = optimised(kind, lambda model: fully_shard(model, mesh=mesh))
        try:
            found["mixed"] = optimised("lars", lambda model: (fully_shard(model[0], mesh=mesh), model)[1])
        except ValueError as error:
            found["mixed"] = str(error)
    return found
