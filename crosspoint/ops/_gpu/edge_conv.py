"""EdgeConv on a GPU: statistics from sums in input space, then one gather. docs/derivations/edge_conv.md derives it.

Everything is signed by gamma, so that every maximum is a maximum, and centred cloud by cloud: with x_j = t + x'_j an
edge carries h = U_j + V_i + B t, and [U | V] = x' [A | D]^T, D = B - A.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from crosspoint.ops._checks import check_graph, compute_dtype
from crosspoint.ops._gpu._products import product

__all__ = ["backward", "forward"]

# Nodes of a cloud that one block of threads sums.
_MOMENTS_PART = 256
_GRADIENT_PART = 256


def forward(
    leaves: ModuleType,
    x: Tensor,
    idx: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    backward: bool,
) -> tuple[Tensor, ...]:
    """What operator edge_conv returns."""
    with torch.autocast(x.device.type, enabled=False):
        (batch, n, k), (c_out, c_in) = idx.shape, (weight.shape[0], x.shape[2])
        training = training and gamma is not None
        dtype, given = compute_dtype(x), x.dtype
        nodes = (batch, n, c_out)
        kept = nodes if backward else (0,)
        out = x.new_empty(nodes, dtype=dtype)
        winner = x.new_empty(kept, dtype=dtype)
        slot = x.new_empty(kept, dtype=torch.uint8 if k <= 256 else torch.int32)
        degrees = idx.new_zeros((2, batch, n), dtype=torch.int32)
        centre = x.new_empty((batch, c_in), dtype=dtype)
        if idx.numel() * x.numel() * c_out == 0:
            return _nothing(x, out, winner, slot, degrees, centre, training and backward)
        check_graph("edge_conv", idx, n)

        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        leaves.degrees(idx, degrees)
        leaves.centre(x, degrees, centre)
        centred = torch.empty_like(x)
        leaves.subtract(x, centre, degrees, centred)
        signed, own = _signed_weight(weight, gamma)  # (C_out, 2 C_in), (C_out, C_in)
        constant = centre.double() @ own.t()  # (B, C_out), h of an edge from the centre to itself
        sums, moments = x.new_empty(0), x.new_empty(0, dtype=torch.float64)
        if training:
            sums = torch.empty_like(x)
            leaves.neighbor_sum(centred, idx, sums)
            moments = _moments(leaves, centred, sums, degrees)
            mean, var, edges = _statistics(moments, signed, constant, degrees)
            rstd = torch.rsqrt(var + eps)
            offset = constant - mean
            if running_mean is not None and running_var is not None:
                unbiased = var * (edges / (edges - 1).clamp_min(1))
                _update(running_mean, _sign(gamma) * mean, momentum, edges)
                _update(running_var, unbiased, momentum, edges)
        elif gamma is not None:
            rstd = torch.rsqrt(running_var.double() + eps)
            offset = constant - _sign(gamma) * running_mean.double()
        else:
            rstd, offset = constant.new_ones(c_out), constant
        scale, shift = _affine(gamma, beta, rstd, offset)

        halves = torch.cat([signed[:, :c_in], signed[:, c_in:]]).to(dtype)  # (2 C_out, C_in)
        # As autocast leaves them. A layer that is bfloat16 throughout is widened.
        rounded = given == torch.bfloat16 and weight.dtype == torch.float32
        products = product(centred.view(-1, c_in), halves.t(), c_in, rounded=rounded)  # (B N, 2 C_out)
        leaves.gather_max(
            products,
            idx,
            None if gamma is None else gamma.to(dtype).contiguous(),
            scale.to(dtype),
            shift.to(dtype),
            negative_slope,
            out,
            winner if backward else None,
            slot if backward else None,
        )
        if not backward:
            sums, moments = x.new_empty(0), x.new_empty(0, dtype=torch.float64)
        in_sum = x.new_empty(0)
        return out.to(given), winner, slot, sums, in_sum, degrees, centre, offset, rstd, moments


def _nothing(
    x: Tensor, out: Tensor, winner: Tensor, slot: Tensor, degrees: Tensor, centre: Tensor, sums: bool
) -> tuple[Tensor, ...]:
    """The results where there is no edge, channel or node."""
    (batch, n, c_out), c_in = out.shape, x.shape[2]
    double = {"dtype": torch.float64, "device": x.device}
    return (
        out.zero_().to(x.dtype, copy=True),
        winner.zero_(),
        slot.zero_(),
        centre.new_zeros((batch, n, c_in)) if sums else centre.new_empty(0),
        centre.new_empty(0),
        degrees,
        centre.zero_(),
        torch.zeros((batch, c_out), **double),
        torch.zeros(c_out, **double),
        torch.zeros((2 * c_in + batch, 2 * c_in) if sums else 0, **double),
    )


def _sign(gamma: Tensor | None) -> Tensor | float:
    return 1.0 if gamma is None else torch.where(gamma < 0, -1.0, 1.0).double()


def _signed_weight(weight: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """[A | D] and B, times the sign of gamma, in float64."""
    weight = weight.double()
    if gamma is not None:
        weight = weight * _sign(gamma)[:, None]
    neighbour, own = weight.chunk(2, 1)
    return torch.cat([neighbour, own - neighbour], 1), own


def _affine(gamma: Tensor | None, beta: Tensor | None, rstd: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """scale (C_out) and shift (B, C_out) that make z of a signed, centred h."""
    scale = rstd if gamma is None else gamma.double().abs() * rstd
    return scale, scale * offset if beta is None else torch.addcmul(beta.double(), scale, offset)


def _moments(leaves: ModuleType, centred: Tensor, sums: Tensor, degrees: Tensor) -> Tensor:
    """Sums over all edges of [x_j, x_i] [x_j, x_i]^T, (2 C, 2 C); below them those over each cloud's of [x_j, x_i],
    (B, 2 C): float64, added up from float32 sums over parts of the clouds."""
    batch, n, channels = centred.shape
    parts = -(-n // _MOMENTS_PART)
    gram = centred.new_empty((batch, parts, 3, channels, channels))
    first = centred.new_empty((batch, parts, 2, channels), dtype=torch.float64)
    leaves.moments(centred, sums, degrees, gram, first)
    other, mixed, own = gram.sum((0, 1), dtype=torch.float64)
    rows = [torch.cat([other, mixed], 1), torch.cat([mixed.t(), own], 1)]
    return torch.cat([*rows, first.sum(1).flatten(1)])


def _statistics(
    moments: Tensor, signed: Tensor, constant: Tensor, degrees: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of the signed h over all edges, (C_out), and the number of edges. Scatter within clouds and
    scatter between their means are sums of squares both: no large offset enters a difference."""
    channels = signed.shape[1]
    gram, first = moments[:channels], moments[channels:]
    edges = degrees[0].sum(1, dtype=torch.float64)[:, None]  # (B, 1), of each cloud
    count = edges.sum()
    centre = first / edges.clamp_min(1)  # (B, 2 C): the mean edge of each cloud
    means = torch.addmm(constant, centre, signed.t())  # (B, C_out), of h
    mean = (edges * means).sum(0) / count.clamp_min(1)
    within = ((signed @ (gram - centre.t() @ first)) * signed).sum(1).clamp_min(0)
    between = (edges * (means - mean).square()).sum(0)
    return mean, (within + between) / count.clamp_min(1), count


