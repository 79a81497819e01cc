"""NT-Xent and InfoNCE on a GPU: docs/derivations/nt_xent.md derives them. `sup_con` is made of the same leaves.

Row i of V views (1 with labels, else 2) of N samples is held as it is multiplied: times a power of two that gives it a
length from 1 up to 2, which is exact, rounded where the product asks for it, and beside it the factor that is missing
to unit length. So half types lose nothing, and rows may have any length. With x_ij = s_ij log2(e), the leaves are:

normalise(z, product, rows, scale)
    z (N, D), any floating dtype, contiguous -> rows (N, W), W = `width(D)`, zeros behind D, in the dtype of the product
    (float32 for tf32, where it is rounded to the nearest of tf32, and for tf32x3, where it is not); scale (N), float32
    or float64: unit row i is scale_i rows_i. A row shorter than 1e-12 counts as that long; one that is not finite has
    the scale NaN.
positives(left, right, partner, cosine)
    left, right (N, D) as z above -> cosine (N) float64: of left_i and right_i, or right at partner_i, from what was
    given and not from `rows`. partner (N) int32 or None; 0 where it is negative.
row_sums(rows, scale, temperature, labels, target, product, first_row, within_views, sums)
    rows (V, N, W), scale (V, N), temperature () in the dtype of scale -> sums (parts, 3, views, n) in the dtype of
    scale, over row i = first_row + r of each of the first `views` views: a bound b, the sum of 2^(x_ij - b) over the
    columns j that count and belong to the part, and, with labels, the sum of x_ij over the row's positives in the part.
    b is finite; without a column the sum is 0. A part may hold any columns; together they hold each once.
gradient(rows, scale, temperature, exponents, labels, target, product, first_row, within_views, partial, moments)
    exponents (V, N), target (N) in the dtype of scale -> partial (V, parts, n, W), moments (V, parts, n) in the dtype
    of scale, over row i = first_row + r: the sums over the columns j that count and belong to the part of
    w_ij scale_j rows_j, and of w_ij x_ij, w_ij = 2^(x_ij - exponents_i) + 2^(x_ij - exponents_j), less target_i for a
    positive. |w_ij| < 2^15; for the product with the rows, and not for the moments, it is rounded as the product says.
finish(partial, z, other, partner, pull, factors, first_row, dz)
    partial (parts, n, W), z, other (N, D), pull (N) float64, factors (2) float64 -> with u_i the unit row of z and
    v = factors_0 (sum of partial over the parts) - pull_i (unit row of other at i, or at partner_i; nothing where it is
    negative): dz (n, D) in the dtype of z = factors_1 (v - (u_i . v) u_i) / |z_i|, or, in rows shorter than 1e-12,
    factors_1 v / 1e-12.

Which columns count, for row i of view v. Without labels and `within_views`: all rows of both views but i itself and its
positive, row i of the other view. Without labels and without `within_views`: all rows of the other view but row i. With
labels (N) int32, one view: all but row i itself and, where target_i is 0, those with its label; positives of row i are
the other rows with its label where target_i is not 0. Without labels, one view (first_row is 0): all rows behind the n
that are summed for. `product` counts in crosspoint.kernels._precision.PRODUCTS. Sums
are float32 (float64 for its product), and each is taken in an order of its own: the same bits every time.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from crosspoint.kernels._precision import PRODUCTS, product_of
from crosspoint.ops._checks import compute_dtype

__all__ = [
    "Columns",
    "backward",
    "finish",
    "fits_wgmma",
    "forward",
    "gradient_factors",
    "partial_gradient",
    "row_log_sums",
    "softplus",
    "temperature_gradient",
    "weights_exponents",
    "width",
]

_ROW_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "float64": torch.float64}
# Columns are split into parts of no fewer than this, where rows alone would leave processors idle.
_LEAST_COLUMNS = 512
_ROWS_OF_PROCESSOR = 64
# The largest weight is some power of two near this: those of half types underflow late.
_LARGEST_WEIGHT = 13


def width(channels: int) -> int:
    """Channels of a row as it is multiplied: a power of two, 16 or more; above 256 a multiple of 128."""
    if channels > 256:
        return -(-channels // 128) * 128
    return max(16, 1 << max(0, channels - 1).bit_length())


def fits_wgmma(z: Tensor) -> bool:
    """Whether csrc/cuda/nt_xent_wgmma.cu, whose rows have an order of their own, can take z on its GPU."""
    return (
        product_of(z.dtype) in ("bf16", "f16")
        and width(z.shape[1]) in (64, 128, 256)
        and torch.cuda.get_device_capability(z.device) == (9, 0)
    )


class Columns:
    """All rows of the views as they are multiplied.

    Attributes:
        rows, scale: as `normalise` fills them, (V, N, W) and (V, N).
        product: the place of the product in PRODUCTS.
    """

    def __init__(self, leaves: ModuleType, *views: Tensor) -> None:
        (n, channels), dtype = views[0].shape, compute_dtype(views[0])
        product = product_of(views[0].dtype)
        self.product = PRODUCTS.index(product)
        self.rows = views[0].new_empty(
            (len(views), n, width(channels)), dtype=_ROW_TYPES.get(product, torch.float32)
        )
        self.scale = views[0].new_empty((len(views), n), dtype=dtype)
        for z, rows, scale in zip(views, self.rows, self.scale, strict=True):
            leaves.normalise(z, self.product, rows, scale)


def forward(
    leaves: ModuleType,
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor,
    within_views: bool,
    symmetric: bool,
    first_row: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """What operator nt_xent returns."""
    row_losses = z1.new_zeros((2, rows), dtype=compute_dtype(z1))
    if rows == 0:
        return row_losses.new_zeros(()), row_losses
    z1, z2 = z1.contiguous(), z2.contiguous()
    columns = Columns(leaves, z1, z2)
    views = 2 if symmetric else 1
    lse, _ = row_log_sums(leaves, columns, temperature, None, None, first_row, rows, within_views, views)
    positives = _positives(leaves, z1, z2, temperature)[first_row : first_row + rows]
    losses = softplus(lse - positives)
    row_losses[:views] = losses
    return losses.mean().to(row_losses.dtype), row_losses


def backward(
    leaves: ModuleType,
    grad: Tensor,
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor,
    row_losses: Tensor,
    within_views: bool,
    symmetric: bool,
    first_row: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What operator nt_xent_backward returns."""
    if rows == 0:
        return z1.new_empty((0, z1.shape[1])), z2.new_empty((0, z1.shape[1])), torch.zeros_like(temperature)
    z1, z2, losses = z1.contiguous(), z2.contiguous(), row_losses.double()
    columns = Columns(leaves, z1, z2)
    missing = -torch.expm1(-losses)  # q of every row of both views
    positives = _positives(leaves, z1, z2, temperature)
    lse = positives + losses
    if not symmetric:
        lse[1] = math.inf
    exponents, shift = weights_exponents(lse, missing.max(), columns.scale.dtype)
    partial, moments = partial_gradient(
        leaves, columns, temperature, exponents, None, None, first_row, rows, within_views
    )
    averaged = (2 if symmetric else 1) * z1.shape[0]
    pull = missing.sum(0)
    factors = gradient_factors(shift, grad, averaged, temperature)
    grads = [
        finish(leaves, own, z, other, None, pull, factors, first_row)
        for own, z, other in ((partial[0], z1, z2), (partial[1], z2, z1))
    ]
    own = slice(first_row, first_row + rows)
    pulled = 2 * (pull * positives)[own].sum()  # by the rows of both views
    return *grads, temperature_gradient(moments, pulled, factors, temperature)


