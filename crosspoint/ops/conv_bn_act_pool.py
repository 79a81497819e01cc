"""A shared linear map of points, batch norm, LeakyReLU, and each cloud's maximum and mean, fused.

    y = leaky_relu(batch_norm(x @ weight.T))        # (B, N, C_out)
    out = [max over n of y, mean over n of y]       # (B, 2 C_out)

The same in plain PyTorch; conv is `nn.Conv1d(C_in, C_out, 1, bias=False)`, bn `nn.BatchNorm1d(C_out)`:

    y = F.leaky_relu(bn(conv(x.transpose(1, 2))), negative_slope)            # (B, C_out, N)
    out = torch.cat([y.amax(-1), y.mean(-1)], 1)

This is what follows DGCNN's edge convolutions (512 -> 1024 on every point), where it is half of the work and
most of the memory. Here the product is stored once, and nothing else of its size: norm and activation are
monotonic, so the maximum is taken before them; the norm's statistics and both poolings are sums over rows; and
the gradient of the product exists 256 rows at a time, multiplied at once into the gradients of x and weight.

On a GPU even the product is not stored: its statistics come from the Gram matrix of x, and of every value one bit is
kept for the backward pass.

Memory on a CPU beside inputs, output and gradients, in elements of 4 bytes (8 for float64): B N C_out, kept for the
backward pass (in evaluation without gradients it does not exist). While running, forward 12 C_out per 256 rows,
backward 16 C_in C_out; either pass a copy of weight and, per thread, 256 (C_in + C_out). Half types are widened:
add a float32 copy of x and of its gradient.

Several processes (`group`): as in `edge_conv`, the statistics are those of all ranks' rows; each rank forms its share
from the Gram matrix of x, in float64.

Dynamic Graph CNN for Learning on Point Clouds, arXiv 1801.07829.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosspoint.ops import _dispatch, _gpu, _library, _rank_norm, reference
from crosspoint.ops._checks import FLOATS, check_lengths, check_norm, compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["conv_bn_act_pool"]


def conv_bn_act_pool(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each cloud's maximum and mean of leaky_relu(batch_norm(x @ weight.T)).

    Of rows that tie for a maximum, the first takes its gradient. NaN wins over every number, as in `torch.max`.
    Results are bitwise the same from run to run and for any number of threads.

    Args:
        x: (B, N, C_in), float64, float32, float16 or bfloat16. Half types are computed in float32. Under
            autocast it is cast to autocast's dtype first (float64 stays).
        weight: (C_out, C_in).
        gamma, beta: (C_out,), the affine parameters of the norm.
        running_mean, running_var: (C_out,), or both None. Updated in place when training, as by
            `nn.BatchNorm1d` (a batch without points leaves them alone); the statistics to use otherwise.
        lengths: valid points of each cloud, (B,), integers in [0, N]; all of them by default. The rows past
            them may hold anything: they reach no statistic, no pooling and no gradient. A cloud without
            points gives 0. They are not read on the host.
        training: whether the statistics are those of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        negative_slope: of the LeakyReLU, >= 0; 0 is ReLU.
        group: a process group of torch.distributed, whose ranks share batch statistics as in `edge_conv`.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        (B, 2 C_out) in the dtype of x (or autocast's): maxima, then means. Differentiable once in x, weight,
        gamma and beta.

    Raises:
        ValueError, TypeError: for shapes, dtypes and options; ValueError also when training with a single
            value per channel, as in PyTorch (with a group, a rank may have one), and where this process is not in
            the group.
        RuntimeError: for evaluation without running statistics, as in PyTorch.
        IndexError: a length is negative or exceeds N (compiled backends).
    """
    over_ranks = _rank_norm.spans_ranks("conv_bn_act_pool", group) and training
    lengths = _check(
        x,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        lengths,
        training=training,
        slope=negative_slope,
        over_ranks=over_ranks,
    )
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    backend = _dispatch.choose("conv_bn_act_pool", impl, x.device)
    if backend == "reference":
        with torch.autocast(device, enabled=False):
            return reference.conv_bn_act_pool(
                x,
                weight,
                gamma,
                beta,
                running_mean,
                running_var,
                lengths=lengths,
                training=training,
                momentum=momentum,
                eps=eps,
                negative_slope=negative_slope,
                group=group if over_ranks else None,
            )
    if over_ranks:
        with torch.autocast(device, enabled=False):
            x, share = _rank_norm.of_rows(x, weight, lengths, group)
            gamma, beta, running_mean, running_var = _rank_norm.over_ranks(
                x, gamma, beta, running_mean, running_var, share, momentum=momentum, eps=eps, group=group
            )
        training = False
    return _ConvBnActPool.apply(
        x,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        lengths,
        training,
        momentum,
        eps,
        negative_slope,
        torch.is_grad_enabled(),
        backend,
    )[0]


