"""The algebra of a linear layer with batch norm on edges: what lies between its sums over nodes and its products.

Matrices of a few channels, in float64: a program for each output channel, or for a few numbers. [A | D] are the
halves of the weight [A | B] for centred x, D = B - A; or it is A alone, of a layer whose edges carry a of their own
(WIDTH columns, not 2 C). Rows take the sign of gamma where `signs`. Every function fills tensors that the caller
allocated. docs/derivations/edge_conv.md has the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import device_of

__all__ = [
    "affine",
    "affine_kernel",
    "input_terms",
    "input_terms_kernel",
    "norm",
    "norm_gradient",
    "norm_gradient_kernel",
    "norm_kernel",
    "pivot",
    "pivot_kernel",
    "sum_parts",
    "sum_parts_kernel",
    "sums_norm",
    "weight_gradient",
    "weight_gradient_kernel",
]

# Numbers that a program sums at a time; rows and columns of a matrix; clouds.
NUMBERS, HEIGHT = 128, 8
ROWS, COLUMNS = 16, 16
CLOUDS = 16
PARTS = 16
TERMS = {"ROWS": 8, "COLUMNS": 32, "CHANNELS": 8}
# Left to itself the assembler would spill registers, to have more programs at a time.
OPTIONS = {"maxnreg": 255}


@triton.jit
def _split(p_row, o_channel, C, W, f_sign):
    """Of [A | D], from a row of [A | B]; or of A."""
    m_channel = o_channel < W
    b_weight = tl.load(p_row + o_channel, mask=m_channel, other=0.0).to(tl.float64)
    b_other = tl.load(p_row + o_channel - C, mask=m_channel & (o_channel >= C), other=0.0).to(tl.float64)
    return f_sign * (b_weight - b_other)


@triton.jit
def _sign(p_gamma, i_channel, SIGNS: tl.constexpr):
    f_sign = tl.full([], 1.0, tl.float64)
    if SIGNS and p_gamma is not None:
        f_sign = tl.where(tl.load(p_gamma + i_channel) < 0, -1.0, 1.0).to(tl.float64)
    return f_sign


@triton.jit
def _scale(p_gamma, p_rstd, o_channel, m_channel, SIGNS: tl.constexpr):
    b_scale = tl.load(p_rstd + o_channel, mask=m_channel, other=0.0)
    if p_gamma is not None:
        b_gamma = tl.load(p_gamma + o_channel, mask=m_channel, other=0.0).to(tl.float64)
        b_scale *= tl.abs(b_gamma) if SIGNS else b_gamma
    return b_scale


# ---- sums


@triton.jit(do_not_specialize=["rows"])
def sum_parts_kernel(
    p_parts, p_moments, rows, C, GRAM: tl.constexpr, NUMBERS: tl.constexpr, HEIGHT: tl.constexpr
):
    """Adds up rows of 3 C^2 numbers, the sums of x_j x_j^T, x_j x_i^T and x_i x_i^T (GRAM); or, of one cloud, rows of
    2 C numbers, the sums of x_j and x_i."""
    i_cloud = tl.program_id(1).to(tl.int64)
    numbers = 3 * C * C if GRAM else 2 * C
    o_number = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    m_number = o_number < numbers
    p_parts += i_cloud * rows * numbers
    b_sum = tl.zeros([NUMBERS], tl.float64)
    for i_row in range(0, rows, HEIGHT):
        o_row = i_row + tl.arange(0, HEIGHT)
        m_all = (o_row < rows)[:, None] & m_number[None, :]
        o_value = o_row[:, None].to(tl.int64) * numbers + o_number[None, :]
        b_sum += tl.sum(tl.load(p_parts + o_value, mask=m_all, other=0.0).to(tl.float64), 0)
    if GRAM:
        o_which = o_number // (C * C)
        o_left = (o_number // C) % C
        o_right = o_number % C
        m_mixed = m_number & (o_which == 1)
        tl.store(p_moments + (C + o_right).to(tl.int64) * 2 * C + o_left, b_sum, mask=m_mixed)
        o_row = tl.where(o_which == 2, C + o_left, o_left).to(tl.int64)
        o_column = tl.where(o_which == 0, o_right, C + o_right)
        tl.store(p_moments + o_row * 2 * C + o_column, b_sum, mask=m_number)
    else:
        tl.store(p_moments + (2 * C + i_cloud) * 2 * C + o_number, b_sum, mask=m_number)


def sum_parts(gram: Tensor, first: Tensor, moments: Tensor) -> None:
    """gram (B, parts, 3, C, C), first (B, parts, 2, C) -> moments (2 C + B, 2 C) float64: sums over all edges of e e^T,
    e = [x_j, x_i], and over each cloud's of e."""
    clouds, parts, _, channels, _ = gram.shape
    blocks = triton.cdiv(3 * channels * channels, NUMBERS), triton.cdiv(2 * channels, NUMBERS)
    constants = {"NUMBERS": NUMBERS, "HEIGHT": HEIGHT}
    with device_of(gram):
        sum_parts_kernel[(blocks[0], 1)](gram, moments, clouds * parts, channels, GRAM=True, **constants)
        sum_parts_kernel[(blocks[1], clouds)](first, moments, parts, channels, GRAM=False, **constants)


