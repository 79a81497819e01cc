"""NT-Xent with the constructors and calls of `pytorch_metric_learning.losses`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crosspoint.ops import info_nce, nt_xent

__all__ = ["NTXentLoss", "SelfSupervisedLoss"]

_INSTEAD = "for that use pytorch_metric_learning.losses.NTXentLoss"
# Arguments of the package's constructor whose defaults are what the fused loss computes.
_DEFAULTS = {"distance": "CosineSimilarity", "reducer": "MeanReducer", "embedding_regularizer": None}


class NTXentLoss(nn.Module):
    """NT-Xent of a batch in which every label stands for one sample, seen twice.

    Constructor and call of `pytorch_metric_learning.losses.NTXentLoss`:

        loss(embeddings, labels)    # labels (2N,): each of N labels exactly twice, anywhere
        loss(embeddings, labels, ref_emb=other, ref_labels=labels.clone())    # each of N labels once

    The first is NT-Xent, with 2N - 2 negatives for each of 2N anchors. In the second only rows of
    `embeddings` are anchors and only rows of `ref_emb` are compared with them. The same: values and gradients,
    0 where there is nothing to contrast. Labels are read on the host, which waits for a GPU.

    Different: half types compute in float32 and give a float32 loss; where the probability of a positive is
    below the smallest normal number (1e-38 in float32), the package's loss stops growing and its gradient
    fades, and this one goes on. Refused, with the reason: labels in any other pattern (supervised classes),
    `indices_tuple` (miners), other distances, reducers and regularisers.

    Args:
        temperature: positive.
        distance: None or CosineSimilarity with its defaults; reducer: None or MeanReducer.
        impl: backend of `crosspoint.ops.nt_xent`.

    Memory: that of `crosspoint.ops.nt_xent` and the embeddings once more; no similarities, no pairs.
    """

    def __init__(self, temperature: float = 0.07, *, impl: str = "auto", **kwargs):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"NTXentLoss: temperature must be positive, got {temperature}")
        for name, value in kwargs.items():
            if name not in _DEFAULTS:
                raise TypeError(f"NTXentLoss: the fused loss has no argument {name!r}; {_INSTEAD}")
            if not _is_default(value, _DEFAULTS[name]):
                only = "None" if _DEFAULTS[name] is None else f"None or {_DEFAULTS[name]}()"
                raise ValueError(f"NTXentLoss: {name} must be {only}, got {value!r}; {_INSTEAD}")
        self.temperature = temperature
        self.impl = impl

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if indices_tuple is not None:
            raise ValueError(f"NTXentLoss: indices_tuple (chosen pairs) is not fused; {_INSTEAD}")
        if embeddings.dim() != 2:
            raise ValueError(f"NTXentLoss: embeddings must be (batch, D), got {tuple(embeddings.shape)}")
        order = _order("labels", labels, embeddings)
        if ref_emb is None:
            if ref_labels is not None:
                raise ValueError("NTXentLoss: ref_labels without ref_emb; pass both or none")
            label = labels[order.to(labels.device)]
            if label.numel() % 2 or not _each_twice(label):
                raise ValueError(
                    "NTXentLoss: every label must appear exactly twice, as in "
                    f"torch.cat([torch.arange(N), torch.arange(N)]); {_INSTEAD}"
                )
            pairs = embeddings[order]
            return nt_xent(pairs[0::2], pairs[1::2], self.temperature, impl=self.impl)
        ref_order = _order("ref_labels", ref_labels, ref_emb)
        label, ref_label = labels[order.to(labels.device)], ref_labels[ref_order.to(ref_labels.device)]
        if ref_labels is labels:
            raise ValueError(
                "NTXentLoss: labels and ref_labels are one tensor, which makes the package leave out the "
                "positives, row i against row i; pass ref_labels=labels.clone()"
            )
        if not torch.equal(label, ref_label.to(label.device)) or (label[1:] == label[:-1]).any():
            raise ValueError(
                "NTXentLoss: with ref_emb, labels and ref_labels must hold the same labels, each once in both; "
                f"{_INSTEAD}"
            )
        return info_nce(
            embeddings[order], ref_emb[ref_order], self.temperature, symmetric=False, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, impl={self.impl!r}"


class SelfSupervisedLoss(nn.Module):
    """`loss(embeddings, ref_emb)`: row i of one is the positive of row i of the other, both (N, D).

    Constructor and call of `pytorch_metric_learning.losses.SelfSupervisedLoss`; the same values and gradients,
    without labels and thus without waiting for the device. symmetric=True is NT-Xent over both sets;
    symmetric=False contrasts rows of `embeddings` with rows of `ref_emb` only.

    Args:
        loss: `NTXentLoss` of this module; others are refused.
        symmetric: as above.
    """

    def __init__(self, loss: NTXentLoss, symmetric: bool = True, **kwargs):
        super().__init__()
        if not isinstance(loss, NTXentLoss):
            raise TypeError(
                f"SelfSupervisedLoss: loss must be {NTXentLoss.__module__}.NTXentLoss, got {type(loss)}; for "
                "other losses use pytorch_metric_learning.losses.SelfSupervisedLoss"
            )
        if kwargs:
            raise TypeError(f"SelfSupervisedLoss: the fused loss has no argument {next(iter(kwargs))!r}")
        self.loss = loss
        self.symmetric = symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        if self.symmetric:
            return nt_xent(embeddings, ref_emb, self.loss.temperature, impl=self.loss.impl)
        return info_nce(embeddings, ref_emb, self.loss.temperature, symmetric=False, impl=self.loss.impl)


def _is_default(value: object, default: str | None) -> bool:
    if value is None:
        return True
    kind = type(value)
    if kind.__name__ != default or not kind.__module__.startswith("pytorch_metric_learning."):
        return False
    return getattr(value, "p", 2) == 2 and getattr(value, "power", 1) == 1


def _order(name: str, labels: Tensor | None, embeddings: Tensor) -> Tensor:
    """The order that sorts the labels, on the device of the embeddings."""
    if labels is None:
        raise ValueError(
            f"NTXentLoss: {name} must be given; for two views without labels there is SelfSupervisedLoss"
        )
    if labels.dim() != 1 or labels.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"NTXentLoss: {name} must hold one label per embedding, shape ({embeddings.shape[0]},), got "
            f"{tuple(labels.shape)}; for two views without labels there is SelfSupervisedLoss"
        )
    return labels.argsort(stable=True).to(embeddings.device)


def _each_twice(label: Tensor) -> bool:
    """Whether sorted labels come in pairs and no label in two pairs."""
    same = label[1:] == label[:-1]
    return bool(same[0::2].all() and not same[1::2].any())