def _check(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    lengths: Tensor | None,
    *,
    training: bool,
    slope: float,
    over_ranks: bool,
) -> Tensor | None:
    """The lengths as int64."""
    if x.dim() != 3:
        raise ValueError(f"conv_bn_act_pool: x must be (B, N, C_in), got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"conv_bn_act_pool: x must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"conv_bn_act_pool: weight must be (C_out, C_in) = (C_out, {x.shape[2]}), got shape "
            f"{tuple(weight.shape)}; of a 1x1 Conv1d, pass conv.weight.flatten(1)"
        )
    if gamma is None or beta is None:
        raise TypeError("conv_bn_act_pool: gamma and beta must be tensors (C_out,), got None")
    check_norm(
        "conv_bn_act_pool",
        x,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        training=training,
        values=None if over_ranks else x.shape[0] * x.shape[1],
        negative_slope=slope,
    )
    return check_lengths("conv_bn_act_pool", "lengths", lengths, "x", x)


def _fake_forward(x, *args):
    return _shapes(x, *args, gpu=x.device.type == "cuda")


def _fake_forward_gpu(*args):
    return _shapes(*args, gpu=True)


def _shapes(
    x,
    weight,
    gamma,
    beta,
    running_mean,
    running_var,
    lengths,
    training,
    momentum,
    eps,
    negative_slope,
    backward,
    *,
    gpu,
):
    (batch, n, c_in), c_out, none = x.shape, weight.shape[0], (0,)
    product, product_dtype = (batch, n, c_out), compute_dtype(x)
    if gpu:
        product, product_dtype = (batch, n, (c_out + 31) // 32), torch.int32
    return (
        x.new_empty((batch, 2 * c_out)),
        x.new_empty(product if backward else none, dtype=product_dtype),
        x.new_empty((batch, c_out) if backward else none, dtype=torch.int32),
        x.new_empty((2, c_out), dtype=torch.float64),
        x.new_empty((2 + gpu, batch, c_out) if backward else none, dtype=torch.float64),
        x.new_empty((c_in * training + 1, c_in) if backward and gpu else none, dtype=torch.float64),
    )


def _fake_backward(grad, x, weight, *rest):
    need_x, need_weight = rest[-2:]
    dtype, channels = compute_dtype(x), weight.shape[:1]
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=dtype),
        x.new_empty(channels, dtype=dtype),
        x.new_empty(channels, dtype=dtype),
    )


# `product` is h on the CPU; on a GPU a bit of each of its values, and `moments` the Gram matrix of x and its centre.
_library.define(
    "conv_bn_act_pool(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? lengths, bool training, float momentum, float eps, float negative_slope, "
    "bool backward) -> (Tensor out, Tensor product, Tensor winner, Tensor statistics, Tensor slopes, Tensor moments)",
    _fake_forward,
)
_library.define(
    "conv_bn_act_pool_backward(Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor? lengths, "
    "Tensor product, Tensor winner, Tensor statistics, Tensor slopes, Tensor moments, bool training, "
    "float negative_slope, bool need_x, bool need_weight) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_gamma, "
    "Tensor grad_beta)",
    _fake_backward,
)
_library.define_like("conv_bn_act_pool", "triton", _fake_forward_gpu)
_library.define_like("conv_bn_act_pool_backward", "triton")
_gpu.implement("conv_bn_act_pool", "conv_bn_act_pool", "conv_bn_act_pool_backward")


class _ConvBnActPool(torch.autograd.Function):
    @staticmethod
    def forward(
        x,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        lengths,
        training,
        momentum,
        eps,
        negative_slope,
        backward,
        backend,
    ):
        return _dispatch.operator("conv_bn_act_pool", backend)(
            x,
            weight,
            gamma,
            beta,
            running_mean,
            running_var,
            lengths,
            training,
            momentum,
            eps,
            negative_slope,
            backward,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, gamma, beta, _, _, lengths, training, _, _, negative_slope, _, backend = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, gamma, beta, lengths, *saved)
        ctx.training, ctx.negative_slope, ctx.backend = training, negative_slope, backend

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 13
        x, weight, gamma, beta, lengths, *saved = ctx.saved_tensors
        need_x, need_weight, need_gamma, need_beta = ctx.needs_input_grad[:4]
        grad_x, grad_weight, grad_gamma, grad_beta = _ConvBnActPoolBackward.apply(
            grad,
            x,
            weight,
            gamma,
            beta,
            lengths,
            *saved,
            ctx.training,
            ctx.negative_slope,
            need_x,
            need_weight,
            ctx.backend,
        )
        return (
            grad_x if need_x else None,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_gamma.to(gamma.dtype) if need_gamma else None,
            grad_beta.to(beta.dtype) if need_beta else None,
            *(None,) * 9,
        )


class _ConvBnActPoolBackward(torch.autograd.Function):
    """The backward pass, which has no derivative: it says so instead of giving zeros."""

    @staticmethod
    def forward(
        grad,
        x,
        weight,
        gamma,
        beta,
        lengths,
        product,
        winner,
        statistics,
        slopes,
        moments,
        training,
        negative_slope,
        need_x,
        need_weight,
        backend,
    ):
        return _dispatch.operator("conv_bn_act_pool_backward", backend)(
            grad,
            x,
            weight,
            gamma,
            beta,
            lengths,
            product,
            winner,
            statistics,
            slopes,
            moments,
            training,
            negative_slope,
            need_x,
            need_weight,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the second derivative of conv_bn_act_pool is not supported; impl='reference' differentiates any "
            "number of times"
        )


_dispatch.register("conv_bn_act_pool", "conv_bn_act_pool", "conv_bn_act_pool_backward")
