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
input's dtype) stay for the backward, and up to three copies of them exist while they are gathered. With
exchange="ring" nothing is as large as that: with N this rank's samples, or the largest rank's if those are more, in a
dtype of s bytes, at most

    forward:  18 N' D' s + 256 N, of which 32 N stay for the backward
    backward: 24 N' D' s + 256 N, the gradients included

on a CPU, and less in all on a GPU. Half types add their widened copies there, 8 N D s; a few MB are scratch.

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

Where the embeddings of all ranks do not fit on each (`exchange="ring"`), every rank passes on to the next what it has
in hand, and uses that while more is on its way. A row's sum of exponentials over its negatives grows with each
visit; backward, in a second turn, rows bring along the logarithm of what their softmax divides by (8 bytes each), so
that every rank again forms the complete gradient of its own rows. Results equal those of "gather" to rounding; the
work is the same.

The gradients of the rows (through their normalisation) and of the temperature come from one pass. Results
are bitwise equal over runs and numbers of threads. No temperature overflows: exponents are taken relative
to a bound that all rows share where the range of the type allows it (above 0.0145 in float32, 0.0017 in
float64), and else each row has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosspoint.ops import _dispatch, _gpu, _library, reference
from crosspoint.ops._checks import check_embeddings, check_temperature, compute_dtype
from crosspoint.ops._ranks import Ranks, all_gather, check_group, differentiable_once, find_ranks

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
    exchange: str = "gather",
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
        exchange: with a group, "gather" the embeddings of all ranks on each, or, where they do not fit, pass them on
            in a "ring". impl="reference", which holds all similarities, has no ring.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        A float32 scalar (float64 for float64 input); 0 for N = 0 and N = 1, where nothing is contrasted.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, within a rank or between ranks; a float
            temperature is not positive; this process is not in the group.
    """
    z1, z2, temperature = _check("nt_xent", z1, z2, temperature)
    check_group("nt_xent", group, grad_reduction, exchange)
    backend = _dispatch.choose("nt_xent", impl, z1.device)
    _check_exchange("nt_xent", exchange, backend, group)
    ranks = find_ranks("nt_xent", group, z1, grad_reduction)
    if backend == "reference":
        with torch.autocast(z1.device.type, enabled=False):
            return reference.nt_xent(*_around(z1, z2, temperature, ranks))
    if ranks is not None:
        over_ranks = _RingContrast if exchange == "ring" else _RankContrast
        return over_ranks.apply(z1, z2, temperature, True, True, ranks, backend)
    return _Contrast.apply(z1, z2, temperature, True, True, backend)[0]


def info_nce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    symmetric: bool = True,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
    exchange: str = "gather",
    impl: str = "auto",
) -> Tensor:
    """Cross entropy of each row of `z1` against all rows of `z2` (InfoNCE), or in both directions (CLIP).

    Args:
        z1, z2, temperature, group, grad_reduction, exchange, impl: as for `nt_xent`.
        symmetric: average both directions; False: only rows of `z1` against columns `z2`.

    Returns:
        A float32 scalar (float64 for float64 input); 0 for N = 0 and N = 1.

    Raises:
        ValueError, TypeError: as for `nt_xent`.
    """
    z1, z2, temperature = _check("info_nce", z1, z2, temperature)
    check_group("info_nce", group, grad_reduction, exchange)
    backend = _dispatch.choose("info_nce", impl, z1.device)
    _check_exchange("info_nce", exchange, backend, group)
    ranks = find_ranks("info_nce", group, z1, grad_reduction)
    if backend == "reference":
        with torch.autocast(z1.device.type, enabled=False):
            return reference.info_nce(*_around(z1, z2, temperature, ranks), symmetric=symmetric)
    if ranks is not None:
        over_ranks = _RingContrast if exchange == "ring" else _RankContrast
        return over_ranks.apply(z1, z2, temperature, False, bool(symmetric), ranks, backend)
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


def _check_exchange(op: str, exchange: str, backend: str, group: ProcessGroup | None) -> None:
    if exchange == "ring" and backend == "reference" and group is not None:
        raise ValueError(
            f"{op}: exchange='ring' needs kernels, got impl='reference', which holds the similarities of all rows; "
            "use exchange='gather'"
        )


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
# Rows z (n, D) against columns (m, D) of other samples, all of them negatives: lse (n) float64, the logs of the sums
# of exp(s_ij) over the columns. Backward, row_lse (n) and column_lse (m) float64 are the logs of what their softmaxes
# divide by, infinity without a loss, and no softmax exceeds `largest` () float64: with w_ij = exp(s_ij - row_lse_i) +
# exp(s_ij - column_lse_j), the sums over j of w_ij (unit column j), and that of all w_ij s_ij.
_library.define(
    "nt_xent_visit(Tensor z, Tensor columns, Tensor temperature) -> Tensor lse",
    lambda z, columns, temperature: z.new_empty((z.shape[0],), dtype=torch.float64),
)
_library.define(
    "nt_xent_visit_backward(Tensor z, Tensor columns, Tensor temperature, Tensor row_lse, Tensor column_lse,"
    " Tensor largest) -> (Tensor sums, Tensor moment)",
    lambda z, *_: (torch.empty_like(z, dtype=compute_dtype(z)), z.new_empty((), dtype=torch.float64)),
)
for _name in ("nt_xent", "nt_xent_backward", "nt_xent_visit", "nt_xent_visit_backward"):
    _library.define_like(_name, "triton")
_gpu.implement("nt_xent", "nt_xent", "nt_xent_backward")
_gpu.implement("nt_xent_visit", "nt_xent_visit", "nt_xent_visit_backward", leaves="nt_xent")


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


class _RingContrast(torch.autograd.Function):
    """This rank's rows against its own and against those that visit it: one turn of the ring forward, one backward. In
    it, samples are pairs of rows, (N, 2, D)."""

    @staticmethod
    def forward(ctx, z1, z2, temperature, within_views, symmetric, ranks, backend):
        own, visit = (_dispatch.operator(name, backend) for name in ("nt_xent", "nt_xent_visit"))
        pairs = torch.stack([z1, z2], dim=1).detach()
        others = torch.full((ranks.rows, 2), -torch.inf, dtype=torch.float64, device=z1.device)
        for step, (visiting,) in enumerate(ranks.ring(pairs)):
            if step == 0:
                _, own_losses = own(z1, z2, temperature, within_views, symmetric, 0, ranks.rows)
            elif ranks.rows > 0 and len(visiting) > 0:
                for rows, columns in _meetings(within_views)[: 2 if symmetric else 1]:
                    lse = visit(rows(pairs), columns(visiting), temperature)
                    rows(others).copy_(torch.logaddexp(rows(others), lse))
        losses = own_losses.t().double()
        # Softplus turned around: the log-sum over the own negatives, less the positive.
        own_margin = torch.where(losses > 50, losses, losses.clamp_max(50).expm1().log())
        positives = _cosines(z1, z2)[:, None] / temperature.double()
        losses = F.softplus(torch.logaddexp(own_margin, others - positives), threshold=50)
        lse = positives + losses
        if not symmetric:
            losses[:, 1], lse[:, 1] = 0, torch.inf
        found = torch.stack([losses.sum(), torch.cat([losses.flatten(), losses.new_zeros(1)]).max()])
        sums, largest = all_gather(found[None], ranks.group).unbind(
            1
        )  # the same order, and so bits, on every rank
        ctx.settings, ctx.ranks, ctx.backend = (within_views, symmetric), ranks, backend
        row_losses = losses.t().to(own_losses.dtype).contiguous()
        ctx.save_for_backward(z1, z2, temperature, row_losses, lse, -torch.expm1(-largest.max()))
        averaged = max(1, ranks.total * (2 if symmetric else 1))
        return (sums.sum() / averaged).to(own_losses.dtype)

    @staticmethod
    def backward(ctx, grad):
        z1, z2, temperature, row_losses, lse, largest = ctx.saved_tensors
        (within_views, symmetric), ranks = ctx.settings, ctx.ranks
        own, visit = (
            _dispatch.operator(name, ctx.backend) for name in ("nt_xent_backward", "nt_xent_visit_backward")
        )
        with torch.no_grad():
            scaled = grad * ranks.scale
            pairs = torch.stack([z1, z2], dim=1)
            sums = torch.zeros_like(pairs, dtype=row_losses.dtype)  # by the unit rows
            moment = lse.new_zeros(())
            for step, (visiting_lse, visiting) in enumerate(ranks.ring(lse, pairs)):
                if step == 0:
                    of_own = scaled * (ranks.rows / max(1, ranks.total))  # it takes the mean over its rows
                    settings = within_views, symmetric, 0, ranks.rows
                    *grads, share = own(of_own, z1, z2, temperature, row_losses, *settings)
                elif ranks.rows > 0 and len(visiting) > 0:
                    for rows, columns in _meetings(within_views):
                        given = rows(pairs), columns(visiting), temperature, rows(lse), columns(visiting_lse)
                        found, met = visit(*given, largest)
                        rows(sums).add_(found)
                        moment += met
            averaged = max(1, ranks.total * (2 if symmetric else 1))
            factor = scaled.double() / (averaged * temperature.double())
            _through_lengths(sums.flatten(0, 1), pairs.flatten(0, 1), factor)
            grads = [(dz + more).to(dz.dtype) for dz, more in zip(grads, sums.unbind(1), strict=True)]
            # As each pair of rows of two ranks enters from both.
            share = share - (factor * moment / 2).to(share.dtype)
            grads.append(ranks.share(share) if ctx.needs_input_grad[2] else share)
        grads = differentiable_once("nt_xent and info_nce", grads, grad, z1, z2, temperature)
        return *grads, None, None, None, None


def _meetings(within_views: bool) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Which rows of pairs (n, 2, ...) meet which of pairs that visit them."""
    if within_views:
        return [(partial(torch.flatten, end_dim=1),) * 2]
    first, second = (partial(torch.select, dim=1, index=view) for view in range(2))
    return [(first, second), (second, first)]


