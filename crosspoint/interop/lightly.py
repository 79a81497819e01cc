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
    is 0, not NaN; gradients survive a loss that rounds to 0. Refused: a memory bank (its negatives are not
    this batch's), `gather_distributed=True` among several processes, temperatures that are not positive.

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
        if self.gather_distributed and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise NotImplementedError(
                f"NTXentLoss: gather_distributed=True among {distributed.get_world_size()} processes is not "
                "supported: negatives of other processes are not gathered. Pass gather_distributed=False for "
                "negatives of each process's own batch, or use lightly.loss.NTXentLoss"
            )
        return nt_xent(out0, out1, self.temperature, impl=self.impl)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, impl={self.impl!r}"
