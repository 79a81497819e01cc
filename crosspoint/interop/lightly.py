"""NT-Xent with the constructor and the call of `lightly.loss`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, distributed, nn

from crosspoint.ops import nt_xent

__all__ = ["NTXentLoss"]


class NTXentLoss(nn.Module):
    """Contrastive loss of two views, each (N, D), row i of one being the positive of row i of the other.

    Constructor and call of `lightly.loss.NTXentLoss`. The same: values, gradients, the default temperature,
    an empty state_dict.

    Different: half types and autocast compute in float32 and give a float32 loss; the loss of an empty batch
    is 0, not NaN; gradients survive a loss that rounds to 0. With `gather_distributed=True` the loss is the mean
    over the rows of all processes, not over this one's; the gradients are lightly's (after DistributedDataParallel
    has averaged them, those of the loss of the whole batch), and processes may hold batches of different sizes.
    Refused: a memory bank (its negatives are not this batch's), temperatures that are not positive.

    Memory: that of `crosspoint.ops.nt_xent`, no 2N x 2N similarities.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        impl: str = "auto",
    ):
        super().__init__()
        if memory_bank_size not in (0, (0,), [0]):
            raise ValueError(
                f"NTXentLoss: memory_bank_size must be 0, got {memory_bank_size}; the fused loss takes its "
                "negatives from the batch. For a memory bank use lightly.loss.NTXentLoss"
            )
        if not temperature > 0:
            raise ValueError(f"NTXentLoss: temperature must be positive, got {temperature}")
        if gather_distributed and not distributed.is_available():
            raise ValueError("NTXentLoss: gather_distributed=True needs a torch with torch.distributed")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.impl = impl

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        ready = self.gather_distributed and distributed.is_initialized()
        group = distributed.group.WORLD if ready else None
        return nt_xent(out0, out1, self.temperature, group=group, impl=self.impl)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, impl={self.impl!r}"