def _some_rows(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Of each, (N, D), a few rows at a time: what is computed of them in float64 stays small."""
    rows = max(1, (1 << 17) // max(1, tensors[0].shape[1]))
    return zip(*(x.split(rows) for x in tensors), strict=True)


def _cosines(z1: Tensor, z2: Tensor) -> Tensor:
    """Of each row with that of the other view, (N) float64."""
    unit = ((F.normalize(z.double(), dim=1) for z in pair) for pair in _some_rows(z1, z2))
    return torch.cat([torch.linalg.vecdot(*pair) for pair in unit])


def _through_lengths(grad: Tensor, z: Tensor, factor: Tensor) -> None:
    """In place, from the gradient by the unit rows to `factor` times that by the rows z."""
    for to, rows in _some_rows(grad, z):
        rows, by_unit = rows.double(), to.double()
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        divisor = length.clamp_min(1e-12)
        unit = rows / divisor
        along = torch.linalg.vecdot(by_unit, unit)[:, None].masked_fill(length < 1e-12, 0)
        to.copy_((by_unit - along * unit) * (factor / divisor))


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


_OPERATORS = ("nt_xent", "nt_xent_backward", "nt_xent_visit", "nt_xent_visit_backward")
_dispatch.register("nt_xent", *_OPERATORS)
_dispatch.register("info_nce", *_OPERATORS)
