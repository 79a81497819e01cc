"""The processes of one training: as torchrun starts them, or one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

from crosspoint._device import resolve_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks", "joined"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `world`, on its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what there is to write once."""
        return self.rank == 0

    @property
    def key(self) -> tuple[int, ...]:
        """Of seeds that differ between ranks; one process alone draws as the first of several."""
        return () if self.first else (self.rank,)

    def part(self, items: list[T]) -> list[T]:
        """This rank's of the items that all share."""
        size = len(items)
        return items[self.rank * size // self.world : (self.rank + 1) * size // self.world]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank, the same on all: they must ask together."""
        if self.world == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return bool(found.item())

    def mesh(self) -> DeviceMesh:
        """All ranks, as what shards tensors takes them."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.world,))

    def gather(self, value: T) -> list[T]:
        """That of every rank, in their order, the same list on all: they must ask together."""
        if self.world == 1:
            return [value]
        found: list[T] = [value] * self.world
        distributed.all_gather_object(found, value)
        return found

    def on_first(self, function: Callable[[], object]) -> None:
        """function(), on the first rank; the others wait for its end. Where it raises OSError, all do."""
        failure = None
        if self.first:
            try:
                function()
            except OSError as error:
                failure = error
        if not self.any(failure is not None):
            return
        reason = self.gather(str(failure))[0]
        raise failure or OSError(f"on the first rank: {reason}")

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Of every tensor over the ranks, in place, in one exchange for each dtype."""
        if self.world == 1:
            return
        for dtype in {tensor.dtype: None for tensor in tensors}:
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in same])
            distributed.all_reduce(flat)
            for tensor, value in zip(same, (flat / self.world).split([t.numel() for t in same]), strict=True):
                tensor.copy_(value.view_as(tensor))

    def first_then_all(self, function: Callable[[], T]) -> T:
        """function(), on the first rank before the others: these find what it has written."""
        if not self.first:
            self.barrier()
        value = function()
        if self.first:
            self.barrier()
        return value


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks of this training: those of torchrun (WORLD_SIZE and what goes with it), or this process alone.

    Where torchrun runs several processes on one machine with GPUs, "auto" gives each its own. A process group that the
    caller has made is used as it is; one made here ends with the block. Inside, the loss of another rank is a
    ConnectionError.
    """
    own = not (distributed.is_available() and distributed.is_initialized())
    world = int(os.environ.get("WORLD_SIZE", "1")) if own else distributed.get_world_size()
    if world == 1:
        yield Ranks(resolve_device(device))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{local}"
    elif device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"device must be 'auto' with several processes on a machine, got {device!r} for all of them"
        )
    found = resolve_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if own:
        _meet("nccl" if found.type == "cuda" else "gloo", world)
    ranks = Ranks(found, distributed.get_rank(), world)
    try:
        yield ranks
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        raise ConnectionError(
            f"rank {ranks.rank} of {world} has lost contact to another rank ({error}): the one that failed first says "
            "why. The last checkpoint is intact: --resume, or a restart by torchrun --max-restarts, goes on from there"
        ) from error
    finally:
        if own:
            distributed.destroy_process_group()


def _meet(backend: str, world: int) -> None:
    store, rank, world = next(distributed.rendezvous("env://"))
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world:
        # torchrun's store outlives its workers: the addresses of those before a restart must not be found. Between
        # machines the counts may differ, so there it is left to torchrun.
        store = distributed.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def _lost_contact(error: RuntimeError) -> bool:
    # gloo's errors have no class of their own, but the path of the source file that they come from.
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
