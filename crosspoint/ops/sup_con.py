"""Supervised contrastive loss: every row of the same label is a positive.

Rows z_i are normalised to unit length, s_ij = z_i . z_j / temperature, P(i) are the other rows with the label
of row i. The loss of a row is the mean over its positives outside the logarithm (SupCon, Khosla et al. 2020,
arXiv 2004.11362, L_out):

    loss_i = -1 / |P(i)| * sum over p in P(i) of log(exp(s_ip) / (sum over j != i of exp(s_ij)))

and the loss is the mean over the rows that have a positive, 0 if none has. A row without positives has no loss
of its own; it is a negative of all others. With labels that occur twice each this is `nt_xent`. The same in
PyTorch:

    z = F.normalize(z, dim=1)
    own = torch.eye(n, dtype=torch.bool)
    s = (z @ z.t() / temperature).masked_fill(own, -torch.inf)
    positive = (labels[:, None] == labels) & ~own
    count = positive.sum(1)
    row_losses = -s.log_softmax(1).masked_fill(~positive, 0).sum(1) / count
    row_losses[count > 0].mean()

It is computed with A, the log-sum of exp(s_ip) over the positives, and B over the negatives, kept apart:
softplus(B - A) + (A - mean of s_ip). The second part is 0 for one positive and at least log |P(i)| otherwise, so
that a row with one positive keeps the digits of a tiny loss and of its gradient.

Memory beyond the inputs, with N' = N rounded up to a multiple of 96, D' = D to one of 32, s = 4 bytes (8 for
float64):

    forward:  2 N' D' s + 128 N', of which 2 N s + 8 N stay for the backward
    backward: 3 N' D' s + 128 N', the gradient included

Half types add their widened copy, 2 N D s. On a GPU, with D' and products as for `nt_xent`, s = 2 for half types, and
c = 4 (8):

    forward:  N D' s + 256 N, of which 2 N c + 8 N stay for the backward
    backward: N D' s + D' c max(N, 64 processors) + 256 N, and the gradient

Results are bitwise equal over runs and numbers of threads; no temperature overflows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosspoint.ops import _dispatch, _gpu, _library, reference
from crosspoint.ops._checks import check_embeddings, check_temperature, compute_dtype
from crosspoint.ops._ranks import check_group, differentiable_once, find_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["sup_con"]


def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Supervised contrastive loss of N rows with labels (SupCon's L_out, arXiv 2004.11362).

    Args:
        z: (N, D) embeddings of any length: they are normalised inside as by `F.normalize(dim=1)`. float64,
            float32, or a half type, which is widened to float32; autocast does not narrow them. Several views
            of a sample are several rows with one label.
        labels: (N,) integers, any values.
        temperature: a positive float, or a tensor with one element, which may require a gradient.
        group, grad_reduction: as for `nt_xent`: positives and negatives come from all ranks of the process group.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        A float32 scalar (float64 for float64 input): the mean over the rows that have a positive; 0 if none has.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, within a rank or between ranks; a float
            temperature is not positive; this process is not in the group.
    """
    temperature = _check(z, labels, temperature)
    check_group("sup_con", group, grad_reduction)
    backend = _dispatch.choose("sup_con", impl, z.device)
    ranks = find_ranks("sup_con", group, z, grad_reduction)
    labels = labels.long().contiguous()
    if ranks is not None:
        labels = ranks.gather(labels)
    # From 0 to N - 1, equal where those given are.
    labels = torch.searchsorted(labels.sort().values, labels)
    if backend == "reference":
        with torch.autocast(z.device.type, enabled=False):
            if ranks is not None:
                z, temperature = ranks.gather_around(z), ranks.temperature(temperature)
            return reference.sup_con(z, labels, temperature)
    if ranks is not None:
        return _RankSupCon.apply(z, labels, temperature, ranks, backend)
    return _SupCon.apply(z, labels, temperature, backend)[0]


