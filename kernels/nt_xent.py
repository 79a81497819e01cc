"""The contrastive losses' kernels: similarities tile by tile, called by `crosspoint.ops._gpu.nt_xent`, which says what
each leaf fills. Nothing of size rows x columns is stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import INTERPRETED, device_of
from crosspoint.kernels._nt_xent_tiles import GRADIENT, ROW_SUMS, choose
from crosspoint.kernels._precision import PRODUCTS
from crosspoint.kernels.nt_xent_rows import finish, narrowed, normalise, positives, round_bits

__all__ = [
    "ACROSS",
    "BEHIND",
    "LABELS",
    "WITHIN",
    "finish",
    "gradient",
    "gradient_kernel",
    "normalise",
    "positives",
    "row_sums",
    "sums_kernel",
]

# Which columns count: all but the row and its positive, those of the other view but the positive, by labels, or those
# behind the n rows.
WITHIN, ACROSS, LABELS, BEHIND = (tl.constexpr(kind) for kind in range(4))
# Below every x, and finite; and x of what does not count.
LOWEST, ABSENT = tl.constexpr(-1e30), tl.constexpr(-2e30)


@triton.jit
def multiply(b_left, b_right, b_sum, PRODUCT: tl.constexpr):
    """b_sum + b_left b_right, as tensor cores take it. The interpreter would read bfloat16 as integers, so there half
    operands are widened, which changes none of them."""
    if INTERPRETED and (PRODUCT == "bf16" or PRODUCT == "f16"):
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    PRECISION: tl.constexpr = PRODUCT if PRODUCT == "tf32" or PRODUCT == "tf32x3" else "ieee"
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION, out_dtype=b_sum.dtype)


# ---- which tiles


@triton.jit
def _columns_of_part(i_view, N, n, KIND: tl.constexpr, TILE: tl.constexpr):
    """The first column of this program's part, and the end: columns are the rows of both views, one's behind the
    other's."""
    begin = tl.zeros([], tl.int32)
    end = begin + N
    if KIND == WITHIN:
        end += N
    if KIND == ACROSS:
        begin += (1 - i_view) * N
        end += begin
    if KIND == BEHIND:
        begin += n
    n_tile = tl.cdiv(tl.cdiv(end - begin, TILE), tl.num_programs(1))
    begin += tl.program_id(1) * n_tile * TILE
    return begin, tl.minimum(end, begin + n_tile * TILE)


