"""NT-Xent and InfoNCE: contrastive losses of two views, without the matrix of their similarities.

Rows z_i are normalised to unit length, s_ij = z_i . z_j / temperature, and p, the positive of row i, is the
row of the same sample in the other view:

    loss_i = softplus(logsumexp(s_ij over the negatives j) - s_ip)

This is cross entropy with the positive as the target, written so that neither the loss nor its gradient is
lost where the positive wins by far. `nt_xent` averages it over the 2N rows of both views; the negatives of
a row are the 2N - 2 rows of other samples (SimCLR, arXiv 2002.05709). `info_nce` averages it over the N
rows of the first view, whose negatives are the N - 1 other rows of the second, and, if symmetric, over both
directions (CLIP, arXiv 2103.00020). The same in PyTorch:

    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.t() / temperature).fill_diagonal_(-torch.inf)
    F.cross_entropy(s, torch.arange(2 * n).roll(n))  # nt_xent

    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t() / temperature
    (F.cross_entropy(s, torch.arange(n)) + F.cross_entropy(s.t(), torch.arange(n))) / 2  # info_nce

Memory beyond the inputs, with N' = N rounded up to a multiple of 96, D' = D to one of 32, s = 4 bytes (8 for
float64):

    forward:  4 N' D' s + 64 N', of which 2 N s stay for the backward
    backward: 6 N' D' s + 64 N', the gradients included

Half types add their widened copies, 4 N D s. Up to 64 MB of the workspace is kept between calls. On a GPU, with D'
the next power of two from 16 on (above 256, the next multiple of 128), s = 2 for half types, and c = 4 (8):

    forward:  2 N D' s + 256 N, of which 2 N c stay for the backward
    backward: 2 N D' s + D' c max(2 N, 64 processors) + 256 N, and the gradients

With `group`, N is that of all ranks, but this rank's beside `processors`; the gathered embeddings (2 N D in the
input's dtype) stay for the backward, and up to three copies of them exist while they are gathered.

A GPU multiplies half types as they are given, and float32 as `torch.get_float32_matmul_precision()` says: "highest"
keeps its digits (three products of tf32), "high" is tf32, "medium" bfloat16. All sums are float32 (float64).

Several processes (`group`): negatives come from all ranks, which may hold different numbers of samples. The
embeddings are gathered once, then the row losses; with both at hand each rank forms the complete gradient of its
own rows, so that no gradient is exchanged but a temperature's. The loss is the mean over the rows of all ranks, the
same on every rank, and every rank must weight it equally in what it differentiates. Gradients are scaled for what
follows, `grad_reduction`: for "mean", as DistributedDataParallel and FSDP have it, each rank gets the number of
ranks times the gradient of the loss by its own embeddings, and the whole derivative by the temperature; for "sum",
the gradient of the loss by its own embeddings, and its share of the temperature's. After that reduction parameter
gradients are those of one process with all samples. A group of one rank is no group. Half types are sent as they
are. torch.compile breaks its graph at the exchange.

The gradients of the rows (through their normalisation) and of the temperature come from one pass. Results
are bitwise equal over runs and numbers of threads. No temperature overflows: exponents are taken relative
to a bound that all rows share where the range of the type allows it (above 0.0145 in float32, 0.0017 in
float64), and else each row has its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosspoint.ops import _dispatch, _gpu, _library, reference
from crosspoint.ops._checks import check_embeddings, check_temperature, compute_dtype
from crosspoint.ops._ranks import Ranks, check_group, differentiable_once, find_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["info_nce", "nt_xent"]


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Normalised temperature-scaled cross entropy of two views of N samples (SimCLR, arXiv 2002.05709).

    Args:
        z1, z2: (N, D) embeddings, row i of both from sample i; any length: they are normalised inside as by
            `F.normalize(dim=1)`. float64, float32, or a half type, which is widened to float32; autocast
            does not narrow them.
        temperature: a positive float, or a tensor with one element, which may require a gradient.
        group: a process group of torch.distributed: the loss is that of the rows of all its ranks, each with its own
            N (0 too) of one D and dtype, and the same on every rank. Ranks must call in the same order.
        grad_reduction: with a group, what is done with the gradients of the ranks afterwards: "mean", as DDP and
            FSDP do, or "sum". See the module's docstring.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        A float32 scalar (float64 for float64 input); 0 for N = 0 and N = 1, where nothing is contrasted.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, within a rank or between ranks; a float
            temperature is not positive; this process is not in the group.
    """
    z1, z2, temperature = _check("nt_xent", z1, z2, temperature)
    check_group("nt_xent", group, grad_reduction)
    backend = _dispatch.choose("nt_xent", impl, z1.device)
    ranks = find_ranks("nt_xent", group, z1, grad_reduction)
    if backend == "reference":
        with torch.autocast(z1.device.type, enabled=False):
            return reference.nt_xent(*_around(z1, z2, temperature, ranks))
    if ranks is not None:
        return _RankContrast.apply(z1, z2, temperature, True, True, ranks, backend)
    return _Contrast.apply(z1, z2, temperature, True, True, backend)[0]