def _check(z: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    """The temperature as a scalar tensor."""
    check_embeddings("sup_con", "z", z)
    if not isinstance(labels, Tensor):
        raise TypeError(f"sup_con: labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"sup_con: labels must have an integer dtype, got {labels.dtype}; convert them with .long()"
        )
    if labels.shape != z.shape[:1]:
        raise ValueError(
            f"sup_con: labels must hold one label per row of z, shape ({z.shape[0]},), got shape "
            f"{tuple(labels.shape)}"
        )
    if labels.device != z.device:
        raise ValueError(
            f"sup_con: z and labels must be on one device, got {z.device} and {labels.device}; move one of them"
        )
    return check_temperature("sup_con", temperature, z)


def _forward_fake(z, labels, temperature, first_row, rows):
    dtype = compute_dtype(z)
    return z.new_empty((), dtype=dtype), z.new_empty((rows,), dtype=dtype), z.new_empty((rows,), dtype=dtype)


def _backward_fake(grad, z, labels, temperature, row_losses, row_lse, first_row, rows):
    return z.new_empty((rows, z.shape[1])), z.new_empty((), dtype=compute_dtype(z))


# Rows are the samples [first_row, first_row + rows), columns all samples, as in the operators of nt_xent; labels are
# int64 from 0 to 2^31 - 1, of all columns.
_library.define(
    "sup_con(Tensor z, Tensor labels, Tensor temperature, SymInt first_row, SymInt rows)"
    " -> (Tensor loss, Tensor row_losses, Tensor row_lse)",
    _forward_fake,
)
_library.define(
    "sup_con_backward(Tensor grad, Tensor z, Tensor labels, Tensor temperature, Tensor row_losses,"
    " Tensor row_lse, SymInt first_row, SymInt rows) -> (Tensor dz, Tensor dtemperature)",
    _backward_fake,
)
for _name in ("sup_con", "sup_con_backward"):
    _library.define_like(_name, "triton")
_gpu.implement("sup_con", "sup_con", "sup_con_backward", leaves="nt_xent")


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(z, labels, temperature, backend):
        return _dispatch.operator("sup_con", backend)(z, labels, temperature, 0, z.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        _, row_losses, row_lse = output
        ctx.mark_non_differentiable(row_losses, row_lse)
        ctx.save_for_backward(*tensors, row_losses, row_lse)

    @staticmethod
    def backward(ctx, grad, *_):
        rows = ctx.saved_tensors[0].shape[0]
        dz, dtemperature = _SupConBackward.apply(grad, *ctx.saved_tensors, 0, rows, ctx.backend)
        return dz, None, dtemperature, None


class _RankSupCon(torch.autograd.Function):
    """This rank's rows against those of all ranks; `labels` are of all."""

    @staticmethod
    def forward(ctx, z, labels, temperature, ranks, backend):
        columns = ranks.gather(z)
        ctx.settings = ranks.first, ranks.rows
        _, *scalars = _dispatch.operator("sup_con", backend)(columns, labels, temperature, *ctx.settings)
        row_losses, row_lse = (
            ranks.gather(torch.stack(scalars, dim=1)).t().contiguous()
        )  # 8 bytes a row in float32
        ctx.ranks, ctx.backend = ranks, backend
        ctx.save_for_backward(z, columns, labels, temperature, row_losses, row_lse)
        averaged = (row_lse != torch.inf).sum().clamp_min(1)
        return (row_losses.sum(dtype=torch.float64) / averaged).to(row_losses.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, *saved = ctx.saved_tensors
        with torch.no_grad():
            operator = _dispatch.operator("sup_con_backward", ctx.backend)
            dz, share = operator(grad * ctx.ranks.scale, *saved, *ctx.settings)
            share = ctx.ranks.share(share) if ctx.needs_input_grad[2] else share
        dz, dtemperature = differentiable_once("sup_con", (dz, share), grad, z, saved[2])
        return dz, None, dtemperature, None, None


class _SupConBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, z, labels, temperature, row_losses, row_lse, first_row, rows, backend):
        return _dispatch.operator("sup_con_backward", backend)(
            grad, z, labels, temperature, row_losses, row_lse, first_row, rows
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("the second derivative of sup_con is not supported; impl='reference' has it")


_dispatch.register("sup_con", "sup_con", "sup_con_backward")