def _update(running: Tensor, value: Tensor, momentum: float, edges: Tensor) -> None:
    """As `nn.BatchNorm2d` does; an empty batch leaves it alone."""
    before = running.double()
    running.copy_(torch.where(edges > 0, torch.lerp(before, value, momentum), before))


def backward(
    leaves: ModuleType,
    grad: Tensor,
    x: Tensor,
    idx: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    winner: Tensor,
    slot: Tensor,
    out_sum: Tensor,
    in_sum: Tensor,
    degrees: Tensor,
    centre: Tensor,
    offset: Tensor,
    rstd: Tensor,
    moments: Tensor,
    training: bool,
    negative_slope: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What operator edge_conv_backward returns.

    The gradient of h on edge (i, j) is scale ([the edge wins] g_i - mean_term - slope_term h), the last two only where
    the batch made the statistics. Leaves sum the first, edge by edge; the others go through sums over nodes.
    """
    with torch.autocast(x.device.type, enabled=False):
        (batch, n, _), (c_out, c_in) = idx.shape, (weight.shape[0], x.shape[2])
        training = training and gamma is not None
        dtype, given = compute_dtype(x), x.dtype
        if idx.numel() * x.numel() * c_out == 0:
            affine = [x.new_zeros(0 if gamma is None else c_out, dtype=dtype) for _ in range(2)]
            grad_weight = x.new_zeros((c_out, 2 * c_in) if need_weight else 0, dtype=dtype)
            return torch.zeros_like(x) if need_x else x.new_empty(0), grad_weight, *affine

        x, idx = x.to(dtype).contiguous(), idx.contiguous()
        scale, shift = _affine(gamma, beta, rstd, offset)
        routed = x.new_empty((batch, n, 2 * c_out))  # scale times it: dU and dV, but for the dense terms
        parts = -(-n // _GRADIENT_PART)
        partial = x.new_empty((2, batch, parts, c_out), dtype=torch.float64)
        leaves.winner_gradient(
            grad.to(dtype).contiguous(),
            winner,
            degrees,
            scale.to(dtype),
            shift.to(dtype),
            negative_slope,
            routed,
            partial,
        )
        sum_g, sum_gh = partial.sum(2)  # (B, C_out), over the winners of each cloud
        grad_gamma, grad_beta = x.new_empty(0), x.new_empty(0)
        if gamma is not None:
            beta_sum = sum_g.sum(0)
            gamma_sum = torch.addcmul(sum_gh, offset, sum_g).sum(0) * rstd
            grad_gamma, grad_beta = (_sign(gamma) * gamma_sum).to(dtype), beta_sum.to(dtype)
        grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
        if not (need_x or need_weight):
            return grad_x.to(given), grad_weight, grad_gamma, grad_beta

        start = idx.new_empty((batch, n + 1), dtype=torch.int32)
        edges = idx.new_empty((batch, idx[0].numel()), dtype=torch.int32)
        leaves.reverse_graph(idx, start, edges)
        leaves.route(slot, start, edges, idx.shape[2], routed)
        centred = torch.empty_like(x)
        leaves.subtract(x, centre, degrees, centred)
        signed, _ = _signed_weight(weight, gamma)
        scaled = scale[:, None] * signed
        cloud_edges = degrees[0].sum(1, dtype=torch.float64)[:, None]  # (B, 1)
        if training:
            count = cloud_edges.sum().clamp_min(1)
            slope_term = gamma_sum * rstd / count
            mean_term = torch.addcmul(beta_sum / count, slope_term, offset)  # (B, C_out)
        if need_x:
            halves = torch.cat([scaled[:, :c_in], scaled[:, c_in:]]).to(dtype)  # (2 C_out, C_in)
            grad_x = product(routed.view(-1, 2 * c_out), halves, c_in)  # (B N, C_in)
            if training:
                dense = x.new_empty((batch, n, 4 * c_in))  # d_j x_j, their neighbours' sum, P_i, k_i x_i
                constant = (mean_term @ scaled).to(
                    dtype
                )  # (B, 2 C_in): what each edge takes from x_j and x_i
                leaves.dense_gradient(
                    centred, out_sum, degrees, start, edges, idx.shape[2], constant, dense, grad_x
                )
                square = signed.t() @ (slope_term[:, None] * scaled)  # (2 C_in, 2 C_in)
                square = torch.cat([square[:, :c_in], square[:, c_in:]]).to(dtype)
                grad_x = grad_x - product(dense.view(-1, 4 * c_in), square, c_in)
            grad_x = grad_x.view(batch, n, c_in)
        if need_weight:
            flat = routed.view(-1, 2 * c_out)
            sparse = product(flat.t(), centred.view(-1, c_in), c_in).double()  # (2 C_out, C_in)
            both = scale[:, None] * torch.cat([sparse[:c_out], sparse[c_out:]], 1)  # (C_out, 2 C_in)
            edge_sum = sum_g  # (B, C_out): over the edges of each cloud, of the gradient of h over scale
            if training:
                gram, first = moments[: 2 * c_in], moments[2 * c_in :]
                both = both - scale[:, None] * (mean_term.t() @ first + slope_term[:, None] * (signed @ gram))
                edge_sum = sum_g - cloud_edges * mean_term - slope_term * (first @ signed.t())
                # Over all clouds they add up to 0, so what the centres share may go before it is rounded.
                centre = centre.double() - centre.double().mean(0)
            neighbour, own = both.chunk(2, 1)
            neighbour = neighbour - own
            own = torch.addmm(own, (scale * edge_sum).t(), centre.double())
            grad_weight = torch.cat([neighbour, own], 1)
            if gamma is not None:
                grad_weight = grad_weight * _sign(gamma)[:, None]
            grad_weight = grad_weight.to(dtype)
        return grad_x.to(given), grad_weight, grad_gamma, grad_beta
