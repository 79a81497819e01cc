"""Batch norm over the batches of several processes, on any device and backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from crosspoint.ops._rank_norm import of_values, over_ranks, spans_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SyncBatchNorm", "convert_sync_batch_norm", "norm_arguments"]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`nn.BatchNorm1d`, `2d` or `3d` whose statistics are those of the batches of all ranks.

    Ranks may hold different numbers of samples, none too. torch's own does the same on GPUs alone; this one runs on
    CPUs (gloo) too, and the fused layers (`EdgeConv`, `EdgeConv2`, `SharedLinear`) that hold one share their
    statistics likewise. Values and gradients, the running statistics too, are those of one process with the whole
    batch, to rounding: statistics are merged in float64. In evaluation, with one rank, or without an initialised
    process group, it is torch's batch norm.

    The gradients are those of the sum of what the ranks differentiate. A loss that is the same on every rank and scaled
    for DDP (`NTXentLoss(gather_distributed=True)`) or a mean of the rank's own samples fit alike.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as for `nn.BatchNorm1d`.
        group: the process group; None: all ranks, once there is a process group.

    Shapes: x (B, C) or (B, C, ...) -> the same.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: ProcessGroup | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.group = group

    @property
    def exchange_group(self) -> ProcessGroup | None:
        """The ranks that share statistics now."""
        if self.group is None and distributed.is_available() and distributed.is_initialized():
            return distributed.group.WORLD
        return self.group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"SyncBatchNorm: expected (B, C) or (B, C, ...), got shape {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        norm = norm_arguments(self)
        group = norm["group"]
        if not (norm["training"] and spans_ranks("SyncBatchNorm", group)):
            return F.batch_norm(
                x,
                norm["running_mean"],
                norm["running_var"],
                norm["gamma"],
                norm["beta"],
                norm["training"],
                norm["momentum"],
                self.eps,
            )
        gamma, beta = norm["gamma"], norm["beta"]
        if gamma is None:
            gamma, beta = x.new_ones(self.num_features), x.new_zeros(self.num_features)
        with torch.autocast(x.device.type, enabled=False):
            gamma, beta, mean, var = over_ranks(
                x,
                gamma,
                beta,
                norm["running_mean"],
                norm["running_var"],
                of_values(x),
                momentum=norm["momentum"],
                eps=self.eps,
                group=group,
            )
            return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, self.eps)


def convert_sync_batch_norm(module: nn.Module, group: ProcessGroup | None = None) -> nn.Module:
    """Replace every batch norm in `module` by a `SyncBatchNorm` of the same parameters and buffers; returns it.

    Modules are changed in place, and parameters stay the same objects, so that an optimiser made before keeps them;
    `module` itself is replaced if it is a batch norm. `state_dict` keeps its keys. Norms of other classes, lazy ones
    too, stay as they are.
    """
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return _converted(module, group)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batch_norm(child, group))
    return module


def _converted(bn: nn.modules.batchnorm._BatchNorm, group: ProcessGroup | None) -> SyncBatchNorm:
    norm = SyncBatchNorm(
        bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, group=group
    ).train(bn.training)
    for name, parameter in bn._parameters.items():
        norm.register_parameter(name, parameter)
    for name, buffer in bn._buffers.items():
        norm.register_buffer(name, buffer)
    return norm


def norm_arguments(bn: nn.modules.batchnorm._BatchNorm) -> dict:
    """The arguments of `crosspoint.ops.edge_conv` that do what `bn` would, were it called; it counts the batch."""
    has_running = bn.running_mean is not None
    updates = bn.training and bn.track_running_stats and has_running
    uses_running = updates or not bn.training
    momentum = 0.0
    if updates:
        bn.num_batches_tracked.add_(1)
        momentum = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    return {
        "gamma": bn.weight,
        "beta": bn.bias,
        "running_mean": bn.running_mean if uses_running else None,
        "running_var": bn.running_var if uses_running else None,
        "training": bn.training or not has_running,
        "momentum": momentum,
        "eps": bn.eps,
        "group": bn.exchange_group if isinstance(bn, SyncBatchNorm) else None,
    }