# ---- the norm


@triton.jit
def _lerp(f_before, f_value, MOMENTUM: tl.constexpr):
    """As torch.lerp does, which gives `value` itself for a momentum of 1."""
    f_step = f_value - f_before
    return f_before + MOMENTUM * f_step if MOMENTUM < 0.5 else f_value - f_step * (1 - MOMENTUM)


@triton.jit(do_not_specialize=["clouds", "parts"])
def norm_kernel(
    p_moments,
    p_partial,
    p_weight,
    p_gamma,
    p_beta,
    p_running_mean,
    p_running_var,
    p_centre,
    p_edges,
    p_halves,
    p_offset,
    p_rstd,
    p_scale,
    p_shift,
    clouds,
    parts,
    C,
    W,
    O,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLOUDS: tl.constexpr,
):
    """One output channel's, from moments or from partial sums: see `norm` and `sums_norm`."""
    i_channel = tl.program_id(0).to(tl.int64)
    p_row = p_weight + i_channel * W
    f_sign = _sign(p_gamma, i_channel, SIGNS)
    T: tl.constexpr = p_scale.dtype.element_ty
    TRAINING: tl.constexpr = p_moments is not None or p_partial is not None
    if p_halves is not None:
        for i_column in range(0, C, COLUMNS):
            o_column = i_column + tl.arange(0, COLUMNS)
            m_column = o_column < C
            b_end = _split(p_row, o_column, C, W, f_sign)
            b_begin = _split(p_row, C + o_column, C, W, f_sign)
            tl.store(p_halves + i_channel * C + o_column, b_end.to(T), mask=m_column)
            tl.store(p_halves + (O + i_channel) * C + o_column, b_begin.to(T), mask=m_column)
    # h of each cloud's centre; over the batch, the sum of h, and the square of each cloud's mean of h - that.
    f_count = tl.zeros([], tl.float64)
    f_sum = tl.zeros([], tl.float64)
    f_square = tl.zeros([], tl.float64)
    for i_cloud in range(0, clouds, CLOUDS):
        o_cloud = (i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
        m_cloud = o_cloud < clouds
        b_constant = _constant(p_centre, p_row + W - C, o_cloud, m_cloud, C, f_sign, COLUMNS, CLOUDS)
        tl.store(p_offset + o_cloud * O + i_channel, b_constant, mask=m_cloud)
        if TRAINING:
            b_own = _sums_of(
                p_moments,
                p_partial,
                p_row,
                o_cloud,
                m_cloud,
                i_channel,
                parts,
                C,
                W,
                O,
                f_sign,
                COLUMNS,
                CLOUDS,
            )
            b_edges = tl.load(p_edges + o_cloud, mask=m_cloud, other=0.0)
            f_count += tl.sum(b_edges, 0)
            f_sum += tl.sum(b_own + b_edges * b_constant, 0)
            f_square += tl.sum(b_own * b_own / tl.maximum(b_edges, 1.0), 0)
    f_mean = tl.zeros([], tl.float64)
    f_rstd = tl.full([], 1.0, tl.float64)
    if TRAINING:
        f_mean = f_sum / tl.maximum(f_count, 1.0)
        f_between = tl.zeros([], tl.float64)
        for i_cloud in range(0, clouds, CLOUDS):
            o_cloud = (i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
            m_cloud = o_cloud < clouds
            b_constant = _constant(p_centre, p_row + W - C, o_cloud, m_cloud, C, f_sign, COLUMNS, CLOUDS)
            b_own = _sums_of(
                p_moments,
                p_partial,
                p_row,
                o_cloud,
                m_cloud,
                i_channel,
                parts,
                C,
                W,
                O,
                f_sign,
                COLUMNS,
                CLOUDS,
            )
            b_edges = tl.load(p_edges + o_cloud, mask=m_cloud, other=0.0)
            b_off = b_own / tl.maximum(b_edges, 1.0) + b_constant - f_mean
            f_between += tl.sum(b_edges * b_off * b_off, 0)
        f_within = tl.zeros([], tl.float64)
        if p_moments is not None:
            for i_column in range(0, W, COLUMNS):
                o_column = i_column + tl.arange(0, COLUMNS)
                b_product = _times_gram(p_moments, p_row, o_column, C, W, f_sign, ROWS, COLUMNS)
                f_within += tl.sum(b_product * _split(p_row, o_column, C, W, f_sign), 0)
        else:
            for i_cloud in range(0, clouds, CLOUDS):
                o_cloud = (clouds + i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
                m_cloud = o_cloud < 2 * clouds
                f_within += tl.sum(_of_parts(p_partial, o_cloud, m_cloud, i_channel, parts, O, CLOUDS), 0)
        f_within -= f_square
        f_within = tl.where(f_within < 0, 0.0, f_within)  # which keeps NaN
        f_var = (f_within + f_between) / tl.maximum(f_count, 1.0)
        f_rstd = 1.0 / tl.sqrt(f_var + EPS)
        if p_running_mean is not None:
            R: tl.constexpr = p_running_mean.dtype.element_ty
            m_any = f_count > 0
            f_after = _lerp(tl.load(p_running_mean + i_channel).to(tl.float64), f_sign * f_mean, MOMENTUM)
            tl.store(p_running_mean + i_channel, f_after.to(R), mask=m_any)
            f_unbiased = f_var * (f_count / tl.maximum(f_count - 1.0, 1.0))
            f_after = _lerp(tl.load(p_running_var + i_channel).to(tl.float64), f_unbiased, MOMENTUM)
            tl.store(p_running_var + i_channel, f_after.to(R), mask=m_any)
    elif p_running_mean is not None:
        f_mean = f_sign * tl.load(p_running_mean + i_channel).to(tl.float64)
        f_rstd = 1.0 / tl.sqrt(tl.load(p_running_var + i_channel).to(tl.float64) + EPS)
    f_scale = f_rstd
    if p_gamma is not None:
        f_gamma = tl.load(p_gamma + i_channel).to(tl.float64)
        f_scale *= tl.abs(f_gamma) if SIGNS else f_gamma
    f_beta = tl.zeros([], tl.float64)
    if p_beta is not None:
        f_beta = tl.load(p_beta + i_channel).to(tl.float64)
    tl.store(p_rstd + i_channel, f_rstd)
    tl.store(p_scale + i_channel, f_scale.to(T))
    tl.debug_barrier()  # offsets are read by other threads than wrote them
    for i_cloud in range(0, clouds, CLOUDS):
        o_cloud = (i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
        m_cloud = o_cloud < clouds
        b_offset = tl.load(p_offset + o_cloud * O + i_channel, mask=m_cloud, other=0.0) - f_mean
        tl.store(p_offset + o_cloud * O + i_channel, b_offset, mask=m_cloud)
        tl.store(p_shift + o_cloud * O + i_channel, (f_beta + f_scale * b_offset).to(T), mask=m_cloud)


@triton.jit
def _constant(p_centre, p_own, o_cloud, m_cloud, C, f_sign, COLUMNS: tl.constexpr, CLOUDS: tl.constexpr):
    """h of each cloud's centre, by the columns that it goes through."""
    b_constant = tl.zeros([CLOUDS], tl.float64)
    for i_column in range(0, C, COLUMNS):
        o_column = i_column + tl.arange(0, COLUMNS)
        m_all = m_cloud[:, None] & (o_column < C)[None, :]
        b_own = tl.load(p_own + o_column, mask=o_column < C, other=0.0).to(tl.float64) * f_sign
        b_centre = tl.load(p_centre + o_cloud[:, None] * C + o_column[None, :], mask=m_all, other=0.0)
        b_constant += tl.sum(b_centre.to(tl.float64) * b_own[None, :], 1)
    return b_constant


@triton.jit
def _sums_of(
    p_moments, p_partial, p_row, o_cloud, m_cloud, i_channel, parts, C, W, O, f_sign, COLUMNS: tl.constexpr,
    CLOUDS: tl.constexpr,
):  # fmt: skip
    """Each cloud's sum of h, its centre's left out."""
    if p_moments is not None:
        b_sum = _first(p_moments, p_row, o_cloud, m_cloud, C, W, f_sign, COLUMNS, CLOUDS)
    else:
        b_sum = _of_parts(p_partial, o_cloud, m_cloud, i_channel, parts, O, CLOUDS)
    return b_sum


@triton.jit
def _of_parts(p_partial, o_cloud, m_cloud, i_channel, parts, O, CLOUDS: tl.constexpr):
    b_sum = tl.zeros([CLOUDS], tl.float64)
    for i_part in range(parts):
        b_sum += tl.load(p_partial + (o_cloud * parts + i_part) * O + i_channel, mask=m_cloud, other=0.0)
    return b_sum


@triton.jit
def _first(p_moments, p_row, o_cloud, m_cloud, C, W, f_sign, COLUMNS: tl.constexpr, CLOUDS: tl.constexpr):
    """Each cloud's sum of h, its centre's left out, from the moments."""
    p_first = p_moments + tl.cast(W, tl.int64) * W
    b_sum = tl.zeros([CLOUDS], tl.float64)
    for i_column in range(0, W, COLUMNS):
        o_column = i_column + tl.arange(0, COLUMNS)
        m_all = m_cloud[:, None] & (o_column < W)[None, :]
        b_first = tl.load(p_first + o_cloud[:, None] * W + o_column[None, :], mask=m_all, other=0.0)
        b_sum += tl.sum(b_first * _split(p_row, o_column, C, W, f_sign)[None, :], 1)
    return b_sum


@triton.jit
def _times_gram(p_moments, p_row, o_column, C, W, f_sign, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of (a row of [A | D]) times the sums of e e^T."""
    b_product = tl.zeros([COLUMNS], tl.float64)
    for i_row in range(0, W, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m_all = (o_row < W)[:, None] & (o_column < W)[None, :]
        o_value = o_row[:, None].to(tl.int64) * W + o_column[None, :]
        b_gram = tl.load(p_moments + o_value, mask=m_all, other=0.0)
        b_product += tl.sum(b_gram * _split(p_row, o_row, C, W, f_sign)[:, None], 0)
    return b_product


def norm(
    moments: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    signs: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    centre: Tensor,
    edges: Tensor,
    momentum: float,
    eps: float,
    halves: Tensor,
    offset: Tensor,
    rstd: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> None:
    """Statistics and what follows from them: those of these edges where `moments` are given, which then update the
    running ones (float32 or float64); else the running ones; else there is no norm.

    weight (C_out, 2 C), gamma, beta (C_out), centre (B, C) in the dtype of halves (2 C_out, C), A above D, and of
    scale (C_out) and shift (B, C_out): z = scale (U_j + V_i) + shift. edges (B), offset (B, C_out), which turns
    U_j + V_i into h - mean, and rstd (C_out) are float64.
    """
    _norm(
        *(moments, None, weight, gamma, beta, signs, running_mean, running_var, centre, edges, momentum, eps),
        *(halves, offset, rstd, scale, shift),
    )


def sums_norm(
    partial: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    signs: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    centre: Tensor,
    edges: Tensor,
    momentum: float,
    eps: float,
    offset: Tensor,
    rstd: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> None:
    """`norm` of a layer h = A a, weight (C_out, C), whose h has been computed edge by edge: partial (2, B, parts,
    C_out) float64 are sums of h less that of the centre (B, C), float64, and of its squares."""
    _norm(
        *(None, partial, weight, gamma, beta, signs, running_mean, running_var, centre, edges, momentum, eps),
        *(None, offset, rstd, scale, shift),
    )


def _norm(
    moments: Tensor | None,
    partial: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    signs: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    centre: Tensor,
    edges: Tensor,
    momentum: float,
    eps: float,
    *filled: Tensor | None,
) -> None:
    (channels, width), (clouds, c_in) = weight.shape, centre.shape
    parts = 0 if partial is None else partial.shape[2]
    with device_of(weight):
        norm_kernel[(channels,)](
            *(moments, partial, weight, gamma, beta, running_mean, running_var, centre, edges),
            *(*filled, clouds, parts, c_in, width, channels),
            EPS=eps,
            MOMENTUM=momentum,
            SIGNS=signs,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            CLOUDS=CLOUDS,
            **OPTIONS,
        )


@triton.jit(do_not_specialize=["clouds"])
def affine_kernel(
    p_gamma, p_beta, p_rstd, p_offset, p_scale, p_shift, clouds, C, SIGNS: tl.constexpr, NUMBERS: tl.constexpr
):
    i_cloud = tl.program_id(1).to(tl.int64)
    o_channel = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    m_channel = o_channel < C
    T: tl.constexpr = p_scale.dtype.element_ty
    b_scale = _scale(p_gamma, p_rstd, o_channel, m_channel, SIGNS)
    b_shift = b_scale * tl.load(p_offset + i_cloud * C + o_channel, mask=m_channel, other=0.0)
    if p_beta is not None:
        b_shift += tl.load(p_beta + o_channel, mask=m_channel, other=0.0).to(tl.float64)
    if i_cloud == 0:
        tl.store(p_scale + o_channel, b_scale.to(T), mask=m_channel)
    tl.store(p_shift + i_cloud * C + o_channel, b_shift.to(T), mask=m_channel)


def affine(
    gamma: Tensor | None,
    beta: Tensor | None,
    signs: bool,
    rstd: Tensor,
    offset: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> None:
    """scale (C) and shift (B, C) of a norm that is known: see `norm`."""
    clouds, channels = offset.shape
    with device_of(rstd):
        affine_kernel[(triton.cdiv(channels, NUMBERS), clouds)](
            *(gamma, beta, rstd, offset, scale, shift, clouds, channels), SIGNS=signs, NUMBERS=NUMBERS
        )


@triton.jit(do_not_specialize=["clouds"])
def pivot_kernel(
    p_gamma, p_beta, p_rstd, p_offset, p_pivot, clouds, C, SLOPE: tl.constexpr, NUMBERS: tl.constexpr
):
    o_channel = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    m_channel = o_channel < C
    o_own = tl.program_id(1).to(tl.int64) * C + o_channel
    b_shift = _scale(p_gamma, p_rstd, o_channel, m_channel, False)
    b_shift *= tl.load(p_offset + o_own, mask=m_channel, other=0.0)
    if p_beta is not None:
        b_shift += tl.load(p_beta + o_channel, mask=m_channel, other=0.0).to(tl.float64)
    tl.store(p_pivot + o_own, tl.where(b_shift > 0, b_shift, b_shift * SLOPE), mask=m_channel)


def pivot(
    gamma: Tensor | None,
    beta: Tensor | None,
    rstd: Tensor,
    offset: Tensor,
    negative_slope: float,
    pivot: Tensor,
) -> None:
    """pivot (B, C) float64 = leaky(shift), of a norm that is known, before it is rounded."""
    clouds, channels = offset.shape
    with device_of(rstd):
        pivot_kernel[(triton.cdiv(channels, NUMBERS), clouds)](
            *(gamma, beta, rstd, offset, pivot, clouds, channels), SLOPE=negative_slope, NUMBERS=NUMBERS
        )


@triton.jit(do_not_specialize=["clouds", "parts"])
def norm_gradient_kernel(
    p_partial,
    p_gamma,
    p_offset,
    p_rstd,
    p_edges,
    p_grad_gamma,
    p_grad_beta,
    p_sum,
    p_mean_term,
    p_slope_term,
    clouds,
    parts,
    C,
    SIGNS: tl.constexpr,
    PARTS: tl.constexpr,
    CLOUDS: tl.constexpr,
):
    i_channel = tl.program_id(0).to(tl.int64)
    f_count = tl.zeros([], tl.float64)
    f_beta = tl.zeros([], tl.float64)
    f_gamma = tl.zeros([], tl.float64)
    for i_cloud in range(0, clouds, CLOUDS):
        o_cloud = (i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
        m_cloud = o_cloud < clouds
        b_sums = tl.zeros([CLOUDS, PARTS], tl.float64)
        b_products = tl.zeros([CLOUDS, PARTS], tl.float64)
        for i_part in range(0, parts, PARTS):
            o_part = i_part + tl.arange(0, PARTS)
            m_all = m_cloud[:, None] & (o_part < parts)[None, :]
            o_value = (o_cloud[:, None] * parts + o_part[None, :]) * C + i_channel
            b_sums += tl.load(p_partial + o_value, mask=m_all, other=0.0)
            o_value += clouds.to(tl.int64) * parts * C
            b_products += tl.load(p_partial + o_value, mask=m_all, other=0.0)
        b_sum = tl.sum(b_sums, 1)
        tl.store(p_sum + o_cloud * C + i_channel, b_sum, mask=m_cloud)
        b_offset = tl.load(p_offset + o_cloud * C + i_channel, mask=m_cloud, other=0.0)
        f_count += tl.sum(tl.load(p_edges + o_cloud, mask=m_cloud, other=0.0), 0)
        f_beta += tl.sum(b_sum, 0)
        f_gamma += tl.sum(tl.sum(b_products, 1) + b_offset * b_sum, 0)
    f_count = tl.maximum(f_count, 1.0)
    f_rstd = tl.load(p_rstd + i_channel)
    f_gamma *= f_rstd
    f_slope = f_gamma * f_rstd / f_count
    tl.store(p_slope_term + i_channel, f_slope)
    for i_cloud in range(0, clouds, CLOUDS):
        o_cloud = (i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
        m_cloud = o_cloud < clouds
        b_offset = tl.load(p_offset + o_cloud * C + i_channel, mask=m_cloud, other=0.0)
        tl.store(p_mean_term + o_cloud * C + i_channel, f_beta / f_count + f_slope * b_offset, mask=m_cloud)
    if p_gamma is not None:
        T: tl.constexpr = p_grad_gamma.dtype.element_ty
        tl.store(p_grad_gamma + i_channel, (_sign(p_gamma, i_channel, SIGNS) * f_gamma).to(T))
        tl.store(p_grad_beta + i_channel, f_beta.to(T))


def norm_gradient(
    partial: Tensor,
    gamma: Tensor | None,
    signs: bool,
    offset: Tensor,
    rstd: Tensor,
    edges: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    sum: Tensor,
    mean_term: Tensor,
    slope_term: Tensor,
) -> None:
    """From partial (2, B, parts, C), sums of dz and of dz (U_j + V_i): the gradients of gamma and beta (C), if there
    are any, and in float64 sum (B, C), of dz, and what the batch's statistics take from every edge, scale
    (mean_term (B, C) + slope_term (C) h)."""
    _, clouds, parts, channels = partial.shape
    with device_of(partial):
        norm_gradient_kernel[(channels,)](
            *(partial, gamma, offset, rstd, edges, grad_gamma, grad_beta, sum, mean_term, slope_term),
            *(clouds, parts, channels),
            SIGNS=signs,
            PARTS=PARTS,
            CLOUDS=CLOUDS,
        )


# ---- gradients of x and of the weight


@triton.jit
def input_terms_kernel(
    p_weight,
    p_gamma,
    p_rstd,
    p_left,
    p_out,
    rows,
    C,
    W,
    O,
    WHICH: tl.constexpr,
    SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Rows and columns of left^T (scale [A | D]): of the identity (WHICH = 0), of mean_term^T (1), or of -slope_term
    [A | D] (2)."""
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_row, m_column = o_row < rows, o_column < W
    T: tl.constexpr = p_out.dtype.element_ty
    m_out = m_row[:, None] & m_column[None, :]
    if WHICH == 0:
        b_sum = _scaled(p_weight, p_gamma, p_rstd, o_row, m_row, o_column, C, W, SIGNS)
    else:
        b_sum = tl.zeros([ROWS, COLUMNS], tl.float64)
        for i_channel in range(0, O, CHANNELS):
            o_channel = i_channel + tl.arange(0, CHANNELS)
            m_channel = o_channel < O
            if WHICH == 1:
                m_left = m_row[:, None] & m_channel[None, :]
                b_left = tl.load(p_left + o_row[:, None] * O + o_channel[None, :], mask=m_left, other=0.0)
            else:
                b_left = _rows(p_weight, p_gamma, o_channel, m_channel, o_row, C, W, SIGNS)
                b_left = tl.trans(b_left) * tl.load(p_left + o_channel, mask=m_channel, other=0.0)[None, :]
            b_right = _scaled(
                p_weight, p_gamma, p_rstd, o_channel.to(tl.int64), m_channel, o_column, C, W, SIGNS
            )
            b_sum += tl.sum(b_left[:, :, None] * b_right[None, :, :], 1)
    if WHICH == 1:
        tl.store(p_out + o_row[:, None] * W + o_column[None, :], b_sum.to(T), mask=m_out)
    else:
        o_own = tl.where(o_column < C, 0, rows)[None, :] + o_row[:, None]
        o_within = tl.where(o_column < C, o_column, o_column - C)
        b_sum = -b_sum if WHICH == 2 else b_sum
        tl.store(p_out + o_own * C + o_within[None, :], b_sum.to(T), mask=m_out)


@triton.jit
def _rows(p_weight, p_gamma, o_channel, m_channel, o_column, C, W, SIGNS: tl.constexpr):
    """Of [A | D], or of A, signed: (channels, columns)."""
    m_all = m_channel[:, None] & (o_column < W)[None, :]
    o_value = o_channel[:, None] * W + o_column[None, :]
    b_weight = tl.load(p_weight + o_value, mask=m_all, other=0.0).to(tl.float64)
    m_own = m_all & (o_column >= C)[None, :]
    b_weight -= tl.load(p_weight + o_value - C, mask=m_own, other=0.0).to(tl.float64)
    if SIGNS and p_gamma is not None:
        b_gamma = tl.load(p_gamma + o_channel, mask=m_channel, other=0.0)
        b_weight *= tl.where(b_gamma < 0, -1.0, 1.0).to(tl.float64)[:, None]
    return b_weight


@triton.jit
def _scaled(p_weight, p_gamma, p_rstd, o_channel, m_channel, o_column, C, W, SIGNS: tl.constexpr):
    b_scale = _scale(p_gamma, p_rstd, o_channel, m_channel, SIGNS)
    return b_scale[:, None] * _rows(p_weight, p_gamma, o_channel, m_channel, o_column, C, W, SIGNS)


def input_terms(
    weight: Tensor,
    gamma: Tensor | None,
    signs: bool,
    rstd: Tensor,
    mean_term: Tensor | None,
    slope_term: Tensor | None,
    halves: Tensor,
    constant: Tensor | None,
    square: Tensor | None,
) -> None:
    """halves (2 C_out, C): scale [A | D], its halves above one another. Where the batch made the statistics also
    constant (B, 2 C), what each edge takes from x_j and x_i, and square (4 C, C) = -[A | D]^T (slope_term scale)
    [A | D], its halves above one another. Of a layer of A alone: (C_out, C), (B, C) and (C, C)."""
    (channels, width), c_in = weight.shape, halves.shape[1]
    jobs = [(0, rstd, halves, channels)]
    if mean_term is not None:
        jobs += [(1, mean_term, constant, len(mean_term)), (2, slope_term, square, width)]
    with device_of(weight):
        for which, left, out, rows in jobs:
            grid = (triton.cdiv(rows, TERMS["ROWS"]), triton.cdiv(width, TERMS["COLUMNS"]))
            input_terms_kernel[grid](
                *(weight, gamma, rstd, left, out, rows, c_in, width, channels),
                WHICH=which,
                SIGNS=signs,
                **TERMS,
            )


@triton.jit(do_not_specialize=["clouds"])
def weight_gradient_kernel(
    p_sparse,
    p_weight,
    p_gamma,
    p_rstd,
    p_centre,
    p_edges,
    p_mean_term,
    p_slope_term,
    p_moments,
    p_sum,
    p_grad,
    clouds,
    C,
    W,
    O,
    PAIRED: tl.constexpr,
    SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLOUDS: tl.constexpr,
):
    """One output channel's; PAIRED: of [A | B], W = 2 C."""
    i_channel = tl.program_id(0).to(tl.int64)
    p_row = p_weight + i_channel * W
    f_sign = _sign(p_gamma, i_channel, SIGNS)
    f_scale = tl.load(p_rstd + i_channel)
    if p_gamma is not None:
        f_gamma = tl.load(p_gamma + i_channel).to(tl.float64)
        f_scale *= tl.abs(f_gamma) if SIGNS else f_gamma
    T: tl.constexpr = p_grad.dtype.element_ty
    for i_column in range(0, C, COLUMNS):
        o_column = i_column + tl.arange(0, COLUMNS)
        m_column = o_column < C
        b_mean = tl.zeros([COLUMNS], tl.float64)
        if p_moments is not None:
            for i_cloud in range(0, clouds, CLOUDS):
                o_cloud = (i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
                m_all = (o_cloud < clouds)[:, None] & m_column[None, :]
                o_value = o_cloud[:, None] * C + o_column[None, :]
                b_mean += tl.sum(tl.load(p_centre + o_value, mask=m_all, other=0.0).to(tl.float64), 0)
            b_mean /= clouds.to(tl.float64)
        # Over all clouds the sums add up to 0 in training, so what the centres share may go before it is rounded.
        b_moved = tl.zeros([COLUMNS], tl.float64)
        for i_cloud in range(0, clouds, CLOUDS):
            o_cloud = (i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
            m_cloud = o_cloud < clouds
            m_all = m_cloud[:, None] & m_column[None, :]
            b_sum = tl.load(p_sum + o_cloud * O + i_channel, mask=m_cloud, other=0.0)
            if p_moments is not None:
                b_mean_term = tl.load(p_mean_term + o_cloud * O + i_channel, mask=m_cloud, other=0.0)
                b_sum -= b_mean_term * tl.load(p_edges + o_cloud, mask=m_cloud, other=0.0)
                b_first = _first(p_moments, p_row, o_cloud, m_cloud, C, W, f_sign, COLUMNS, CLOUDS)
                b_sum -= tl.load(p_slope_term + i_channel) * b_first
            o_value = o_cloud[:, None] * C + o_column[None, :]
            b_centre = tl.load(p_centre + o_value, mask=m_all, other=0.0).to(tl.float64) - b_mean[None, :]
            b_moved += tl.sum(tl.where(m_all, b_sum[:, None] * b_centre, 0.0), 0)
        f_factor = f_sign * f_scale
        p_own = p_grad + i_channel * W + o_column
        p_end = p_sparse + i_channel * C + o_column
        b_last = tl.load(p_end + (O * C if PAIRED else 0), mask=m_column, other=0.0).to(tl.float64)
        if p_moments is not None:
            b_last -= _dense(
                p_moments, p_row, p_mean_term, p_slope_term, i_channel, W - C + o_column, clouds, C, W, O, f_sign,
                ROWS, COLUMNS, CLOUDS,
            )  # fmt: skip
        if PAIRED:
            b_end = tl.load(p_end, mask=m_column, other=0.0).to(tl.float64)
            if p_moments is not None:
                b_end -= _dense(
                    p_moments, p_row, p_mean_term, p_slope_term, i_channel, o_column, clouds, C, W, O, f_sign,
                    ROWS, COLUMNS, CLOUDS,
                )  # fmt: skip
            tl.store(p_own, (f_factor * (b_end - b_last)).to(T), mask=m_column)
        tl.store(p_own + W - C, (f_factor * (b_last + b_moved)).to(T), mask=m_column)


@triton.jit
def _dense(
    p_moments, p_row, p_mean_term, p_slope_term, i_channel, o_column, clouds, C, W, O, f_sign, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CLOUDS: tl.constexpr,
):  # fmt: skip
    """What the statistics take from every edge, summed over them all times columns of what [A | D] goes over."""
    b_dense = tl.load(p_slope_term + i_channel) * _times_gram(
        p_moments, p_row, o_column, C, W, f_sign, ROWS, COLUMNS
    )
    p_first = p_moments + tl.cast(W, tl.int64) * W
    for i_cloud in range(0, clouds, CLOUDS):
        o_cloud = (i_cloud + tl.arange(0, CLOUDS)).to(tl.int64)
        m_cloud = o_cloud < clouds
        m_all = m_cloud[:, None] & (o_column < W)[None, :]
        b_mean_term = tl.load(p_mean_term + o_cloud * O + i_channel, mask=m_cloud, other=0.0)[:, None]
        o_value = o_cloud[:, None] * W + o_column[None, :]
        b_dense += tl.sum(b_mean_term * tl.load(p_first + o_value, mask=m_all, other=0.0), 0)
    return b_dense


def weight_gradient(
    sparse: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    signs: bool,
    rstd: Tensor,
    centre: Tensor,
    edges: Tensor,
    mean_term: Tensor | None,
    slope_term: Tensor | None,
    moments: Tensor | None,
    sum: Tensor,
    grad: Tensor,
) -> None:
    """grad (C_out, 2 C), of [A | B], from sparse (2 C_out, C) = dz^T x, at the edges' ends above that at their
    beginnings, sum (B, C_out), of dz over each cloud's edges, and, where the batch made the statistics, what those take
    from every edge (`norm_gradient`). Of a layer of A alone: grad and sparse (C_out, C), moments (C + B, C)."""
    (channels, width), (clouds, c_in) = weight.shape, centre.shape
    with device_of(weight):
        weight_gradient_kernel[(channels,)](
            *(sparse, weight, gamma, rstd, centre, edges, mean_term, slope_term, moments, sum, grad),
            *(clouds, c_in, width, channels),
            PAIRED=width != c_in,
            SIGNS=signs,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            CLOUDS=CLOUDS,
            **OPTIONS,
        )
