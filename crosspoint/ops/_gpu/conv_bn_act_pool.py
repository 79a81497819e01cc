"""conv_bn_act_pool on a GPU: statistics from the Gram matrix of x, one product that keeps its signs and what is pooled
of it, gradients from the signs. docs/derivations/conv_bn_act_pool.md derives it.

Everything is signed by gamma, so that every maximum is a maximum, and centred: h = W x', x' = x - centre.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from crosspoint.kernels._checks import check_length_values
from crosspoint.kernels._precision import PRODUCTS, product_of
from crosspoint.ops._checks import compute_dtype
from crosspoint.ops._gpu._products import EXACT_CHANNELS

__all__ = ["backward", "forward"]

# Rows of a cloud that one block of threads pools.
_TILE_ROWS = {torch.float32: 128, torch.float64: 32}
_PARTS = 16  # of the rows, each with a sum of its own where sums run over all rows
_PART_ROWS = 256  # at least, of a part


def forward(
    leaves: ModuleType,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    lengths: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    backward: bool,
) -> tuple[Tensor, ...]:
    """What operator conv_bn_act_pool returns."""
    with torch.autocast(x.device.type, enabled=False):
        (batch, n, c_in), c_out, given = x.shape, weight.shape[0], x.dtype
        dtype, double = compute_dtype(x), {"dtype": torch.float64, "device": x.device}
        shape = (batch, n, -(-c_out // 32)) if backward else (0,)
        mask = torch.empty(shape, dtype=torch.int32, device=x.device)
        winner = torch.empty((batch, c_out) if backward else (0,), dtype=torch.int32, device=x.device)
        slopes = torch.empty((3, batch, c_out) if backward else (0,), **double)
        moments = torch.zeros((c_in * training + 1, c_in) if backward else (0,), **double)
        out = x.new_empty((batch, 2 * c_out), dtype=dtype)
        if x.numel() * c_out == 0:
            statistics = torch.zeros((2, c_out), **double)
            return out.zero_().to(given), mask.zero_(), winner.zero_(), statistics, slopes.zero_(), moments
        check_length_values("lengths", lengths, n)

        product = _product(x, weight)
        x, lengths = _operand(x, product), None if lengths is None else lengths.contiguous()
        gamma = gamma.to(dtype).contiguous()
        signed = _signed_weight(weight, gamma, product)
        exact = signed.double()
        count = _count(x, lengths)
        centre = _centre(leaves, x, lengths, count)
        if training:
            gram, mean, var = _statistics(leaves, x, lengths, centre, exact, product, count)
            if backward:
                moments[:-1] = gram
            if running_mean is not None and running_var is not None:
                uncentred = _sign(gamma) * (mean + exact @ centre.double())
                _update(running_mean, uncentred, momentum, count)
                _update(running_var, var * (count / (count - 1).clamp_min(1)), momentum, count)
        else:
            mean = _sign(gamma) * running_mean.double() - exact @ centre.double()
            var = running_var.double()
        if backward:
            moments[-1] = centre
        rstd = torch.rsqrt(var + eps)
        scale, shift = _affine(gamma, beta, mean, rstd)

        tiles = -(-n // _TILE_ROWS[compute_dtype(x)])
        values = x.new_empty((3, batch, tiles, c_out), dtype=dtype)
        places = torch.empty((2, batch, tiles, c_out), dtype=torch.int32, device=x.device)
        leaves.pool(
            *(x, lengths, centre, signed, gamma, scale, shift, PRODUCTS.index(product), values, places),
            mask if backward else None,
        )
        leaves.finish(
            *(values, places, lengths, n, gamma, scale, shift, mean, rstd, negative_slope, out),
            winner if backward else None,
            slopes if backward else None,
        )
        return out.to(given), mask, winner, torch.stack([mean, rstd]), slopes, moments


def backward(
    leaves: ModuleType,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    lengths: Tensor | None,
    mask: Tensor,
    winner: Tensor,
    statistics: Tensor,
    slopes: Tensor,
    moments: Tensor,
    training: bool,
    negative_slope: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What operator conv_bn_act_pool_backward returns."""
    with torch.autocast(x.device.type, enabled=False):
        (batch, n, c_in), c_out, given = x.shape, weight.shape[0], x.dtype
        dtype, double = compute_dtype(x), {"dtype": torch.float64, "device": x.device}
        grad_x, grad_weight = x.new_empty(0), x.new_empty(0, dtype=dtype)
        if x.numel() * c_out == 0:
            grad_weight = x.new_zeros((c_out, c_in) if need_weight else 0, dtype=dtype)
            affine = x.new_zeros((2, c_out), dtype=dtype).unbind()
            return torch.zeros_like(x) if need_x else grad_x, grad_weight, *(t.clone() for t in affine)

        product = _product(x, weight)
        x, lengths = _operand(x, product), None if lengths is None else lengths.contiguous()
        gamma = gamma.to(dtype).contiguous()
        signed, sign = _signed_weight(weight, gamma, product), _sign(gamma)
        (mean, rstd), centre = statistics, moments[-1].to(dtype)
        scale, shift = _affine(gamma, beta, mean, rstd)
        spread = x.new_empty((3, batch, c_out), dtype=dtype)
        affine = torch.zeros((3, c_out), **double)
        leaves.terms(
            *(
                grad.to(dtype).contiguous(),
                slopes,
                lengths,
                n,
                _count(x, lengths),
                gamma,
                scale,
                shift,
                mean,
                rstd,
            ),
            *(negative_slope, training, spread, affine),
        )
        gamma_sum, beta_sum, slope_term = affine
        exact = signed.double()
        scaled = slope_term[:, None] * exact  # (C_out, C_in)
        if need_x:
            grad_x = torch.empty_like(x)
            square = -(exact.t() @ scaled).to(signed.dtype) if training else None
            leaves.x_gradient(
                *(mask, spread, winner, signed, x, lengths, centre, square, PRODUCTS.index(product), grad_x)
            )
        if need_weight:
            partial = x.new_empty((_parts(x), c_out, c_in), dtype=dtype)
            leaves.weight_gradient(mask, spread, winner, x, lengths, centre, PRODUCTS.index(product), partial)
            total = partial.sum(0, dtype=torch.float64)
            if training:
                total = total - scaled @ moments[:-1]
            else:  # in training the gradients of h add up to 0, and so does what the centre adds
                total = torch.addr(total, gamma.double().abs() * rstd * beta_sum, moments[-1])
            grad_weight = (sign[:, None] * total).to(dtype)
        return grad_x.to(given), grad_weight, (sign * gamma_sum).to(dtype), beta_sum.to(dtype)