def _positives(leaves: ModuleType, z1: Tensor, z2: Tensor, temperature: Tensor) -> Tensor:
    """s of each sample's two rows, (N) float64."""
    cosine = z1.new_empty(z1.shape[0], dtype=torch.float64)
    leaves.positives(z1, z2, None, cosine)
    return cosine / temperature.double()


def softplus(x: Tensor) -> Tensor:
    """Beyond 50 it is linear to the last digit of float64."""
    return F.softplus(x, threshold=50)


def _parts(rows: int, columns: int, device: torch.device) -> int:
    """In how many parts the columns are summed."""
    processors = 64  # as many as make parts of some tests' columns
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(columns // _LEAST_COLUMNS, processors // -(-rows // _ROWS_OF_PROCESSOR)))


def _number_of_parts(columns: Columns, rows: int, within_views: bool) -> int:
    views, n, _ = columns.rows.shape
    return _parts(views * rows, views * n if within_views else n, columns.rows.device)


def row_log_sums(
    leaves: ModuleType,
    columns: Columns,
    temperature: Tensor,
    labels: Tensor | None,
    target: Tensor | None,
    first_row: int,
    rows: int,
    within_views: bool,
    views: int,
) -> tuple[Tensor, Tensor]:
    """Per row the log of the sum of exp(s_ij) over the columns that count, and the sum of s_ip over its positives:
    (views, rows) float64."""
    parts = _number_of_parts(columns, rows, within_views)
    sums = columns.scale.new_empty((parts, 3, views, rows))
    leaves.row_sums(
        columns.rows,
        columns.scale,
        temperature,
        labels,
        target,
        columns.product,
        first_row,
        within_views,
        sums,
    )
    bound, total, positives = sums.double().unbind(1)
    log2 = math.log(2)
    return torch.logsumexp((bound + total.log2()) * log2, 0), positives.sum(0) * log2


def weights_exponents(lse: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """From lse, the logs of what the rows' softmaxes divide by, infinity for a row without a loss: exponents that bring
    the largest weight near a power of two, and its logarithm, a whole number. `largest`: no softmax exceeds it."""
    shift = _LARGEST_WEIGHT - largest.clamp(1e-37, 1).log2().ceil()
    return (lse / math.log(2) - shift).to(dtype), shift


def partial_gradient(
    leaves: ModuleType,
    columns: Columns,
    temperature: Tensor,
    exponents: Tensor,
    labels: Tensor | None,
    target: Tensor | None,
    first_row: int,
    rows: int,
    within_views: bool,
) -> tuple[Tensor, Tensor]:
    """What `gradient` fills: (V, parts, rows, W) and (V, parts, rows)."""
    views, _, channels = columns.rows.shape
    parts = _number_of_parts(columns, rows, within_views)
    partial = columns.scale.new_empty((views, parts, rows, channels))
    moments = columns.scale.new_empty((views, parts, rows))
    leaves.gradient(
        columns.rows,
        columns.scale,
        temperature,
        exponents,
        labels,
        target,
        columns.product,
        first_row,
        within_views,
        partial,
        moments,
    )
    return partial, moments


def gradient_factors(shift: Tensor, grad: Tensor, averaged: int | Tensor, temperature: Tensor) -> Tensor:
    """What `finish` is given: 2^-shift, and the factor of gradients by z that are sums over weights."""
    return torch.stack([torch.exp2(-shift), grad.double() / (averaged * temperature.double())])


def temperature_gradient(moments: Tensor, pulled: Tensor, factors: Tensor, temperature: Tensor) -> Tensor:
    """The share of these rows, which a pair of rows enters from both sides; pulled: the sum of pull_i s_ip."""
    total = factors[0] * math.log(2) * moments.sum(dtype=torch.float64) - pulled
    return (-factors[1] * total / 2).to(temperature.dtype)


def finish(
    leaves: ModuleType,
    partial: Tensor,
    z: Tensor,
    other: Tensor,
    partner: Tensor | None,
    pull: Tensor,
    factors: Tensor,
    first_row: int,
) -> Tensor:
    """The gradient of one view's rows."""
    dz = z.new_empty((partial.shape[1], z.shape[1]))
    leaves.finish(partial, z, other, partner, pull, factors, first_row, dz)
    return dz
