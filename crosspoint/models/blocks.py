"""Models by their blocks: computed again for the backward pass, or sharded over ranks, one at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from crosspoint.models.crosspoint import CrossPoint
from crosspoint.nn import EdgeConv, EdgeConv2, SharedLinear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["checkpoint_activations", "shard"]


def checkpoint_activations(model: CrossPoint) -> CrossPoint:
    """Let the backward pass compute the encoders' blocks again, each from its input, and return the model.

    Blocks are the layers of a point encoder (`EdgeConv`, `EdgeConv2`, `SharedLinear`; graphs are kept) and the residual
    or transformer blocks of an image encoder; an encoder that has none is one. Values, gradients, running statistics
    and what is drawn are those without: both computations draw the same random numbers, exchange the same statistics
    between ranks, and the second leaves the running statistics alone.

    Call it before `shard` and before DistributedDataParallel.
    """
    for encoder in (model.point_encoder, model.image_encoder):
        layers = [m for m in encoder.modules() if isinstance(m, (EdgeConv, EdgeConv2, SharedLinear))]
        for block in layers or [*_repeated(encoder)] or [encoder]:
            # Rather than a forward of its own, which in a copy of the model would call the original's.
            block.__class__ = _checkpointed(type(block))
    return model


def shard(model: CrossPoint, mesh: DeviceMesh) -> CrossPoint:
    """Spread the parameters of `model` over the ranks of `mesh` (FSDP2's `fully_shard`), and return it.

    A rank holds its share of every parameter, gradient and optimizer state; the blocks of the image encoder, the point
    encoder and the heads are each gathered when they are needed. Gradients are averaged, as DistributedDataParallel
    does, so that `model.synchronise()` fits both. Parameters are others than before: make the optimizer afterwards.

    Call `model` or, as embedding caching does, `model.project`.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    points, images = model.point_encoder, model.image_encoder
    heads = [points.projection, getattr(images, "projection", None), model.image_projection]
    for part in (*_repeated(images), *filter(None, heads), points, images, model):
        fully_shard(part, mesh=mesh)
        if mesh.device_type == "cpu":
            part.set_force_sum_reduction_for_comms(True)  # gloo has no average
    register_fsdp_forward_method(model, "project")
    return model


def _repeated(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """The outermost items of lists and sequences that are made of parts: residual blocks, transformer blocks.

    timm and transformers have lists of blocks in a class of their own, a stage, as which its name shows it.
    """
    container = type(module) in (nn.Sequential, nn.ModuleList) or type(module).__name__.endswith("Stage")
    if listed and not container and any(True for _ in module.children()):
        yield module
        return
    for child in module.children():
        yield from _repeated(child, container)


class _Checkpointed:
    """Goes before a block's class."""

    def forward(self, *args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return checkpoint(
            super().forward,
            *args,
            use_reentrant=False,
            early_stop=False,  # ranks must exchange alike, an empty one too
            context_fn=lambda: (contextlib.nullcontext(), _on_copies_of_statistics(self)),
            **kwargs,
        )


@functools.cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    if issubclass(kind, _Checkpointed):
        return kind
    return type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {})


@contextlib.contextmanager
def _on_copies_of_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms update copies of their running statistics: they have seen the batch before."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, name, value) for norm in norms for name, value in norm.named_buffers()]
    for norm, name, value in kept:
        setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, name, value in kept:
            setattr(norm, name, value)
