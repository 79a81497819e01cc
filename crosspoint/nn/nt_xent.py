"""The contrastive losses as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, distributed, nn

from crosspoint.ops import nt_xent, sup_con
from crosspoint.ops._ranks import check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["NTXentLoss", "SupConLoss"]


class _Contrastive(nn.Module):
    """A temperature, fixed or learned, and a backend."""

    def __init__(self, temperature: float | Tensor, impl: str):
        super().__init__()
        if isinstance(temperature, Tensor):
            if temperature.numel() != 1:
                raise ValueError(
                    f"temperature must have one element, got a tensor of shape {tuple(temperature.shape)}"
                )
        elif not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.impl = impl

    def extra_repr(self) -> str:
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            kind = "learned" if isinstance(temperature, nn.Parameter) else "buffer"
            return f"temperature={kind}, impl={self.impl!r}"
        return f"temperature={temperature}, impl={self.impl!r}"


class NTXentLoss(_Contrastive):
    """Normalised temperature-scaled cross entropy of two sets of N embeddings (SimCLR, arXiv 2002.05709).

    Args:
        temperature: a positive float, or a tensor of one element; an `nn.Parameter` is trained with the
            model, any other tensor is kept as a buffer.
        gather_distributed: negatives from the batches of all processes (of `group`, or all of them), which may
            differ in size; the loss is the same on every rank. Without an initialised process group there is one
            process. Gradients come scaled for what follows, `grad_reduction`: "mean", as
            DistributedDataParallel and FSDP do, or "sum"; then parameters get the gradient that one process
            would have given them with the whole batch. `crosspoint.ops.nt_xent` has the details.
        exchange: how the processes see each other's embeddings: "gather" all on each, or, where those do not fit, pass
            them on in a "ring".
        impl: backend of `crosspoint.ops.nt_xent`.

    Shapes: z1, z2 (N, D), row i of one being the positive of row i of the other -> scalar. The vectors are
    normalised inside; each anchor has the 2N - 2 other vectors of both sets as negatives.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        gather_distributed: bool = False,
        group: ProcessGroup | None = None,
        grad_reduction: str = "mean",
        exchange: str = "gather",
        impl: str = "auto",
    ):
        super().__init__(temperature, impl)
        check_group("NTXentLoss", group, grad_reduction, exchange)
        if group is not None and not gather_distributed:
            raise ValueError("NTXentLoss: group was given without gather_distributed=True")
        if exchange != "gather" and not gather_distributed:
            raise ValueError(f"NTXentLoss: exchange={exchange!r} was given without gather_distributed=True")
        self.gather_distributed = gather_distributed
        self.group = group
        self.grad_reduction = grad_reduction
        self.exchange = exchange

    def gather_over(self, group: ProcessGroup | None, exchange: str = "gather") -> None:
        """From here on take negatives from all processes of `group`, or all there are."""
        check_group("NTXentLoss", group, self.grad_reduction, exchange)
        self.gather_distributed, self.group, self.exchange = True, group, exchange

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        group = self.group
        if (
            group is None
            and self.gather_distributed
            and distributed.is_available()
            and distributed.is_initialized()
        ):
            group = distributed.group.WORLD
        return nt_xent(
            z1,
            z2,
            self.temperature,
            group=group,
            grad_reduction=self.grad_reduction,
            exchange=self.exchange,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr() + (", gather_distributed=True" if self.gather_distributed else "")
        return text + (f", exchange={self.exchange!r}" if self.exchange != "gather" else "")


class SupConLoss(_Contrastive):
    """Supervised contrastive loss: rows of one label are positives of each other (SupCon, arXiv 2004.11362).

    Args:
        temperature, impl: as for `NTXentLoss`.

    Shapes: z (N, D), labels (N,) integers -> scalar, the mean over the rows that have a positive. The vectors are
    normalised inside. Several views of a batch: `loss(torch.cat([z1, z2]), labels.repeat(2))`.
    """

    def __init__(self, temperature: float | Tensor = 0.1, *, impl: str = "auto"):
        super().__init__(temperature, impl)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return sup_con(z, labels, self.temperature, impl=self.impl)
