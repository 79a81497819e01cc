"""EdgeConv with two layers on the edges before the maximum, as in part segmentation, fused.

    a_ij = leaky_relu(batch_norm1(weight1 @ [x_j - x_i, x_i]))
    y_i = max over the edges (i, j) of leaky_relu(batch_norm2(weight2 @ a_ij))

The same in plain PyTorch; conv1 and conv2 are 1 x 1 `nn.Conv2d` without bias, bn1 and bn2 `nn.BatchNorm2d`:

    neighbours = x[torch.arange(B)[:, None, None], idx]                      # (B, N, k, C_in)
    centres = x[:, :, None].expand_as(neighbours)
    edges = torch.cat([neighbours - centres, centres], -1).permute(0, 3, 1, 2)
    a = F.leaky_relu(bn1(conv1(edges)), negative_slope)
    y = F.leaky_relu(bn2(conv2(a)), negative_slope).max(-1).values.transpose(1, 2)

Both norms are over all edges, as PyTorch computes them. Here no tensor with both an edge axis and a channel
axis is ever stored, in either direction. The first layer of an edge is the sum of a row of each of two node
maps, as in `edge_conv`; some hundred edges at a time go through the second product in the processor's caches,
where their maxima and the sums for the second norm are taken. The backward pass computes those tiles again. It
does so without the second product: what the second norm's dense terms give the first layer is one
C_mid x C_mid matrix times `a`, what they give `weight2` follows from the sum of a a', and the winners add C_out
rows a node. The first norm's dense terms are summed by node.

Memory beside inputs, output and gradients, in elements of 4 bytes (8 for float64). Kept for the backward pass:
1.25 B N C_out (the second layer's value of the winning edge, and its slot in a byte; a slot takes 4 bytes if
k > 256), and a few numbers per channel, cloud or node. While running: forward 2 B N C_mid; backward
(3 + P) B N C_mid + 16 C_mid (2 C_in + C_mid + C_out), where P parts share a cloud's work, ceil(16 / B) but at
most ceil(N / 64). Per thread, one tile: max(96, k) (C_mid + C_out) forward, 2 max(96, k) C_mid backward. Half
types are widened: add a float32 copy of x, out and its gradient. Without gradients nothing is kept. GPUs keep the
same and need other workspace, see docs/derivations/edge_conv2.md.

Several processes (`group`): the statistics are those of all ranks' edges. The first norm's are exchanged as in
`edge_conv`, with its memory. Of the second norm, each rank's 2 C_out + 1 numbers are gathered behind the forward pass,
before the activation, and 2 C_out sums added up before the backward pass, which forms its dense terms from them; while
running, either takes up to 3 B N C_out more. torch.compile breaks its graph at the exchange.

Dynamic Graph CNN for Learning on Point Clouds, arXiv 1801.07829.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosspoint.ops import _dispatch, _gpu, _library, _rank_norm, reference
from crosspoint.ops._checks import check_neighbours, check_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["edge_conv2"]


def edge_conv2(
    x: Tensor,
    idx: Tensor,
    weight1: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    weight2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    running_mean1: Tensor | None = None,
    running_var1: Tensor | None = None,
    running_mean2: Tensor | None = None,
    running_var2: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """max over the neighbours j of i of layer2(layer1([x_j - x_i, x_i])); a layer: linear map, batch norm, LeakyReLU.

    Edges whose index is -1 do not exist, neither in the maximum nor in the statistics of either norm; a node
    without any gives 0 and takes no gradient. Of edges that tie, the lowest slot wins; where gamma2 is 0 all edges
    tie. NaN wins over every number, as in `torch.max`. Results are bitwise the same from run to run and for any
    number of threads.

    Args:
        x: (B, N, C_in), float64, float32, float16 or bfloat16. Half types are computed in float32. Under
            autocast it is cast to autocast's dtype first (float64 stays).
        idx: (B, N, k) int64: the neighbours of each node, rows of the same cloud, or -1.
        weight1: (C_mid, 2 C_in), its columns for [x_j - x_i, x_i].
        gamma1, beta1: (C_mid,), the affine parameters of the first norm.
        weight2: (C_out, C_mid).
        gamma2, beta2: (C_out,), those of the second norm. All four None: no norms.
        running_mean1, running_var1: (C_mid,), or both None. Updated in place when training, as by
            `nn.BatchNorm2d` (an empty batch leaves them alone); the statistics to use otherwise.
        running_mean2, running_var2: (C_out,), likewise.
        training: whether the statistics are those of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variances.
        negative_slope: of both LeakyReLUs, >= 0; 0 is ReLU.
        group: a process group of torch.distributed, whose ranks share the statistics of both norms as in `edge_conv`.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        (B, N, C_out) in the dtype of x (or autocast's). Differentiable once in x and all weights, gammas and betas.

    Raises:
        ValueError, TypeError: for shapes, dtypes and options; ValueError also when training with a single
            value per channel, as in PyTorch (with a group, a rank may have one), and where this process is not in
            the group.
        RuntimeError: for evaluation with norms but without running statistics, as in PyTorch.
        IndexError: for an entry of idx that is neither -1 nor in [0, N) (compiled backends).
    """
    norm1, norm2 = (gamma1, beta1, running_mean1, running_var1), (gamma2, beta2, running_mean2, running_var2)
    over_ranks = _rank_norm.spans_ranks("edge_conv2", group) and training and gamma1 is not None
    _check(x, idx, weight1, norm1, weight2, norm2, training, negative_slope, over_ranks)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    tensors = (x, idx, weight1, gamma1, beta1, weight2, gamma2, beta2, *norm1[2:], *norm2[2:])
    backend = _dispatch.choose("edge_conv2", impl, x.device)
    if backend == "reference":
        with torch.autocast(device, enabled=False):
            return reference.edge_conv2(
                *tensors,
                training=training,
                momentum=momentum,
                eps=eps,
                negative_slope=negative_slope,
                group=group if over_ranks else None,
            )
    if over_ranks:
        with torch.autocast(device, enabled=False):
            x, share = _rank_norm.of_edges(x, idx, weight1, group)
            norm1 = _rank_norm.over_ranks(x, *norm1, share, momentum=momentum, eps=eps, group=group)
            tensors = (x, idx, weight1, *norm1[:2], weight2, gamma2, beta2, *norm1[2:])
            return _RankEdgeConv2.apply(
                *tensors, running_mean2, running_var2, momentum, eps, negative_slope, group, backend
            )
    options = (training, momentum, eps, negative_slope)
    return _EdgeConv2.apply(*tensors, *options, torch.is_grad_enabled(), backend)[0]


def _check(
    x: Tensor,
    idx: Tensor,
    weight1: Tensor,
    norm1: tuple[Tensor | None, ...],
    weight2: Tensor,
    norm2: tuple[Tensor | None, ...],
    training: bool,
    negative_slope: float,
    over_ranks: bool,
) -> None:
    check_neighbours("edge_conv2", x, idx)
    if idx.shape[1] != x.shape[1]:
        raise ValueError(
            f"edge_conv2: idx must be (B, N, k) = ({x.shape[0]}, {x.shape[1]}, k), as x is {tuple(x.shape)}; "
            f"got shape {tuple(idx.shape)}"
        )
    if weight1.dim() != 2 or weight1.shape[1] != 2 * x.shape[2]:
        raise ValueError(
            f"edge_conv2: weight1 must be (C_mid, 2 C_in) = (C_mid, {2 * x.shape[2]}), got shape "
            f"{tuple(weight1.shape)}; of a 1x1 Conv2d, pass conv.weight.flatten(1)"
        )
    if weight2.dim() != 2 or weight2.shape[1] != weight1.shape[0]:
        raise ValueError(
            f"edge_conv2: weight2 must be (C_out, C_mid) = (C_out, {weight1.shape[0]}), as weight1 is "
            f"{tuple(weight1.shape)}; got shape {tuple(weight2.shape)}"
        )
    if 0 in (x.shape[2], weight1.shape[0], weight2.shape[0]):
        raise ValueError(
            f"edge_conv2: C_in, C_mid and C_out must be positive, got {x.shape[2]}, {weight1.shape[0]} and "
            f"{weight2.shape[0]}"
        )
    if (norm1[0] is None) != (norm2[0] is None):
        given, missing = ("gamma2", "gamma1") if norm1[0] is None else ("gamma1", "gamma2")
        raise ValueError(
            f"edge_conv2: both layers have a norm, or neither: got {given} but {missing} is None"
        )
    for layer, weight, norm in (("1", weight1, norm1), ("2", weight2, norm2)):
        values = None if over_ranks else idx.numel()
        options = {"training": training, "values": values, "negative_slope": negative_slope}
        check_norm("edge_conv2", x, weight, *norm, layer=layer, **options)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_forward(x, idx, weight1, gamma1, beta1, weight2, *rest):
    (batch, n, k), c_mid, c_out, dtype = idx.shape, weight1.shape[0], weight2.shape[0], _compute_dtype(x)
    nodes = (batch, n, c_out)
    backward = rest[-2]
    return (
        x.new_empty(nodes),
        x.new_empty(nodes if backward else (0,), dtype=dtype),
        x.new_empty(nodes if backward else (0,), dtype=torch.uint8 if k <= 256 else torch.int32),
        x.new_empty((2, batch, n), dtype=torch.int32),
        x.new_empty((batch, x.shape[2]), dtype=dtype),
        x.new_empty((batch, c_mid), dtype=torch.float64),
        x.new_empty((c_mid,), dtype=torch.float64),
        x.new_empty((batch, c_out), dtype=torch.float64),
        x.new_empty((c_out,), dtype=torch.float64),
    )


def _fake_backward(grad, x, idx, weight1, gamma1, beta1, weight2, gamma2, *rest):
    need_x, need_weight1, need_weight2 = rest[-6:-3]
    dtype = _compute_dtype(x)

    def channels(weight):
        return (0,) if gamma1 is None else (weight.shape[0],)

    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight1.shape if need_weight1 else (0,), dtype=dtype),
        x.new_empty(channels(weight1), dtype=dtype),
        x.new_empty(channels(weight1), dtype=dtype),
        x.new_empty(weight2.shape if need_weight2 else (0,), dtype=dtype),
        x.new_empty(channels(weight2), dtype=dtype),
        x.new_empty(channels(weight2), dtype=dtype),
    )


_PARAMETERS = "Tensor weight1, Tensor? gamma1, Tensor? beta1, Tensor weight2, Tensor? gamma2, Tensor? beta2"
_SAVED = (
    "Tensor winner, Tensor slot, Tensor degrees, Tensor centre, Tensor offset1, Tensor rstd1, Tensor offset2, "
    "Tensor rstd2"
)
# first_known: also in training the first norm's statistics are those given; mean_term (B, C_out) and slope_term (C_out)
# float64: in training, what the second norm's statistics take from every edge, if not those of the batch, see
# docs/derivations/edge_conv2.md.
_library.define(
    f"edge_conv2(Tensor x, Tensor idx, {_PARAMETERS}, Tensor(a!)? running_mean1, Tensor(b!)? running_var1, "
    "Tensor(c!)? running_mean2, Tensor(d!)? running_var2, bool training, float momentum, float eps, "
    f"float negative_slope, bool backward, bool first_known) -> (Tensor out, {_SAVED})",
    _fake_forward,
)
_library.define(
    f"edge_conv2_backward(Tensor grad, Tensor x, Tensor idx, {_PARAMETERS}, {_SAVED}, bool training, "
    "float negative_slope, bool need_x, bool need_weight1, bool need_weight2, bool first_known, Tensor? mean_term, "
    "Tensor? slope_term) -> (Tensor grad_x, "
    "Tensor grad_weight1, Tensor grad_gamma1, Tensor grad_beta1, Tensor grad_weight2, Tensor grad_gamma2, "
    "Tensor grad_beta2)",
    _fake_backward,
)
_library.define_like("edge_conv2", "triton")
_library.define_like("edge_conv2_backward", "triton")
_gpu.implement("edge_conv2", "edge_conv2", "edge_conv2_backward")


class _EdgeConv2(torch.autograd.Function):
    @staticmethod
    def forward(
        x,
        idx,
        weight1,
        gamma1,
        beta1,
        weight2,
        gamma2,
        beta2,
        running_mean1,
        running_var1,
        running_mean2,
        running_var2,
        training,
        momentum,
        eps,
        negative_slope,
        backward,
        backend,
    ):
        return _dispatch.operator("edge_conv2", backend)(
            x,
            idx,
            weight1,
            gamma1,
            beta1,
            weight2,
            gamma2,
            beta2,
            running_mean1,
            running_var1,
            running_mean2,
            running_var2,
            training,
            momentum,
            eps,
            negative_slope,
            backward,
            False,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, idx, *parameters = inputs[:8]
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, idx, *parameters, *saved)
        ctx.training, ctx.negative_slope, ctx.backend = inputs[12], inputs[15], inputs[17]

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 18
        return *_gradients(ctx, grad, ctx.training, False, None, None), *(None,) * 10


class _RankEdgeConv2(torch.autograd.Function):
    """In training over several ranks: the first norm's statistics are given, the second's are exchanged here."""

    @staticmethod
    def forward(
        ctx,
        x,
        idx,
        weight1,
        gamma1,
        beta1,
        weight2,
        gamma2,
        beta2,
        mean1,
        var1,
        running_mean2,
        running_var2,
        momentum,
        eps,
        negative_slope,
        group,
        backend,
    ):
        inputs = (x, idx, weight1, gamma1, beta1, weight2, gamma2, beta2)
        options = (True, momentum, eps, negative_slope, True, True)
        out, winner, slot, degrees, centre, offset1, rstd1, offset2, rstd2 = _dispatch.operator(
            "edge_conv2", backend
        )(*inputs, mean1, var1, None, None, *options)
        sign = torch.where(gamma2 < 0, -1.0, 1.0).double()
        edges = degrees[0].sum(dtype=torch.float64)
        norm1, norm2 = (gamma1, beta1, offset1, rstd1), (sign * offset2, rstd2)
        share = _rank_norm.Share(edges, *_own_statistics(edges, norm1, weight2, norm2, negative_slope, eps))
        ctx.edges, mean, var = _rank_norm.whole_batch(
            share, running_mean2, running_var2, momentum=momentum, group=group
        )
        offset2, rstd2 = offset2 + sign * (share.mean - mean), torch.rsqrt(var + eps)
        ctx.group, ctx.negative_slope, ctx.backend = group, negative_slope, backend
        ctx.save_for_backward(*inputs, winner, slot, degrees, centre, offset1, rstd1, offset2, rstd2)
        z = F.leaky_relu_(_second_norm(winner, gamma2, beta2, offset2, rstd2), negative_slope)
        return out.copy_(z.masked_fill_((degrees[0] == 0)[..., None], 0))

    @staticmethod
    def backward(ctx, grad):
        _, _, _, _, _, _, gamma2, beta2, winner, _, degrees, _, _, _, offset2, rstd2 = ctx.saved_tensors
        from torch import distributed

        with torch.no_grad():
            z, g = _second_norm(winner, gamma2, beta2, offset2, rstd2), grad.to(winner.dtype)
            g = torch.where(z > 0, g, g * ctx.negative_slope)
            del z
            g.masked_fill_((degrees[0] == 0)[..., None], 0)
            by_shift = g.sum(1, dtype=torch.float64)  # of each cloud
            by_scale = (g.mul_(winner).sum(1, dtype=torch.float64) + offset2 * by_shift).sum(0) * rstd2
            sums = torch.stack([by_shift.sum(0), by_scale])
            del g
            distributed.all_reduce(sums, group=ctx.group)
            by_shift, by_scale = sums / ctx.edges.clamp_min(1)
            slope_term = by_scale * rstd2
            mean_term = by_shift + slope_term * offset2
        return *_gradients(ctx, grad, True, True, mean_term, slope_term), *(None,) * 9


def _second_norm(winner: Tensor, gamma: Tensor, beta: Tensor, offset: Tensor, rstd: Tensor) -> Tensor:
    """z of signed, centred values (B, N, C_out)."""
    scale = gamma.abs().double() * rstd
    shift = scale * offset + beta.double()
    return (winner * scale.to(winner.dtype)).add_(shift[:, None].to(winner.dtype))


def _own_statistics(
    edges: Tensor,
    norm1: tuple[Tensor, ...],
    weight2: Tensor,
    norm2: tuple[Tensor, Tensor],
    negative_slope: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The mean and the variance (C_out,) of h2 that the operator made of this rank's edges, float64; 0 without edges.
    The mean is what h2 of a cloud's pivot exceeds its offset by."""
    (gamma1, beta1, offset1, rstd1), (offset2, rstd2) = norm1, norm2
    if len(offset2) == 0:
        return torch.zeros_like(rstd2), torch.zeros_like(rstd2)
    z = gamma1.double() * offset1[0] * rstd1 + beta1.double()
    mean = weight2.double() @ torch.where(z > 0, z, negative_slope * z) - offset2[0]
    var = (rstd2**-2 - eps).clamp_min(0)
    return torch.where(edges > 0, mean, 0), torch.where(edges > 0, var, 0)


def _gradients(
    ctx,
    grad: Tensor,
    training: bool,
    first_known: bool,
    mean_term: Tensor | None,
    slope_term: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Of x, idx and the parameters, in their dtypes; None where not needed."""
    tensors = ctx.saved_tensors
    need_x, _, *need = ctx.needs_input_grad[:8]
    options = (training, ctx.negative_slope, need_x, need[0], need[3], first_known, mean_term, slope_term)
    grad_x, *gradients = _EdgeConv2Backward.apply(grad, *tensors, *options, ctx.backend)
    wanted = (
        gradient.to(parameter.dtype) if needed else None
        for gradient, parameter, needed in zip(gradients, tensors[2:8], need, strict=True)
    )
    return (grad_x if need_x else None, None, *wanted)


class _EdgeConv2Backward(torch.autograd.Function):
    """The backward pass, which has no derivative: it says so instead of giving zeros."""

    @staticmethod
    def forward(
        grad,
        x,
        idx,
        weight1,
        gamma1,
        beta1,
        weight2,
        gamma2,
        beta2,
        winner,
        slot,
        degrees,
        centre,
        offset1,
        rstd1,
        offset2,
        rstd2,
        training,
        negative_slope,
        need_x,
        need_weight1,
        need_weight2,
        first_known,
        mean_term,
        slope_term,
        backend,
    ):
        return _dispatch.operator("edge_conv2_backward", backend)(
            grad,
            x,
            idx,
            weight1,
            gamma1,
            beta1,
            weight2,
            gamma2,
            beta2,
            winner,
            slot,
            degrees,
            centre,
            offset1,
            rstd1,
            offset2,
            rstd2,
            training,
            negative_slope,
            need_x,
            need_weight1,
            need_weight2,
            first_known,
            mean_term,
            slope_term,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the second derivative of edge_conv2 is not supported; impl='reference' differentiates any number "
            "of times"
        )


_dispatch.register("edge_conv2", "edge_conv2", "edge_conv2_backward")
