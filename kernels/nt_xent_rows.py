"""The contrastive losses' kernels that take rows one by one: lengths, positives, the last step of the gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import INTERPRETED, device_of
from crosspoint.kernels._precision import PRODUCTS

__all__ = [
    "BLOCK",
    "finish",
    "finish_kernel",
    "narrowed",
    "normalise",
    "normalise_kernel",
    "positives",
    "positives_kernel",
    "round_bits",
]

# Rows of a program, and channels that it takes at a time.
BLOCK = {"ROWS": 16, "CHANNELS": 64}


@triton.jit
def _shortest():
    """Shorter rows count as this long, as in torch's `normalize`. A number by itself would be float32."""
    return tl.full([], 1e-12, tl.float64)


@triton.jit
def round_bits(b_x, DROPPED: tl.constexpr):
    """float32 without its last bits, to the nearest, halves away from zero; a NaN stays one."""
    b_bits = (b_x.to(tl.int32, bitcast=True) + (1 << (DROPPED - 1))) & -(1 << DROPPED)
    return tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)


@triton.jit
def narrowed(b_x, T: tl.constexpr):
    """As T, from float64 by way of float32 where that is narrower still. The interpreter would cut bfloat16 off."""
    if tl.float64 == T:
        return b_x
    b_x = b_x.to(tl.float32)
    if INTERPRETED and tl.bfloat16 == T:
        b_x = round_bits(b_x, 16)
    return b_x.to(T)


@triton.jit
def _values(p_z, o_row, m_row, i_channel, D, CHANNELS: tl.constexpr):
    """(ROWS, CHANNELS) float64; 0 where there is none."""
    o_channel = i_channel + tl.arange(0, CHANNELS)
    m_value = m_row[:, None] & (o_channel < D)[None, :]
    return tl.load(p_z + o_row[:, None] * D + o_channel[None, :], mask=m_value, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["N"])