def _product(x: Tensor, weight: Tensor) -> str:
    """How h is multiplied. float32 follows torch's setting, but for coordinates; bfloat16 beside a float32 weight is
    what autocast leaves, and a layer that is bfloat16 throughout is widened."""
    if x.dtype == torch.bfloat16 and weight.dtype == torch.float32:
        return "bf16"
    if x.dtype != torch.float64 and x.shape[2] <= EXACT_CHANNELS:
        return "tf32x3"
    return product_of(compute_dtype(x))


def _operand(x: Tensor, product: str) -> Tensor:
    """x as the leaves read it: bfloat16 stays where it is multiplied as that, other half types are widened."""
    keep = x.dtype == torch.bfloat16 and product == "bf16"
    return (x if keep else x.to(compute_dtype(x))).contiguous()


def _sign(gamma: Tensor) -> Tensor:
    return torch.where(gamma < 0, -1.0, 1.0).double()


def _signed_weight(weight: Tensor, gamma: Tensor, product: str) -> Tensor:
    """The weight times the sign of gamma, rounded as the product takes it: its statistics are then exactly h's."""
    signed = torch.where(gamma < 0, -1, 1).to(gamma.dtype)[:, None] * weight.to(gamma.dtype)
    if product == "tf32":
        rounded = ((signed.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        signed = torch.where(signed.isfinite(), rounded, signed)
    return (signed.bfloat16() if product == "bf16" else signed).contiguous()


def _count(x: Tensor, lengths: Tensor | None) -> Tensor:
    """How many rows there are, float64."""
    batch, n, _ = x.shape
    if lengths is None:
        return torch.full((), batch * n, dtype=torch.float64, device=x.device)
    return lengths.clamp(0, n).sum().double()


def _parts(x: Tensor) -> int:
    return max(1, min(_PARTS, x.shape[0] * x.shape[1] // _PART_ROWS))


def _centre(leaves: ModuleType, x: Tensor, lengths: Tensor | None, count: Tensor) -> Tensor:
    """About the mean row, (C_in): rounded to a grid of a quarter to half of the spread, few bits, so that x - centre
    stays exact on a lattice and ties stay ties."""
    batch, n, c_in = x.shape
    tiles = -(-n // _TILE_ROWS[compute_dtype(x)])
    sums = torch.empty((batch, tiles, 2, c_in), dtype=torch.float64, device=x.device)
    leaves.sums(x, lengths, sums)
    mean, square = sums.sum((0, 1)) / count.clamp_min(1)
    spread = (square - mean.square()).clamp_min(0).sqrt()
    grid = torch.ldexp(torch.ones_like(spread), spread.frexp().exponent - 2)
    mean = torch.where((spread > 0) & spread.isfinite(), (mean / grid).round() * grid, mean)
    return mean.nan_to_num(0, 0, 0).to(compute_dtype(x)).nan_to_num(0, 0, 0)


def _statistics(
    leaves: ModuleType,
    x: Tensor,
    lengths: Tensor | None,
    centre: Tensor,
    weight: Tensor,
    product: str,
    count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram matrix sum x' x'^T, and mean and variance of h = weight x', from sums over the same rounded x' that h
    is multiplied from: all in float64, added up from sums over parts of the rows."""
    c_in, parts = x.shape[2], _parts(x)
    partial = x.new_empty((parts, c_in, c_in), dtype=centre.dtype)
    first = torch.empty((parts, c_in), dtype=torch.float64, device=x.device)
    leaves.gram(x, lengths, centre, PRODUCTS.index(product), partial, first)
    gram, count = partial.sum(0, dtype=torch.float64), count.clamp_min(1)
    mean = first.sum(0) / count
    scatter = torch.addr(gram, mean, mean * -count)
    var = ((weight @ scatter) * weight).sum(1).clamp_min(0) / count
    return gram, weight @ mean, var


def _affine(gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """scale and shift (C_out) that make z of a signed, centred h."""
    scale = gamma.double().abs() * rstd
    shift = torch.addcmul(beta.double(), scale, mean, value=-1)
    return scale.to(gamma.dtype), shift.to(gamma.dtype)


def _update(running: Tensor, value: Tensor, momentum: float, count: Tensor) -> None:
    """As `nn.BatchNorm1d` does; an empty batch leaves it alone."""
    before = running.double()
    running.copy_(torch.where(count > 0, torch.lerp(before, value, momentum), before))
