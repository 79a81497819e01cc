"""conv_bn_act_pool's kernels, called by `crosspoint.ops._gpu.conv_bn_act_pool`, which says what they are for.

Every function fills tensors that the caller allocated. x (B, N, C_in) is centred as it is loaded, x' = x - centre, and
0 in rows past `lengths`; h = x' weight^T with the weight signed by gamma, so that every maximum is a maximum;
`product` is an index of `_precision.PRODUCTS`. Sums run over tiles of a cloud's rows, of which a part takes a run.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from crosspoint.kernels._common import INTERPRETED, device_of
from crosspoint.kernels._precision import PRODUCTS
from crosspoint.kernels._products import add_product, rounded

__all__ = [
    "FINISH_COLUMNS",
    "GRAM",
    "POOL",
    "SUMS_COLUMNS",
    "TERMS_COLUMNS",
    "WEIGHT_GRADIENT",
    "X_GRADIENT",
    "Tile",
    "finish",
    "finish_kernel",
    "gram",
    "gram_kernel",
    "pool",
    "pool_kernel",
    "sums",
    "sums_kernel",
    "terms",
    "terms_kernel",
    "weight_gradient",
    "weight_gradient_kernel",
    "x_gradient",
    "x_gradient_kernel",
]


class Tile(NamedTuple):
    """What a program multiplies at a time: (rows, depth) by (depth, columns)."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """Interpreted, deeper tiles, since time goes by operations there."""
        depth = max(self.depth, 128) if INTERPRETED else self.depth
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": depth}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# By product. The rows of a pooling tile are the orchestrator's.
POOL = {
    "bf16": Tile(128, 64, 32, 8, 4),
    "tf32": Tile(128, 64, 32, 8, 3),
    "tf32x3": Tile(128, 64, 32, 8, 2),
    "float64": Tile(32, 32, 16, 4, 1),
}
X_GRADIENT = {
    "bf16": Tile(128, 128, 32, 8, 4),
    "tf32": Tile(128, 128, 32, 8, 3),
    "tf32x3": Tile(128, 64, 32, 8, 2),
    "float64": Tile(32, 32, 16, 4, 1),
}
WEIGHT_GRADIENT = {
    "bf16": Tile(128, 64, 32, 8, 4),
    "tf32": Tile(128, 128, 32, 8, 3),
    "tf32x3": Tile(128, 64, 32, 8, 2),
    "float64": Tile(32, 32, 16, 4, 1),
}
GRAM = {
    "bf16": Tile(128, 128, 32, 8, 4),
    "tf32": Tile(128, 128, 32, 8, 3),
    "tf32x3": Tile(64, 64, 32, 4, 2),
    "float64": Tile(32, 32, 16, 4, 1),
}
SUMS_COLUMNS = 32
FINISH_COLUMNS = 64
TERMS_COLUMNS = 32


@triton.jit
def _length(p_lengths, i_cloud, N):
    """Rows of a cloud, kept in [0, N] whatever `lengths` holds."""
    length = N
    if p_lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(p_lengths + i_cloud), 0), N).to(tl.int32)
    return length


@triton.jit
def _centred(p_x, p_centre, o_row, m_row, o_channel, C):
    """x - centre for rows x channels, whichever way the offsets are laid out; 0 where the row is not one."""
    m_all = m_row & (o_channel < C)
    b_x = tl.load(p_x + o_row * C + o_channel, mask=m_all, other=0.0)
    b_centre = tl.load(p_centre + o_channel, mask=o_channel < C, other=0.0)
    return tl.where(m_all, b_x.to(p_centre.dtype.element_ty) - b_centre, 0.0)


# ---- statistics in input space


@triton.jit(do_not_specialize=["N", "tiles"])
def sums_kernel(p_x, p_lengths, p_out, N, C, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i_tile = tl.program_id(0)
    i_cloud = i_tile // tiles
    o_row = (i_tile % tiles) * ROWS + tl.arange(0, ROWS)
    o_channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_all = (o_row < _length(p_lengths, i_cloud, N))[:, None] & (o_channel < C)[None, :]
    o_value = (i_cloud.to(tl.int64) * N + o_row)[:, None] * C + o_channel[None, :]
    b_x = tl.load(p_x + o_value, mask=m_all, other=0.0).to(tl.float64)
    p_out += i_tile.to(tl.int64) * 2 * C + o_channel
    tl.store(p_out, tl.sum(b_x, 0), mask=o_channel < C)
    tl.store(p_out + C, tl.sum(b_x * b_x, 0), mask=o_channel < C)


def sums(x: Tensor, lengths: Tensor | None, out: Tensor) -> None:
    """out (B, tiles, 2, C) float64: over the rows of each tile, x and its square."""
    batch, n, channels = x.shape
    tiles = out.shape[1]
    rows = triton.next_power_of_2(triton.cdiv(n, tiles))
    with device_of(x):
        sums_kernel[(batch * tiles, triton.cdiv(channels, SUMS_COLUMNS))](
            x, lengths, out, n, channels, tiles, ROWS=rows, COLUMNS=SUMS_COLUMNS
        )


@triton.jit(do_not_specialize=["clouds", "N", "parts"])
def gram_kernel(
    p_x,
    p_lengths,
    p_centre,
    p_gram,
    p_first,
    clouds,
    N,
    C,
    parts,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One square of channels of sum x' x'^T over a part of the tiles, those above the diagonal mirrored."""
    i_part, i_left, i_right = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_left > i_right:
        return
    T: tl.constexpr = p_centre.dtype.element_ty
    o_left = i_left * COLUMNS + tl.arange(0, COLUMNS)
    o_right = i_right * COLUMNS + tl.arange(0, COLUMNS)
    tiles = tl.cdiv(N, DEPTH)
    each = tl.cdiv(clouds * tiles, parts)
    b_sum = tl.zeros([COLUMNS, COLUMNS], T)
    b_first = tl.zeros([COLUMNS], tl.float64)
    for i_tile in range(i_part * each, tl.minimum((i_part + 1) * each, clouds * tiles)):
        i_cloud = i_tile // tiles
        o_in = (i_tile % tiles) * DEPTH + tl.arange(0, DEPTH)
        m_row = o_in < _length(p_lengths, i_cloud, N)
        o_row = i_cloud.to(tl.int64) * N + o_in
        b_left = _centred(p_x, p_centre, o_row[None, :], m_row[None, :], o_left[:, None], C)
        b_right = _centred(p_x, p_centre, o_row[:, None], m_row[:, None], o_right[None, :], C)
        b_right = rounded(b_right, PRODUCT)
        b_sum = add_product(rounded(b_left, PRODUCT), b_right, b_sum, PRODUCT)
        b_first += tl.sum(b_right.to(T), 0).to(tl.float64)
    p_gram += i_part.to(tl.int64) * C * C
    m_square = (o_left < C)[:, None] & (o_right < C)[None, :]
    tl.store(p_gram + o_left[:, None] * C + o_right[None, :], b_sum, mask=m_square)
    if i_left == i_right:
        tl.store(p_first + i_part * C + o_right, b_first, mask=o_right < C)
    else:
        tl.store(p_gram + o_right[None, :] * C + o_left[:, None], b_sum, mask=m_square)