def normalise_kernel(
    p_z, p_rows, p_scale, N, D, W, TF32: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < N
    b_square = tl.zeros([ROWS], tl.float64)
    for i_channel in range(0, D, CHANNELS):
        b_z = _values(p_z, o_row, m_row, i_channel, D, CHANNELS)
        b_square += tl.sum(b_z * b_z, 1)
    b_length = tl.maximum(tl.sqrt(b_square), _shortest())
    # Its exponent field, and the power of two that undoes it.
    b_exponent = (b_length.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    b_power = ((2046 - b_exponent) << 52).to(tl.float64, bitcast=True)
    m_finite = b_square < float("inf")
    b_scale = tl.where(m_finite, 1 / tl.where(m_finite, b_length * b_power, 1.0), float("nan"))
    tl.store(p_scale + o_row, b_scale.to(p_scale.dtype.element_ty), mask=m_row)
    for i_channel in range(0, W, CHANNELS):
        b_z = narrowed(
            _values(p_z, o_row, m_row, i_channel, D, CHANNELS) * b_power[:, None], p_rows.dtype.element_ty
        )
        if TF32:
            b_z = round_bits(b_z, 13)
        o_channel = i_channel + tl.arange(0, CHANNELS)
        m_out = m_row[:, None] & (o_channel < W)[None, :]
        tl.store(p_rows + o_row[:, None] * W + o_channel[None, :], b_z, mask=m_out)


def normalise(z: Tensor, product: int, rows: Tensor, scale: Tensor) -> None:
    (n, channels), tf32 = z.shape, PRODUCTS[product] == "tf32"
    with device_of(z):
        normalise_kernel[_grid(n)](z, rows, scale, n, channels, rows.shape[1], TF32=tf32, **_block())


@triton.jit(do_not_specialize=["N"])
def positives_kernel(p_left, p_right, p_partner, p_cosine, N, D, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < N
    o_other = o_row
    if p_partner is not None:
        o_other = tl.load(p_partner + o_row, mask=m_row, other=-1).to(tl.int64)
    m_other = m_row & (o_other >= 0)
    b_left2 = tl.zeros([ROWS], tl.float64)
    b_right2 = tl.zeros([ROWS], tl.float64)
    b_dot = tl.zeros([ROWS], tl.float64)
    for i_channel in range(0, D, CHANNELS):
        b_left = _values(p_left, o_row, m_other, i_channel, D, CHANNELS)
        b_right = _values(p_right, o_other, m_other, i_channel, D, CHANNELS)
        b_left2 += tl.sum(b_left * b_left, 1)
        b_right2 += tl.sum(b_right * b_right, 1)
        b_dot += tl.sum(b_left * b_right, 1)
    b_left = _length(b_left2)
    b_cosine = b_dot / b_left / _length(b_right2)
    tl.store(p_cosine + o_row, b_cosine, mask=m_row)


@triton.jit
def _length(b_square):
    """At least the shortest; NaN where it is not finite."""
    b_length = tl.maximum(tl.sqrt(b_square), _shortest())
    return tl.where(b_square < float("inf"), b_length, float("nan"))


def positives(left: Tensor, right: Tensor, partner: Tensor | None, cosine: Tensor) -> None:
    n, channels = left.shape
    with device_of(left):
        positives_kernel[_grid(n)](left, right, partner, cosine, n, channels, **_block())


@triton.jit
def _gradient_of_unit(
    p_partial,
    p_other,
    o_row,
    o_other,
    m_row,
    m_other,
    b_pull,
    weight,
    i_channel,
    parts,
    n,
    D,
    W,
    CHANNELS: tl.constexpr,
):
    """v (ROWS, CHANNELS), from `partial` (parts, n, W) and the partner's row."""
    o_channel = i_channel + tl.arange(0, CHANNELS)
    m_value = m_row[:, None] & (o_channel < D)[None, :]
    o_value = o_row[:, None] * W + o_channel[None, :]
    b_v = tl.load(p_partial + o_value, mask=m_value, other=0.0).to(tl.float64)
    for _ in range(1, parts):
        o_value += n.to(tl.int64) * W
        b_v += tl.load(p_partial + o_value, mask=m_value, other=0.0).to(tl.float64)
    b_other = _values(p_other, o_other, m_other, i_channel, D, CHANNELS)
    return b_v * weight - b_pull[:, None] * b_other


@triton.jit(do_not_specialize=["first", "n", "parts"])
def finish_kernel(
    p_partial,
    p_z,
    p_other,
    p_partner,
    p_pull,
    p_factors,
    p_dz,
    first,
    n,
    parts,
    D,
    W,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    o_sample = first + o_row
    o_other = o_sample
    if p_partner is not None:
        o_other = tl.load(p_partner + o_sample, mask=m_row, other=-1).to(tl.int64)
    m_other = m_row & (o_other >= 0)
    b_square = tl.zeros([ROWS], tl.float64)
    b_other2 = tl.zeros([ROWS], tl.float64)
    for i_channel in range(0, D, CHANNELS):
        b_z = _values(p_z, o_sample, m_row, i_channel, D, CHANNELS)
        b_other = _values(p_other, o_other, m_other, i_channel, D, CHANNELS)
        b_square += tl.sum(b_z * b_z, 1)
        b_other2 += tl.sum(b_other * b_other, 1)
    b_length = _length(b_square)
    b_pull = tl.load(p_pull + o_sample, mask=m_other, other=0.0) / _length(b_other2)
    weight, factor = tl.load(p_factors), tl.load(p_factors + 1)
    b_along = tl.zeros([ROWS], tl.float64)
    for i_channel in range(0, D, CHANNELS):
        b_v = _gradient_of_unit(
            *(p_partial, p_other, o_row, o_other, m_row, m_other, b_pull, weight, i_channel, parts, n, D, W),
            CHANNELS,
        )
        b_along += tl.sum(b_v * _values(p_z, o_sample, m_row, i_channel, D, CHANNELS), 1)
    b_along = b_along / b_length
    # A divisor that is constant takes nothing off.
    b_radial = tl.where(tl.sqrt(b_square) < _shortest(), 0.0, b_along) / b_length
    b_factor = factor / b_length
    for i_channel in range(0, D, CHANNELS):
        b_v = _gradient_of_unit(
            *(p_partial, p_other, o_row, o_other, m_row, m_other, b_pull, weight, i_channel, parts, n, D, W),
            CHANNELS,
        )
        b_v -= b_radial[:, None] * _values(p_z, o_sample, m_row, i_channel, D, CHANNELS)
        o_channel = i_channel + tl.arange(0, CHANNELS)
        m_value = m_row[:, None] & (o_channel < D)[None, :]
        b_v = narrowed(b_v * b_factor[:, None], p_dz.dtype.element_ty)
        tl.store(p_dz + o_row[:, None] * D + o_channel[None, :], b_v, mask=m_value)


def finish(
    partial: Tensor,
    z: Tensor,
    other: Tensor,
    partner: Tensor | None,
    pull: Tensor,
    factors: Tensor,
    first_row: int,
    dz: Tensor,
) -> None:
    parts, n, width = partial.shape
    with device_of(z):
        finish_kernel[_grid(n)](
            *(partial, z, other, partner, pull, factors, dz, first_row, n, parts, z.shape[1], width),
            **_block(),
        )


def _block() -> dict[str, int]:
    return {"ROWS": 128, "CHANNELS": 64} if INTERPRETED else BLOCK


def _grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, _block()["ROWS"]),)
