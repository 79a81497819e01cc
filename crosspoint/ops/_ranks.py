"""Several processes with one loss: each holds the embeddings of all, and forms the complete gradient of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Ranks",
    "all_gather",
    "check_group",
    "differentiable_once",
    "find_ranks",
    "group_size",
    "merge_statistics",
]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Ranks:
    """What each rank of a group brings: rows [first, first + rows) of the whole are this rank's.

    Attributes:
        group, sizes: the group, and how many samples each of its ranks holds.
        scale: what this rank's gradients are multiplied by, so that the reduction named gives the loss's.
    """

    def __init__(self, op: str, group: ProcessGroup, z: Tensor, grad_reduction: str) -> None:
        from torch import distributed

        self.group = group
        self.world = distributed.get_world_size(group)
        own = torch.tensor([*z.shape, _DTYPES.index(z.dtype)], device=z.device)
        # The one place where the host waits for the device: the sizes decide what is allocated.
        found = all_gather(own, group).view(self.world, 3).tolist()
        if len({(d, dtype) for _, d, dtype in found}) > 1:
            said = ", ".join(f"rank {rank}: D = {d}, {_DTYPES[t]}" for rank, (_, d, t) in enumerate(found))
            raise ValueError(f"{op}: every rank must bring embeddings of one D and one dtype, got {said}")
        self.sizes = [n for n, _, _ in found]
        self.rank = rank = distributed.get_rank(group)
        self.first, self.rows, self.total = sum(self.sizes[:rank]), self.sizes[rank], sum(self.sizes)
        self.averaged = grad_reduction == "mean"
        self.scale = self.world if self.averaged else 1

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks, one rank's behind the other's; `x` (rows, ...) are this rank's. No gradient."""
        most = max(self.sizes)
        padded = x.detach().contiguous()
        if self.rows < most:
            padded = torch.cat([padded, padded.new_zeros(most - self.rows, *x.shape[1:])])
        if padded.numel() == 0:
            return padded.new_empty(self.total, *x.shape[1:])
        everything = all_gather(padded, self.group)
        if min(self.sizes) == most:
            return everything
        parts = everything.view(self.world, most, *x.shape[1:])
        return torch.cat([part[:rows] for part, rows in zip(parts, self.sizes, strict=True)])

    def ring(self, *own: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors (rows, ...) of this rank, then of the one before it, until every rank's have been here.

        The next ones travel while those at hand are used, which are overwritten after that. All ranks have to take all.
        """
        kinds = [(x.dtype, x.shape[1:]) for x in own]
        bytes_of = [dtype.itemsize * math.prod(shape) for dtype, shape in kinds]  # of a sample
        sizes = [self.sizes[(self.rank - step) % self.world] for step in range(self.world)]
        held, other = (own[0].new_empty(max(self.sizes) * sum(bytes_of), dtype=torch.uint8) for _ in range(2))
        # One message, so that nothing depends on the order in which several arrive.
        flat = [x.contiguous().view(-1).view(torch.uint8) for x in own]
        torch.cat(flat, out=held[: self.rows * sum(bytes_of)])
        del own, flat
        for step, rows in enumerate(sizes):
            taken, pending = held[: rows * sum(bytes_of)], []
            if step + 1 < self.world:
                pending = self._pass_on(taken, other[: sizes[step + 1] * sum(bytes_of)])
            parts = taken.split([rows * size for size in bytes_of])
            yield tuple(
                part.view(dtype).view(rows, *shape) for part, (dtype, shape) in zip(parts, kinds, strict=True)
            )
            for work in pending:
                work.wait()
            held, other = other, held

    def _pass_on(self, held: Tensor, incoming: Tensor) -> list:
        """Starts to send to the next rank and to receive from the one before; nothing where there are no bytes."""
        from torch import distributed

        def peer(offset: int) -> int:
            return distributed.get_global_rank(self.group, (self.rank + offset) % self.world)

        transfers = [(distributed.isend, held, peer(1)), (distributed.irecv, incoming, peer(-1))]
        transfers = [distributed.P2POp(*t, group=self.group) for t in transfers if t[1].numel() > 0]
        return distributed.batch_isend_irecv(transfers) if transfers else []

    def gather_around(self, x: Tensor) -> Tensor:
        """The same, this rank's rows with their gradient."""
        everything = self.gather(x)
        own = _Scaled.apply(x, self.scale)
        return torch.cat([everything[: self.first], own, everything[self.first + self.rows :]])

    def temperature(self, temperature: Tensor) -> Tensor:
        """For a gradient that every rank computes in full, as `share` has it for shares."""
        return _Scaled.apply(temperature, 1 if self.averaged else 1 / self.world)

    def share(self, derivative: Tensor) -> Tensor:
        """The derivative of the loss by a scalar that all ranks hold, from this rank's scaled share of it."""
        if not self.averaged:
            return derivative
        from torch import distributed

        total = derivative.clone()
        distributed.all_reduce(total, group=self.group)
        return total / self.scale


def find_ranks(op: str, group: ProcessGroup | None, z: Tensor, grad_reduction: str) -> Ranks | None:
    """None without a group, or where this process is all of it. Talks to the other ranks, in `group`'s order."""
    if group is None or group_size(op, group) == 1:
        return None
    return Ranks(op, group, z, grad_reduction)


def check_group(op: str, group: ProcessGroup | None, grad_reduction: str, exchange: str = "gather") -> None:
    if grad_reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: grad_reduction must be 'mean' or 'sum', got {grad_reduction!r}")
    if exchange not in ("gather", "ring"):
        raise ValueError(f"{op}: exchange must be 'gather' or 'ring', got {exchange!r}")
    if group is not None:
        group_size(op, group)


def group_size(op: str, group: ProcessGroup) -> int:
    """How many ranks it has; an error where this process can reach none."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(
            f"{op}: group was given, but torch.distributed is not initialised; call init_process_group"
        )
    size = distributed.get_world_size(group)
    if size < 1:
        raise ValueError(f"{op}: this process is not in the group")
    return size


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """(n, ...) of every rank as (ranks * n, ...); sent as bytes, which every backend knows."""
    from torch import distributed

    out = x.new_empty(distributed.get_world_size(group) * x.shape[0], *x.shape[1:])
    # Its name from torch 2.13 on, and the one before.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(out.view(torch.uint8), x.view(torch.uint8), group=group)
    return out


def merge_statistics(
    count: Tensor, mean: Tensor, var: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole batch's count (), mean and (biased) variance (C,) from those of this rank, whose count may be 0.

    Differentiable once in mean and var: what this rank gets is the sum over the ranks of what each differentiates.
    """
    return _MergedStatistics.apply(count, mean, var, group)


class _MergedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, mean, var, group):
        own = torch.cat([count.reshape(1).to(mean.dtype), mean, var])[None]
        counts, means, variances = all_gather(own, group).split([1, *mean.shape, *var.shape], 1)
        whole = counts.sum()
        share = counts / whole.clamp_min(1)
        merged = (share * means).sum(0)
        ctx.group = group
        ctx.save_for_backward(count.to(mean.dtype) / whole.clamp_min(1), mean - merged)
        ctx.mark_non_differentiable(whole)
        return whole, merged, (share * (variances + (means - merged).square())).sum(0)

    @staticmethod
    def backward(ctx, _, grad_mean, grad_var):
        from torch import distributed

        share, distance = ctx.saved_tensors
        both = torch.stack([grad_mean, grad_var])
        distributed.all_reduce(both, group=ctx.group)
        grad_mean, grad_var = both
        return None, share * (grad_mean + 2 * distance * grad_var), share * grad_var, None


def differentiable_once(op: str, grads: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """`grads`, whose derivative by `inputs` is refused."""
    return _Once.apply(op, len(grads), *grads, *inputs)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"the second derivative of {ctx.op} is not supported; impl='reference' has it")


class _Scaled(torch.autograd.Function):
    """x, whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None