@triton.jit
def _tiles_around(begin, n_tile, i_first, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The first of n_tile tiles that holds a column of [i_first, i_first + ROWS), and the one after the last."""
    first = tl.minimum(tl.maximum(i_first - begin, 0) // TILE, n_tile)
    last = tl.minimum(tl.cdiv(tl.maximum(i_first + ROWS - begin, 0), TILE), n_tile)
    return first, tl.maximum(first, last)


@triton.jit
def _exceptions(i_view, i_first, begin, end, N, KIND: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The number of tiles, and two ranges of them, in order: those where some row of [i_first, i_first + ROWS), or its
    positive, is a column; with labels, all; behind the rows, none."""
    n_tile = tl.cdiv(tl.maximum(end - begin, 0), TILE)
    low, low_end, high, high_end = n_tile * 0, n_tile, n_tile, n_tile
    if KIND == BEHIND:
        low_end = low
    if KIND == WITHIN:
        low, low_end = _tiles_around(begin, n_tile, i_first, ROWS, TILE)
        high, high_end = _tiles_around(begin, n_tile, N + i_first, ROWS, TILE)
        high = tl.maximum(high, low_end)
        high_end = tl.maximum(high, high_end)
    if KIND == ACROSS:
        low, low_end = _tiles_around(begin, n_tile, (1 - i_view) * N + i_first, ROWS, TILE)
    return n_tile, low, low_end, high, high_end


@triton.jit
def _ordinary_tile(i, low, low_end, high, high_end):
    """The i-th tile outside both ranges."""
    i += tl.where(i >= low, low_end - low, 0)
    return i + tl.where(i >= high, high_end - high, 0)


@triton.jit
def _exceptional_tile(i, low, low_end, high):
    """The i-th tile of the ranges."""
    return tl.where(i < low_end - low, low + i, high + i - (low_end - low))


# ---- one tile


@triton.jit
def _load_rows(p_rows, i_row, m_row, i_channel, W, CHUNK: tl.constexpr):
    """CHUNK channels from i_channel on of rows from i_row on, as many as m_row says. Offsets within are of 32 bits, the
    same for every tile."""
    o_value = tl.arange(0, m_row.shape[0])[:, None] * W + tl.arange(0, CHUNK)[None, :]
    return tl.load(p_rows + i_row.to(tl.int64) * W + i_channel + o_value, mask=m_row[:, None], other=0.0)


@triton.jit
def _similarities(
    own,
    p_rows,
    p_scale,
    i_column,
    end,
    W,
    PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """x (ROWS, TILE) of columns [i_column, i_column + TILE), ABSENT from `end` on; their scale; and their rows, unless
    they come in chunks."""
    b_own, b_factor, i_own, m_row = own
    m_column = tl.arange(0, TILE) < end - i_column
    b_product = tl.zeros([b_own.shape[0], TILE], b_factor.dtype)
    if CHUNKED:
        for i_channel in range(0, W, CHUNK):
            b_left = _load_rows(p_rows, i_own, m_row, i_channel, W, CHUNK)
            b_right = _load_rows(p_rows, i_column, m_column, i_channel, W, CHUNK)
            b_product = multiply(b_left, tl.trans(b_right), b_product, PRODUCT)
        b_rows = b_own
    else:
        b_rows = _load_rows(p_rows, i_column, m_column, 0, W, CHUNK)
        b_product = multiply(b_own, tl.trans(b_rows), b_product, PRODUCT)
    b_scale = tl.load(p_scale + i_column + tl.arange(0, TILE), mask=m_column, other=0.0)
    b_bias = tl.where(m_column, 0.0, ABSENT).to(b_factor.dtype)
    return (b_product * b_scale[None, :]) * b_factor[:, None] + b_bias[None, :], b_scale, b_rows


@triton.jit
def _without(b_x, i_column, o_self, o_positive, KIND: tl.constexpr, TILE: tl.constexpr):
    """x, ABSENT for the row itself and its positive."""
    o_column = i_column + tl.arange(0, TILE)
    b_x = tl.where(o_column[None, :] == o_positive[:, None], ABSENT, b_x)
    if KIND == WITHIN:
        b_x = tl.where(o_column[None, :] == o_self[:, None], ABSENT, b_x)
    return b_x


@triton.jit
def _by_labels(b_x, p_labels, i_column, end, o_self, b_label, b_target, TILE: tl.constexpr):
    """x, ABSENT for the row itself and, in rows with fewer than two positives, for those; which positives remain."""
    o_column = i_column + tl.arange(0, TILE)
    b_other = tl.load(p_labels + o_column, mask=o_column < end, other=-1)
    m_same = b_other[None, :] == b_label[:, None]
    m_kept = (o_column[None, :] != o_self[:, None]) & (b_target > 0)[:, None]
    return tl.where(m_same & (m_kept == 0), ABSENT, b_x), m_same & m_kept


@triton.jit
def _own(p_rows, p_scale, p_temperature, i_own, m_row, W, CHUNK: tl.constexpr):
    """The rows of a program, or the first chunk of them; what makes x of a product; the first, and which there are."""
    b_own = _load_rows(p_rows, i_own, m_row, 0, W, CHUNK)
    log2_e = tl.full([], 1.4426950408889634, tl.float64)  # a number by itself would be float32
    factor = (log2_e / tl.load(p_temperature).to(tl.float64)).to(p_scale.dtype.element_ty)
    b_scale = tl.load(p_scale + i_own + tl.arange(0, m_row.shape[0]), mask=m_row, other=0.0)
    return b_own, b_scale * factor, i_own, m_row


# ---- sums of exponentials


@triton.jit
def _add(b_x, b_bound, b_sum):
    """The rows' sums so far, of 2^(x - bound), with a tile's."""
    b_new = tl.maximum(b_bound, tl.max(b_x, 1))
    b_tile = tl.sum(tl.exp2(b_x - b_new[:, None]), 1)
    return b_new, b_sum * tl.exp2(b_bound - b_new) + b_tile


@triton.jit(do_not_specialize=["N", "first", "n"])
def sums_kernel(
    p_rows,
    p_scale,
    p_temperature,
    p_labels,
    p_target,
    p_sums,
    N,
    first,
    n,
    W,
    KIND: tl.constexpr,
    PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    n_block = tl.cdiv(n, ROWS)
    i_view, i_block = tl.program_id(0) // n_block, tl.program_id(0) % n_block
    o_row = i_block * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    o_self, o_positive = i_view * N + first + o_row, (1 - i_view) * N + first + o_row
    own = _own(p_rows, p_scale, p_temperature, i_view * N + first + i_block * ROWS, m_row, W, CHUNK)
    b_bound = tl.full([ROWS], LOWEST, p_scale.dtype.element_ty)
    b_sum = tl.zeros([ROWS], p_scale.dtype.element_ty)
    b_positives = tl.zeros([ROWS], p_scale.dtype.element_ty)
    if KIND == LABELS:
        b_label = tl.load(p_labels + o_self, mask=m_row, other=-2)
        b_target = tl.load(p_target + o_self, mask=m_row, other=0.0)
    begin, end = _columns_of_part(i_view, N, n, KIND, TILE)
    n_tile, low, low_end, high, high_end = _exceptions(
        i_view, first + i_block * ROWS, begin, end, N, KIND, ROWS, TILE
    )
    n_exception = low_end - low + high_end - high
    for i in range(n_tile - n_exception):
        i_column = begin + _ordinary_tile(i, low, low_end, high, high_end) * TILE
        b_x, _, _ = _similarities(own, p_rows, p_scale, i_column, end, W, PRODUCT, CHUNK, CHUNKED, TILE)
        b_bound, b_sum = _add(b_x, b_bound, b_sum)
    for i in range(n_exception):
        i_column = begin + _exceptional_tile(i, low, low_end, high) * TILE
        b_x, _, _ = _similarities(own, p_rows, p_scale, i_column, end, W, PRODUCT, CHUNK, CHUNKED, TILE)
        if KIND == LABELS:
            b_x, m_positive = _by_labels(b_x, p_labels, i_column, end, o_self, b_label, b_target, TILE)
            b_positives += tl.sum(tl.where(m_positive, b_x, 0.0), 1)
        else:
            b_x = _without(b_x, i_column, o_self, o_positive, KIND, TILE)
        b_bound, b_sum = _add(b_x, b_bound, b_sum)
    n_row = tl.num_programs(0) // n_block * n.to(tl.int64)
    p_out = p_sums + 3 * tl.program_id(1) * n_row + i_view * n.to(tl.int64) + o_row
    tl.store(p_out, b_bound, mask=m_row)
    tl.store(p_out + n_row, b_sum, mask=m_row)
    tl.store(p_out + 2 * n_row, b_positives, mask=m_row)


def row_sums(
    rows: Tensor,
    scale: Tensor,
    temperature: Tensor,
    labels: Tensor | None,
    target: Tensor | None,
    product: int,
    first_row: int,
    within_views: bool,
    sums: Tensor,
) -> None:
    parts, _, views, n = sums.shape
    constants, options = choose(ROW_SUMS, rows, product, labels is not None)
    del constants["SLICE"]
    grid = (views * triton.cdiv(n, constants["ROWS"]), parts)
    with device_of(rows):
        sums_kernel[grid](
            *(rows, scale, temperature, labels, target, sums, rows.shape[1], first_row, n, rows.shape[2]),
            **_kind(rows, labels, product, within_views),
            **constants,
            **options,
        )


# ---- gradients of unit rows


@triton.jit(do_not_specialize=["N", "first", "n"])
def gradient_kernel(
    p_rows,
    p_scale,
    p_temperature,
    p_exponents,
    p_labels,
    p_target,
    p_partial,
    p_moments,
    N,
    first,
    n,
    W,
    KIND: tl.constexpr,
    PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKED: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Both softmaxes of a pair of rows from one product, then a second product with the same columns, or a slice of
    their channels."""
    n_block = tl.cdiv(n, ROWS)
    i_view, i_block = tl.program_id(0) // n_block, tl.program_id(0) % n_block
    o_row = i_block * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    o_self, o_positive = i_view * N + first + o_row, (1 - i_view) * N + first + o_row
    own = _own(p_rows, p_scale, p_temperature, i_view * N + first + i_block * ROWS, m_row, W, CHUNK)
    b_exponent = tl.load(p_exponents + o_self, mask=m_row, other=float("inf"))
    b_label, b_target = o_row, b_exponent
    if KIND == LABELS:
        b_label = tl.load(p_labels + o_self, mask=m_row, other=-2)
        b_target = tl.load(p_target + o_self, mask=m_row, other=0.0)
    begin, end = _columns_of_part(i_view, N, n, KIND, TILE)
    n_tile, low, low_end, high, high_end = _exceptions(
        i_view, first + i_block * ROWS, begin, end, N, KIND, ROWS, TILE
    )
    n_exception = low_end - low + high_end - high
    b_sum = tl.zeros([ROWS, SLICE], p_scale.dtype.element_ty)
    b_moment = tl.zeros([ROWS], p_scale.dtype.element_ty)
    for i in range(n_tile - n_exception):
        i_column = begin + _ordinary_tile(i, low, low_end, high, high_end) * TILE
        b_x, b_scale, b_rows = _similarities(
            own, p_rows, p_scale, i_column, end, W, PRODUCT, CHUNK, CHUNKED, TILE
        )
        b_weight = _weights(b_x, b_exponent, p_exponents, i_column, end, TILE)
        b_moment += tl.sum(b_weight * b_x, 1)
        b_sum = _add_rows(
            b_weight, b_scale, b_rows, b_sum, p_rows, i_column, end, W, PRODUCT, CHUNKED, SLICE, TILE
        )
    for i in range(n_exception):
        i_column = begin + _exceptional_tile(i, low, low_end, high) * TILE
        b_x, b_scale, b_rows = _similarities(
            own, p_rows, p_scale, i_column, end, W, PRODUCT, CHUNK, CHUNKED, TILE
        )
        if KIND == LABELS:
            b_x, m_positive = _by_labels(b_x, p_labels, i_column, end, o_self, b_label, b_target, TILE)
        else:
            b_x = _without(b_x, i_column, o_self, o_positive, KIND, TILE)
        b_weight = _weights(b_x, b_exponent, p_exponents, i_column, end, TILE)
        if KIND == LABELS:
            b_weight -= tl.where(m_positive, b_target[:, None], 0.0)
        b_moment += tl.sum(b_weight * b_x, 1)
        b_sum = _add_rows(
            b_weight, b_scale, b_rows, b_sum, p_rows, i_column, end, W, PRODUCT, CHUNKED, SLICE, TILE
        )
    o_channel = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    o_out = (i_view * tl.num_programs(1) + tl.program_id(1)) * n.to(tl.int64) + o_row
    m_out = m_row[:, None] & (o_channel < W)[None, :]
    tl.store(p_partial + o_out[:, None] * W + o_channel[None, :], b_sum, mask=m_out)
    tl.store(p_moments + o_out, b_moment, mask=m_row & (tl.program_id(2) == 0))


@triton.jit
def _weights(b_x, b_exponent, p_exponents, i_column, end, TILE: tl.constexpr):
    """Both softmaxes, times the power of two that is in the exponents."""
    o_column = i_column + tl.arange(0, TILE)
    b_other = tl.load(p_exponents + o_column, mask=o_column < end, other=float("inf"))
    return tl.exp2(b_x - b_exponent[:, None]) + tl.exp2(b_x - b_other[None, :])


@triton.jit
def _add_rows(
    b_weight,
    b_scale,
    b_rows,
    b_sum,
    p_rows,
    i_column,
    end,
    W,
    PRODUCT: tl.constexpr,
    CHUNKED: tl.constexpr,
    SLICE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The columns' unit rows by their weights, added to b_sum."""
    b_weight = b_weight * b_scale[None, :]
    if PRODUCT == "tf32":
        b_weight = round_bits(b_weight, 13)
    if CHUNKED or b_rows.shape[1] != SLICE:
        o_channel = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
        m_value = (tl.arange(0, TILE) < end - i_column)[:, None] & (o_channel < W)[None, :]
        o_value = tl.arange(0, TILE)[:, None] * W + o_channel[None, :]
        b_rows = tl.load(p_rows + i_column.to(tl.int64) * W + o_value, mask=m_value, other=0.0)
    return multiply(narrowed(b_weight, p_rows.dtype.element_ty), b_rows, b_sum, PRODUCT)


def gradient(
    rows: Tensor,
    scale: Tensor,
    temperature: Tensor,
    exponents: Tensor,
    labels: Tensor | None,
    target: Tensor | None,
    product: int,
    first_row: int,
    within_views: bool,
    partial: Tensor,
    moments: Tensor,
) -> None:
    views, parts, n, width = partial.shape
    constants, options = choose(GRADIENT, rows, product, labels is not None)
    slices = triton.cdiv(width, constants["SLICE"])
    grid = (views * triton.cdiv(n, constants["ROWS"]), parts, slices)
    with device_of(rows):
        gradient_kernel[grid](
            *(rows, scale, temperature, exponents, labels, target, partial, moments),
            *(rows.shape[1], first_row, n, width),
            **_kind(rows, labels, product, within_views),
            **constants,
            **options,
        )


def _kind(rows: Tensor, labels: Tensor | None, product: int, within_views: bool) -> dict[str, object]:
    one_set, two_views = (BEHIND, LABELS), (ACROSS, WITHIN)
    kind = one_set[labels is not None] if rows.shape[0] == 1 else two_views[within_views]
    return {"KIND": kind.value, "PRODUCT": PRODUCTS[product]}