def info_nce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    symmetric: bool = True,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross entropy of each row of `z1` against all rows of `z2` (InfoNCE), or in both directions (CLIP).

    Args:
        z1, z2, temperature, group, grad_reduction, impl: as for `nt_xent`.
        symmetric: average both directions; False: only rows of `z1` against columns `z2`.

    Returns:
        A float32 scalar (float64 for float64 input); 0 for N = 0 and N = 1.

    Raises:
        ValueError, TypeError: as for `nt_xent`.
    """
    z1, z2, temperature = _check("info_nce", z1, z2, temperature)
    check_group("info_nce", group, grad_reduction)
    backend = _dispatch.choose("info_nce", impl, z1.device)
    ranks = find_ranks("info_nce", group, z1, grad_reduction)
    if backend == "reference":
        with torch.autocast(z1.device.type, enabled=False):
            return reference.info_nce(*_around(z1, z2, temperature, ranks), symmetric=symmetric)
    if ranks is not None:
        return _RankContrast.apply(z1, z2, temperature, False, bool(symmetric), ranks, backend)
    return _Contrast.apply(z1, z2, temperature, False, bool(symmetric), backend)[0]


def _check(op: str, z1: Tensor, z2: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings, and the temperature as a scalar tensor of the dtype that is computed in."""
    for name, z in (("z1", z1), ("z2", z2)):
        check_embeddings(op, name, z)
    if z1.shape != z2.shape:
        raise ValueError(
            f"{op}: z1 and z2 must have the same shape (N, D), row i of both from the same sample; "
            f"got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    if z1.dtype != z2.dtype:
        raise TypeError(
            f"{op}: z1 and z2 must have one dtype, got {z1.dtype} and {z2.dtype}; convert one of them"
        )
    if z1.device != z2.device:
        raise ValueError(
            f"{op}: z1 and z2 must be on one device, got {z1.device} and {z2.device}; move one of them"
        )
    if z2 is z1:
        z2 = z1.view_as(z1)  # torch.compile traces no Function that is given one tensor twice
    return z1, z2, check_temperature(op, temperature, z1)


def _around(z1: Tensor, z2: Tensor, temperature: Tensor, ranks: Ranks | None) -> tuple[Tensor, ...]:
    """For the reference: the rows of all ranks, of which only this rank's have a gradient."""
    if ranks is None:
        return z1, z2, temperature
    return *ranks.gather_around(torch.stack([z1, z2], dim=1)).unbind(1), ranks.temperature(temperature)


def _forward_fake(z1, z2, temperature, within_views, symmetric, first_row, rows):
    dtype = compute_dtype(z1)
    return z1.new_empty((), dtype=dtype), z1.new_empty((2, rows), dtype=dtype)


def _backward_fake(grad, z1, z2, temperature, row_losses, within_views, symmetric, first_row, rows):
    dz1, dz2 = (z1.new_empty((rows, z1.shape[1])) for _ in range(2))
    return dz1, dz2, z1.new_empty((), dtype=compute_dtype(z1))


# Rows are the samples [first_row, first_row + rows) of both views, columns all samples; `loss` is the mean over the
# rows, `grad` that of the mean over all columns, whose row losses the backward is given.
_library.define(
    "nt_xent(Tensor z1, Tensor z2, Tensor temperature, bool within_views, bool symmetric,"
    " SymInt first_row, SymInt rows) -> (Tensor loss, Tensor row_losses)",
    _forward_fake,
)
_library.define(
    "nt_xent_backward(Tensor grad, Tensor z1, Tensor z2, Tensor temperature, Tensor row_losses,"
    " bool within_views, bool symmetric, SymInt first_row, SymInt rows)"
    " -> (Tensor dz1, Tensor dz2, Tensor dtemperature)",
    _backward_fake,
)
for _name in ("nt_xent", "nt_xent_backward"):
    _library.define_like(_name, "triton")
_gpu.implement("nt_xent", "nt_xent", "nt_xent_backward")


class _Contrast(torch.autograd.Function):
    """Both losses: NT-Xent has negatives within the views, InfoNCE only across."""

    @staticmethod
    def forward(z1, z2, temperature, within_views, symmetric, backend):
        operator = _dispatch.operator("nt_xent", backend)
        return operator(z1, z2, temperature, within_views, symmetric, 0, z1.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        z1, z2, temperature, ctx.within_views, ctx.symmetric, ctx.backend = inputs
        _, row_losses = output
        ctx.mark_non_differentiable(row_losses)
        ctx.save_for_backward(z1, z2, temperature, row_losses)

    @staticmethod
    def backward(ctx, grad, _):
        rows = ctx.saved_tensors[0].shape[0]
        settings = ctx.within_views, ctx.symmetric, 0, rows, ctx.backend
        return *_ContrastBackward.apply(grad, *ctx.saved_tensors, *settings), None, None, None


class _RankContrast(torch.autograd.Function):
    """This rank's rows against those of all ranks: two gathers forward, a temperature's derivative backward."""

    @staticmethod
    def forward(ctx, z1, z2, temperature, within_views, symmetric, ranks, backend):
        columns = ranks.gather(torch.stack([z1, z2], dim=1))  # (sum of N, 2, D)
        columns = columns[:, 0].contiguous(), columns[:, 1].contiguous()
        ctx.settings = within_views, symmetric, ranks.first, ranks.rows
        _, own_losses = _dispatch.operator("nt_xent", backend)(*columns, temperature, *ctx.settings)
        row_losses = ranks.gather(own_losses.t()).t().contiguous()  # (2, sum of N)
        ctx.ranks, ctx.backend = ranks, backend
        ctx.save_for_backward(z1, z2, *columns, temperature, row_losses)
        averaged = max(1, ranks.total * (2 if symmetric else 1))
        return (row_losses.sum(dtype=torch.float64) / averaged).to(row_losses.dtype)

    @staticmethod
    def backward(ctx, grad):
        z1, z2, *saved = ctx.saved_tensors
        with torch.no_grad():
            operator = _dispatch.operator("nt_xent_backward", ctx.backend)
            *grads, share = operator(grad * ctx.ranks.scale, *saved, *ctx.settings)
            grads.append(ctx.ranks.share(share) if ctx.needs_input_grad[2] else share)
        grads = differentiable_once("nt_xent and info_nce", grads, grad, z1, z2, saved[2])
        return *grads, None, None, None, None


class _ContrastBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, z1, z2, temperature, row_losses, within_views, symmetric, first_row, rows, backend):
        return _dispatch.operator("nt_xent_backward", backend)(
            grad, z1, z2, temperature, row_losses, within_views, symmetric, first_row, rows
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "the second derivative of nt_xent and info_nce is not supported; impl='reference' has it"
        )


_dispatch.register("nt_xent", "nt_xent", "nt_xent_backward")
_dispatch.register("info_nce", "nt_xent", "nt_xent_backward")
