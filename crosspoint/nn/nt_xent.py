"""The contrastive losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from crosspoint.ops import nt_xent, sup_con

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
        impl: backend of `crosspoint.ops.nt_xent`.

    Shapes: z1, z2 (N, D), row i of one being the positive of row i of the other -> scalar. The vectors are
    normalised inside; each anchor has the 2N - 2 other vectors of both sets as negatives.
    """

    def __init__(self, temperature: float | Tensor = 0.1, *, impl: str = "auto"):
        super().__init__(temperature, impl)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, self.temperature, impl=self.impl)


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