def gram(
    x: Tensor, lengths: Tensor | None, centre: Tensor, product: int, gram: Tensor, first: Tensor
) -> None:
    """gram (parts, C, C) in the dtype of centre: x' x'^T summed over a part of the rows, of x' rounded as `product`
    says; first (parts, C) float64: x' itself."""
    batch, n, channels = x.shape
    tile = GRAM[PRODUCTS[product]]
    blocks = triton.cdiv(channels, tile.columns)
    with device_of(x):
        gram_kernel[(len(gram), blocks, blocks)](
            *(x, lengths, centre, gram, first, batch, n, channels, len(gram)),
            PRODUCT=PRODUCTS[product],
            **tile.constants(),
            **tile.options(),
        )


# ---- the product and what is pooled of it


@triton.jit(do_not_specialize=["clouds", "N", "tiles", "words"])
def pool_kernel(
    p_x,
    p_lengths,
    p_centre,
    p_weight,
    p_gamma,
    p_scale,
    p_shift,
    p_values,
    p_places,
    p_mask,
    clouds,
    N,
    C_in,
    C_out,
    tiles,
    words,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of h, and of every column of it what `pool` lists."""
    T: tl.constexpr = p_centre.dtype.element_ty
    blocks = tl.cdiv(C_out, COLUMNS)
    i_tile = tl.program_id(0) // blocks  # neighbours share rows of x
    i_cloud = i_tile // tiles
    o_in = (i_tile % tiles) * ROWS + tl.arange(0, ROWS)
    length = _length(p_lengths, i_cloud, N)
    m_row = o_in < length
    o_row = i_cloud.to(tl.int64) * N + o_in
    o_channel = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    m_channel = o_channel < C_out
    b_h = tl.zeros([ROWS, COLUMNS], T)
    for i_depth in range(0, tl.where((i_tile % tiles) * ROWS < length, C_in, 0), DEPTH):
        o_depth = i_depth + tl.arange(0, DEPTH)
        b_x = _centred(p_x, p_centre, o_row[:, None], m_row[:, None], o_depth[None, :], C_in)
        o_weight = o_channel[None, :] * C_in + o_depth[:, None]
        m_weight = m_channel[None, :] & (o_depth < C_in)[:, None]
        b_weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0)
        b_h = add_product(rounded(b_x, PRODUCT), rounded(b_weight, PRODUCT), b_h, PRODUCT)

    b_scale = tl.load(p_scale + o_channel, mask=m_channel, other=0.0)
    b_shift = tl.load(p_shift + o_channel, mask=m_channel, other=0.0)
    b_zero = tl.load(p_gamma + o_channel, mask=m_channel, other=1.0) == 0
    m_h = m_row[:, None]
    m_up = (b_h * b_scale[None, :] + b_shift[None, :] > 0) & m_h
    b_value = tl.where(b_zero[None, :], b_h * 0, b_h)
    m_nan = (b_value != b_value) & m_h
    b_any_nan = tl.max(m_nan.to(tl.int32), 0)
    b_most = tl.max(tl.where(m_h & (b_value == b_value), b_value, float("-inf")), 0)
    m_most = m_h & tl.where(b_any_nan[None, :] > 0, m_nan, b_value == b_most[None, :])
    b_place = tl.min(tl.where(m_most, o_in[:, None], N), 0)
    b_peak = tl.sum(tl.where(o_in[:, None] == b_place[None, :], b_h, 0.0), 0)
    o_out = i_tile.to(tl.int64) * C_out + o_channel
    plane = (clouds * tiles).to(tl.int64) * C_out
    tl.store(p_values + o_out, b_peak, mask=m_channel)
    tl.store(p_values + plane + o_out, tl.sum(b_h, 0), mask=m_channel)
    tl.store(p_values + 2 * plane + o_out, tl.sum(tl.where(m_up, b_h, 0.0), 0), mask=m_channel)
    tl.store(p_places + o_out, tl.where(b_place < N, b_place, -1), mask=m_channel)
    tl.store(p_places + plane + o_out, tl.sum(m_up.to(tl.int32), 0), mask=m_channel)
    if p_mask is not None:
        b_bits = tl.reshape(m_up.to(tl.int32), [ROWS, COLUMNS // 32, 32]) << tl.arange(0, 32)[None, None, :]
        o_word = (tl.program_id(0) % blocks) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
        p_mask += o_row[:, None] * words + o_word[None, :]
        tl.store(p_mask, tl.sum(b_bits, 2), mask=(o_in < N)[:, None] & (o_word < words)[None, :])


def pool(
    x: Tensor,
    lengths: Tensor | None,
    centre: Tensor,
    weight: Tensor,
    gamma: Tensor,
    scale: Tensor,
    shift: Tensor,
    product: int,
    values: Tensor,
    places: Tensor,
    mask: Tensor | None,
) -> None:
    """Of h of each tile and channel, values (3, B, tiles, C_out): h of the winner, the sum of h, its sum where
    z = scale h + shift > 0; places (2, B, tiles, C_out) int32: the winner's row (-1: no row), how many z > 0.

    The winner is the first of the largest, a NaN before all; where gamma is 0 every h counts as 0. mask
    (B, N, ceil(C_out / 32)) int32: bit c % 32 of word c // 32 is z > 0 of channel c.
    """
    (batch, n, c_in), c_out, tiles = x.shape, len(weight), values.shape[2]
    tile = POOL[PRODUCTS[product]]
    words = triton.cdiv(c_out, 32)
    with device_of(x):
        pool_kernel[(batch * tiles * triton.cdiv(c_out, tile.columns),)](
            *(x, lengths, centre, weight, gamma, scale, shift, values, places, mask),
            *(batch, n, c_in, c_out, tiles, words),
            PRODUCT=PRODUCTS[product],
            **tile.constants(),
            **tile.options(),
        )


@triton.jit(do_not_specialize=["clouds", "N", "tiles"])
def finish_kernel(
    p_values,
    p_places,
    p_lengths,
    p_gamma,
    p_scale,
    p_shift,
    p_mean,
    p_rstd,
    p_out,
    p_winner,
    p_slopes,
    clouds,
    N,
    C,
    tiles,
    SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_cloud = tl.program_id(0)
    o_channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_channel = o_channel < C
    b_zero = tl.load(p_gamma + o_channel, mask=m_channel, other=1.0) == 0
    b_winner = tl.full([COLUMNS], -1, tl.int32)
    b_most = tl.zeros([COLUMNS], p_values.dtype.element_ty)
    b_peak = tl.zeros([COLUMNS], p_values.dtype.element_ty)
    b_sum = tl.zeros([COLUMNS], tl.float64)
    b_up_sum = tl.zeros([COLUMNS], tl.float64)
    b_up = tl.zeros([COLUMNS], tl.int32)
    plane = (clouds * tiles).to(tl.int64) * C
    for i_tile in range(tiles):
        o_in = (i_cloud * tiles + i_tile).to(tl.int64) * C + o_channel
        b_h = tl.load(p_values + o_in, mask=m_channel, other=0.0)
        b_place = tl.load(p_places + o_in, mask=m_channel, other=-1)
        b_value = tl.where(b_zero, b_h * 0, b_h)
        m_larger = (b_value > b_most) | ((b_value != b_value) & (b_most == b_most))
        m_wins = (b_place >= 0) & (m_larger | (b_winner < 0))
        b_most = tl.where(m_wins, b_value, b_most)
        b_peak = tl.where(m_wins, b_h, b_peak)
        b_winner = tl.where(m_wins, b_place, b_winner)
        b_sum += tl.load(p_values + plane + o_in, mask=m_channel, other=0.0).to(tl.float64)
        b_up_sum += tl.load(p_values + 2 * plane + o_in, mask=m_channel, other=0.0).to(tl.float64)
        b_up += tl.load(p_places + plane + o_in, mask=m_channel, other=0)
    length = _length(p_lengths, i_cloud, N)
    b_scale = tl.load(p_scale + o_channel, mask=m_channel, other=0.0)
    b_shift = tl.load(p_shift + o_channel, mask=m_channel, other=0.0)
    b_slopes = SLOPE * length.to(tl.float64) + (1.0 - SLOPE) * b_up.to(tl.float64)
    b_weighted = SLOPE * b_sum + (1.0 - SLOPE) * b_up_sum
    b_z = b_peak * b_scale + b_shift
    b_largest = tl.where(length > 0, tl.where(b_z > 0, b_z, b_z * SLOPE), 0.0)
    b_average = (b_scale.to(tl.float64) * b_weighted + b_shift.to(tl.float64) * b_slopes) / tl.maximum(
        length, 1
    )
    b_average = tl.where(length > 0, b_average, 0.0)
    p_out += i_cloud.to(tl.int64) * 2 * C + o_channel
    tl.store(p_out, b_largest.to(p_out.dtype.element_ty), mask=m_channel)
    tl.store(p_out + C, b_average.to(p_out.dtype.element_ty), mask=m_channel)
    if p_winner is not None:
        b_mean = tl.load(p_mean + o_channel, mask=m_channel, other=0.0)
        b_rstd = tl.load(p_rstd + o_channel, mask=m_channel, other=0.0)
        o_out, rows = i_cloud.to(tl.int64) * C + o_channel, clouds.to(tl.int64) * C
        tl.store(p_winner + o_out, b_winner, mask=m_channel)
        tl.store(p_slopes + o_out, b_slopes, mask=m_channel)
        tl.store(p_slopes + rows + o_out, (b_weighted - b_mean * b_slopes) * b_rstd, mask=m_channel)
        tl.store(p_slopes + 2 * rows + o_out, b_peak.to(tl.float64), mask=m_channel)


def finish(
    values: Tensor,
    places: Tensor,
    lengths: Tensor | None,
    n: int,
    gamma: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    negative_slope: float,
    out: Tensor,
    winner: Tensor | None,
    slopes: Tensor | None,
) -> None:
    """What `pool` found, joined cloud by cloud: out (B, 2 C), maxima and means of leaky(z), 0 without rows; winner
    (B, C) int32; slopes (3, B, C) float64: sums of leaky'(z) and of leaky'(z) (h - mean) rstd, and h of the winner."""
    _, batch, tiles, channels = values.shape
    with device_of(values):
        finish_kernel[(batch, triton.cdiv(channels, FINISH_COLUMNS))](
            *(values, places, lengths, gamma, scale, shift, mean, rstd, out, winner, slopes),
            *(batch, n, channels, tiles),
            SLOPE=negative_slope,
            COLUMNS=FINISH_COLUMNS,
            num_warps=2,
        )


# ---- backward


@triton.jit(do_not_specialize=["clouds", "N"])
def terms_kernel(
    p_grad,
    p_slopes,
    p_lengths,
    p_count,
    p_gamma,
    p_scale,
    p_shift,
    p_mean,
    p_rstd,
    p_spread,
    p_affine,
    clouds,
    N,
    C,
    TRAINING: tl.constexpr,
    SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_channel = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_channel = o_channel < C
    b_scale = tl.load(p_scale + o_channel, mask=m_channel, other=0.0)
    b_shift = tl.load(p_shift + o_channel, mask=m_channel, other=0.0)
    b_mean = tl.load(p_mean + o_channel, mask=m_channel, other=0.0)
    b_rstd = tl.load(p_rstd + o_channel, mask=m_channel, other=0.0)
    b_factor = tl.abs(tl.load(p_gamma + o_channel, mask=m_channel, other=0.0).to(tl.float64)) * b_rstd
    T: tl.constexpr = p_spread.dtype.element_ty
    rows = clouds.to(tl.int64) * C
    b_beta = tl.zeros([COLUMNS], tl.float64)
    b_gamma = tl.zeros([COLUMNS], tl.float64)
    o_in, p_own = o_channel, p_grad + o_channel
    for i_cloud in range(clouds):
        length = _length(p_lengths, i_cloud, N)
        m_in = m_channel & (length > 0)
        b_peak = tl.load(p_slopes + 2 * rows + o_in, mask=m_in, other=0.0)
        b_largest = tl.load(p_own, mask=m_in, other=0.0).to(tl.float64)
        m_up = b_peak.to(T) * b_scale + b_shift > 0
        b_largest = tl.where(m_up, b_largest, b_largest * SLOPE)
        b_even = tl.load(p_own + C, mask=m_in, other=0.0).to(tl.float64) / tl.maximum(length, 1)
        b_slopes = tl.load(p_slopes + o_in, mask=m_in, other=0.0)
        b_dots = tl.load(p_slopes + rows + o_in, mask=m_in, other=0.0)
        b_beta += b_even * b_slopes + b_largest
        b_gamma += b_even * b_dots + b_largest * ((b_peak - b_mean) * b_rstd)
        o_in += C
        p_own += 2 * C
    tl.store(p_affine + o_channel, b_gamma, mask=m_channel)
    tl.store(p_affine + C + o_channel, b_beta, mask=m_channel)

    b_constant = tl.zeros([COLUMNS], tl.float64)
    if TRAINING:
        count = tl.load(p_count)
        b_factor = tl.where(count > 1, b_factor, 0.0)  # the norm of a single row is constant
        b_slope_term = b_factor * b_rstd * b_gamma / tl.maximum(count, 1)
        b_constant = b_slope_term * b_mean - b_factor * b_beta / tl.maximum(count, 1)
        tl.store(p_affine + 2 * C + o_channel, b_slope_term, mask=m_channel)
    o_in, p_own = o_channel, p_grad + o_channel
    for i_cloud in range(clouds):
        length = _length(p_lengths, i_cloud, N)
        m_in = m_channel & (length > 0)
        b_peak = tl.load(p_slopes + 2 * rows + o_in, mask=m_in, other=0.0)
        b_largest = b_factor * tl.load(p_own, mask=m_in, other=0.0).to(tl.float64)
        m_up = b_peak.to(T) * b_scale + b_shift > 0
        b_largest = tl.where(m_up, b_largest, b_largest * SLOPE)
        b_even = b_factor * tl.load(p_own + C, mask=m_in, other=0.0).to(tl.float64) / tl.maximum(length, 1)
        tl.store(p_spread + o_in, (b_even + b_constant).to(T), mask=m_channel)
        tl.store(p_spread + rows + o_in, (SLOPE * b_even + b_constant).to(T), mask=m_channel)
        tl.store(p_spread + 2 * rows + o_in, b_largest.to(T), mask=m_channel)
        o_in += C
        p_own += 2 * C


def terms(
    grad: Tensor,
    slopes: Tensor,
    lengths: Tensor | None,
    n: int,
    count: Tensor,
    gamma: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    negative_slope: float,
    training: bool,
    spread: Tensor,
    affine: Tensor,
) -> None:
    """What the gradient of h is made of: dh = (z > 0 ? spread[0] : spread[1]) + [the row wins] spread[2] - affine[2] h.

    grad (B, 2 C); count, the number of rows, float64; spread (3, B, C); affine (3, C) float64: the gradients of |gamma|
    and of beta, and, where the batch made the statistics, that factor of h.
    """
    batch, channels = grad.shape[0], spread.shape[2]
    with device_of(grad):
        terms_kernel[(triton.cdiv(channels, TERMS_COLUMNS),)](
            *(
                grad,
                slopes,
                lengths,
                count,
                gamma,
                scale,
                shift,
                mean,
                rstd,
                spread,
                affine,
                batch,
                n,
                channels,
            ),
            TRAINING=training,
            SLOPE=negative_slope,
            COLUMNS=TERMS_COLUMNS,
            num_warps=1,
        )


@triton.jit
def _spread(p_mask, p_spread, p_winner, i_cloud, o_in, o_row, m_row, o_channel, rows, C, words):
    """The part of dh that is no multiple of h, for rows x channels, whichever way they are laid out."""
    m_channel = o_channel < C
    m_all = m_row & m_channel
    b_word = tl.load(p_mask + o_row * words + (o_channel >> 5), mask=m_all, other=0)
    p_spread += i_cloud.to(tl.int64) * C + o_channel
    b_up = tl.load(p_spread, mask=m_channel, other=0.0)
    b_down = tl.load(p_spread + rows, mask=m_channel, other=0.0)
    b_spike = tl.load(p_spread + 2 * rows, mask=m_channel, other=0.0)
    b_winner = tl.load(p_winner + i_cloud.to(tl.int64) * C + o_channel, mask=m_channel, other=-1)
    b = tl.where(((b_word >> (o_channel & 31)) & 1) != 0, b_up, b_down)
    return tl.where(m_all, b + tl.where(b_winner == o_in, b_spike, 0.0), 0.0)


@triton.jit(do_not_specialize=["clouds", "N", "tiles", "words"])
def x_gradient_kernel(
    p_mask,
    p_spread,
    p_winner,
    p_weight,
    p_x,
    p_lengths,
    p_centre,
    p_square,
    p_out,
    clouds,
    N,
    C_in,
    C_out,
    tiles,
    words,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    T: tl.constexpr = p_spread.dtype.element_ty
    blocks = tl.cdiv(C_in, COLUMNS)
    i_tile = tl.program_id(0) // blocks
    i_cloud = i_tile // tiles
    o_in = (i_tile % tiles) * ROWS + tl.arange(0, ROWS)
    length = _length(p_lengths, i_cloud, N)
    m_row = o_in < length
    any_row = (i_tile % tiles) * ROWS < length
    o_row = i_cloud.to(tl.int64) * N + o_in
    o_channel = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    m_channel = o_channel < C_in
    rows = clouds.to(tl.int64) * C_out
    b_sum = tl.zeros([ROWS, COLUMNS], T)
    for i_depth in range(0, tl.where(any_row, C_out, 0), DEPTH):
        o_depth = i_depth + tl.arange(0, DEPTH)
        b_left = _spread(
            p_mask,
            p_spread,
            p_winner,
            i_cloud,
            o_in[:, None],
            o_row[:, None],
            m_row[:, None],
            o_depth[None, :],
            rows,
            C_out,
            words,
        )
        m_right = (o_depth < C_out)[:, None] & m_channel[None, :]
        b_right = tl.load(p_weight + o_depth[:, None] * C_in + o_channel[None, :], mask=m_right, other=0.0)
        b_sum = add_product(rounded(b_left, PRODUCT), rounded(b_right, PRODUCT), b_sum, PRODUCT)
    if p_square is not None:
        for i_depth in range(0, tl.where(any_row, C_in, 0), DEPTH):
            o_depth = i_depth + tl.arange(0, DEPTH)
            b_left = _centred(p_x, p_centre, o_row[:, None], m_row[:, None], o_depth[None, :], C_in)
            m_right = (o_depth < C_in)[:, None] & m_channel[None, :]
            b_right = tl.load(
                p_square + o_depth[:, None] * C_in + o_channel[None, :], mask=m_right, other=0.0
            )
            b_sum = add_product(rounded(b_left, PRODUCT), rounded(b_right, PRODUCT), b_sum, PRODUCT)
    p_out += o_row[:, None] * C_in + o_channel[None, :]
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty), mask=(o_in < N)[:, None] & m_channel[None, :])


def x_gradient(
    mask: Tensor,
    spread: Tensor,
    winner: Tensor,
    weight: Tensor,
    x: Tensor,
    lengths: Tensor | None,
    centre: Tensor,
    square: Tensor | None,
    product: int,
    out: Tensor,
) -> None:
    """out (B, N, C_in) = g weight + x' square, g being what `terms` describes without its last term; square (C_in,
    C_in) or None. 0 in rows past lengths."""
    (batch, n, c_in), c_out = x.shape, len(weight)
    tile = X_GRADIENT[PRODUCTS[product]]
    tiles = triton.cdiv(n, tile.rows)
    with device_of(x):
        x_gradient_kernel[(batch * tiles * triton.cdiv(c_in, tile.columns),)](
            *(mask, spread, winner, weight, x, lengths, centre, square, out),
            *(batch, n, c_in, c_out, tiles, mask.shape[2]),
            PRODUCT=PRODUCTS[product],
            **tile.constants(),
            **tile.options(),
        )


@triton.jit(do_not_specialize=["clouds", "N", "parts", "words"])
def weight_gradient_kernel(
    p_mask,
    p_spread,
    p_winner,
    p_x,
    p_lengths,
    p_centre,
    p_out,
    clouds,
    N,
    C_in,
    C_out,
    parts,
    words,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    T: tl.constexpr = p_spread.dtype.element_ty
    i_part = tl.program_id(0)
    o_left = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_right = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    tiles = tl.cdiv(N, DEPTH)
    each = tl.cdiv(clouds * tiles, parts)
    rows = clouds.to(tl.int64) * C_out
    b_sum = tl.zeros([ROWS, COLUMNS], T)
    for i_tile in range(i_part * each, tl.minimum((i_part + 1) * each, clouds * tiles)):
        i_cloud = i_tile // tiles
        o_in = (i_tile % tiles) * DEPTH + tl.arange(0, DEPTH)
        m_row = o_in < _length(p_lengths, i_cloud, N)
        o_row = i_cloud.to(tl.int64) * N + o_in
        b_left = _spread(
            p_mask,
            p_spread,
            p_winner,
            i_cloud,
            o_in[None, :],
            o_row[None, :],
            m_row[None, :],
            o_left[:, None],
            rows,
            C_out,
            words,
        )
        b_right = _centred(p_x, p_centre, o_row[:, None], m_row[:, None], o_right[None, :], C_in)
        b_sum = add_product(rounded(b_left, PRODUCT), rounded(b_right, PRODUCT), b_sum, PRODUCT)
    p_out += i_part.to(tl.int64) * C_out * C_in + o_left[:, None] * C_in + o_right[None, :]
    tl.store(p_out, b_sum, mask=(o_left < C_out)[:, None] & (o_right < C_in)[None, :])


def weight_gradient(
    mask: Tensor,
    spread: Tensor,
    winner: Tensor,
    x: Tensor,
    lengths: Tensor | None,
    centre: Tensor,
    product: int,
    out: Tensor,
) -> None:
    """out (parts, C_out, C_in): g^T x' summed over a part of the rows, g as in `x_gradient`."""
    batch, n, _ = x.shape
    parts, c_out, c_in = out.shape
    tile = WEIGHT_GRADIENT[PRODUCTS[product]]
    with device_of(x):
        weight_gradient_kernel[(parts, triton.cdiv(c_out, tile.rows), triton.cdiv(c_in, tile.columns))](
            *(mask, spread, winner, x, lengths, centre, out, batch, n, c_in, c_out, parts, mask.shape[2]),
            PRODUCT=PRODUCTS[product],
            **tile.constants(),
            **tile.options(),
        )
