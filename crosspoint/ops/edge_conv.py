"""EdgeConv: convolution on edges, batch norm over all edges, LeakyReLU and maximum over neighbours, fused.

    y_i = max over the edges (i, j) of leaky_relu(batch_norm(weight @ [x_j - x_i, x_i]))

The same in plain PyTorch; conv is `nn.Conv2d(2 * C_in, C_out, 1, bias=False)`, bn `nn.BatchNorm2d(C_out)`:

    neighbours = x[torch.arange(B)[:, None, None], idx]                      # (B, N, k, C_in)
    centres = x[:, :, None].expand_as(neighbours)
    edges = torch.cat([neighbours - centres, centres], -1).permute(0, 3, 1, 2)
    y = F.leaky_relu(bn(conv(edges)), negative_slope).max(-1).values.transpose(1, 2)

Here no tensor with both an edge axis and a channel axis is ever stored. With weight = [A | B], an edge
carries A x_j + (B - A) x_i: two products over nodes, then a gather of the first one's rows. Norm and
activation are monotonic, so the maximum is taken before them. Mean and variance over all edges, and the
dense terms of their gradient, follow from the sums over each node's edges in either direction. Clouds are
centred first, and the variance adds scatter within clouds to scatter between them, so that points far from
the origin lose nothing.

Memory beside inputs, output and gradients, in elements of 4 bytes (8 for float64), with M = B N C_out. Kept
for the backward pass: 3.25 M in training, 1.25 M otherwise (up to three sums and a slot byte per output; a
slot takes 4 bytes if k > 256). While running, per thread N (C_in + 128); forward, in training, B N (k + 2);
backward 2 min(B, 16) C_in C_out, and B N C_in for each further part of the channels where fewer than 16
clouds share the work. Half types are widened: add a float32 copy of x, out and its gradient. Without
gradients nothing is kept. On a GPU statistics come from sums over nodes in input space: kept are 1.25 M, in
training B N C_in more; while running, forward 2 M + 2 B N C_in + 3 B ceil(N / 256) C_in^2, backward
2 M + 6 B N C_in and the graph turned around, B N k.

Several processes (`group`): the statistics are those of all ranks' edges. Each rank forms its share from sums over
nodes in input space, in float64 on every backend; one gather of 2 C_out + 1 numbers forward (and one of C_in, so
that all take the same constant from x) and one sum of 2 C_out backward make the whole batch's of them. Kept for the
backward pass are 1.25 M + B N C_in; while running, either pass takes
about 10 B N C_in more (float64), and backward the graph turned around. torch.compile breaks its graph at the exchange.

Dynamic Graph CNN for Learning on Point Clouds, arXiv 1801.07829.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosspoint.ops import _dispatch, _gpu, _library, _rank_norm, reference
from crosspoint.ops._checks import FLOATS, check_norm, compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["edge_conv"]


def edge_conv(
    x: Tensor,
    idx: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """max over the neighbours j of i of leaky_relu(batch_norm(weight @ [x_j - x_i, x_i])).

    Edges whose index is -1 do not exist, neither in the maximum nor in the statistics; a node without any
    gives 0 and takes no gradient. Of edges that tie, the lowest slot wins; where gamma is 0 all edges tie.
    NaN wins over every number, as in `torch.max`. Results are bitwise the same from run to run and for any
    number of threads.

    Args:
        x: (B, N, C_in), float64, float32, float16 or bfloat16. Half types are computed in float32. Under
            autocast it is cast to autocast's dtype first (float64 stays).
        idx: (B, N, k) int64: the neighbours of each node, rows of the same cloud, or -1.
        weight: (C_out, 2 C_in), its columns for [x_j - x_i, x_i].
        gamma, beta: (C_out,), the affine parameters of the norm; both None: no norm.
        running_mean, running_var: (C_out,), or both None. Updated in place when training, as by
            `nn.BatchNorm2d` (an empty batch leaves them alone); the statistics to use otherwise.
        training: whether the statistics are those of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        negative_slope: of the LeakyReLU, >= 0; 0 is ReLU.
        group: a process group of torch.distributed: when training, the statistics are those of the edges of all its
            ranks, each with its own B and N (0 too) of one C_out. Ranks must call in the same order, forward and
            backward; gradients are those of the sum of what the ranks differentiate, each rank's own part.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        (B, N, C_out) in the dtype of x (or autocast's). Differentiable once in x, weight, gamma and beta.

    Raises:
        ValueError, TypeError: for shapes, dtypes and options; ValueError also when training with a single
            value per channel, as in PyTorch (with a group, a rank may have one), and where this process is not in
            the group.
        RuntimeError: for evaluation with a norm but without running statistics, as in PyTorch.
        IndexError: for an entry of idx that is neither -1 nor in [0, N).
    """
    over_ranks = _rank_norm.spans_ranks("edge_conv", group) and training and gamma is not None
    _check(x, idx, weight, gamma, beta, running_mean, running_var, training, negative_slope, over_ranks)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    backend = _dispatch.choose("edge_conv", impl, x.device)
    if backend == "reference":
        with torch.autocast(device, enabled=False):
            return reference.edge_conv(
                x,
                idx,
                weight,
                gamma,
                beta,
                running_mean,
                running_var,
                training=training,
                momentum=momentum,
                eps=eps,
                negative_slope=negative_slope,
                group=group if over_ranks else None,
            )
    if over_ranks:
        with torch.autocast(device, enabled=False):
            x, share = _rank_norm.of_edges(x, idx, weight, group)
            gamma, beta, running_mean, running_var = _rank_norm.over_ranks(
                x, gamma, beta, running_mean, running_var, share, momentum=momentum, eps=eps, group=group
            )
        training = False
    return _EdgeConv.apply(
        x,
        idx,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        negative_slope,
        torch.is_grad_enabled(),
        backend,
    )[0]


def _check(
    x: Tensor,
    idx: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    negative_slope: float,
    over_ranks: bool,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"edge_conv: x must be (B, N, C_in), got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"edge_conv: x must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if idx.dtype != torch.int64:
        raise TypeError(f"edge_conv: idx must be int64, got {idx.dtype}; use idx.long()")
    if idx.dim() != 3 or idx.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"edge_conv: idx must be (B, N, k) = ({x.shape[0]}, {x.shape[1]}, k), as x is {tuple(x.shape)}; "
            f"got shape {tuple(idx.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != 2 * x.shape[2]:
        raise ValueError(
            f"edge_conv: weight must be (C_out, 2 C_in) = (C_out, {2 * x.shape[2]}), got shape "
            f"{tuple(weight.shape)}; of a 1x1 Conv2d, pass conv.weight.flatten(1)"
        )
    if idx.device != x.device:
        raise ValueError(f"edge_conv: idx is on {idx.device}, but x is on {x.device}")
    check_norm(
        "edge_conv",
        x,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        training=training,
        values=None if over_ranks else idx.numel(),
        negative_slope=negative_slope,
    )


def _fake_forward(x, *args):
    return _shapes(x, *args, gpu=x.device.type == "cuda")


def _fake_forward_gpu(*args):
    return _shapes(*args, gpu=True)


def _shapes(
    x,
    idx,
    weight,
    gamma,
    beta,
    running_mean,
    running_var,
    training,
    momentum,
    eps,
    negative_slope,
    backward,
    *,
    gpu,
):
    (batch, n, k), (c_out, c_in), dtype = idx.shape, (weight.shape[0], x.shape[2]), compute_dtype(x)
    nodes, none = (batch, n, c_out), (0,)
    sums = backward and training and gamma is not None
    return (
        x.new_empty(nodes),
        x.new_empty(nodes if backward else none, dtype=dtype),
        x.new_empty(nodes if backward else none, dtype=torch.uint8 if k <= 256 else torch.int32),
        x.new_empty(((batch, n, c_in) if gpu else nodes) if sums else none, dtype=dtype),
        x.new_empty(nodes if sums and not gpu else none, dtype=dtype),
        x.new_empty((2, batch, n), dtype=torch.int32),
        x.new_empty((batch, c_in), dtype=dtype),
        x.new_empty((batch, c_out), dtype=torch.float64),
        x.new_empty((c_out,), dtype=torch.float64),
        x.new_empty((2 * c_in + batch, 2 * c_in) if sums and gpu else none, dtype=torch.float64),
    )


def _fake_backward(grad, x, idx, weight, gamma, *rest):
    need_x, need_weight = rest[-2:]
    dtype = compute_dtype(x)
    channels = (0,) if gamma is None else (weight.shape[0],)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=dtype),
        x.new_empty(channels, dtype=dtype),
        x.new_empty(channels, dtype=dtype),
    )


_library.define(
    "edge_conv(Tensor x, Tensor idx, Tensor weight, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, float negative_slope, bool backward)"
    " -> (Tensor out, Tensor winner, Tensor slot, Tensor out_sum, Tensor in_sum, Tensor degrees, "
    "Tensor centre, Tensor offset, Tensor rstd, Tensor moments)",
    _fake_forward,
)
_library.define(
    "edge_conv_backward(Tensor grad, Tensor x, Tensor idx, Tensor weight, Tensor? gamma, Tensor? beta, "
    "Tensor winner, Tensor slot, Tensor out_sum, Tensor in_sum, Tensor degrees, Tensor centre, "
    "Tensor offset, Tensor rstd, Tensor moments, bool training, float negative_slope, bool need_x, "
    "bool need_weight)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_gamma, Tensor grad_beta)",
    _fake_backward,
)
_library.define_like("edge_conv", "triton", _fake_forward_gpu)
_library.define_like("edge_conv_backward", "triton")
_gpu.implement("edge_conv", "edge_conv", "edge_conv_backward")


class _EdgeConv(torch.autograd.Function):
    @staticmethod
    def forward(
        x,
        idx,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        negative_slope,
        backward,
        backend,
    ):
        return _dispatch.operator("edge_conv", backend)(
            x,
            idx,
            weight,
            gamma,
            beta,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            negative_slope,
            backward,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, idx, weight, gamma, beta, _, _, training, _, _, negative_slope, _, backend = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, idx, weight, gamma, beta, *saved)
        ctx.training, ctx.negative_slope, ctx.backend = training, negative_slope, backend

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 13
        x, idx, weight, gamma, beta, *saved = ctx.saved_tensors
        need_x, _, need_weight, need_gamma, need_beta = ctx.needs_input_grad[:5]
        grad_x, grad_weight, grad_gamma, grad_beta = _EdgeConvBackward.apply(
            grad,
            x,
            idx,
            weight,
            gamma,
            beta,
            *saved,
            ctx.training,
            ctx.negative_slope,
            need_x,
            need_weight,
            ctx.backend,
        )
        return (
            grad_x if need_x else None,
            None,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_gamma.to(gamma.dtype) if need_gamma else None,
            grad_beta.to(beta.dtype) if need_beta else None,
            *(None,) * 8,
        )


class _EdgeConvBackward(torch.autograd.Function):
    """The backward pass, which has no derivative: it says so instead of giving zeros."""

    @staticmethod
    def forward(
        grad,
        x,
        idx,
        weight,
        gamma,
        beta,
        winner,
        slot,
        out_sum,
        in_sum,
        degrees,
        centre,
        offset,
        rstd,
        moments,
        training,
        negative_slope,
        need_x,
        need_weight,
        backend,
    ):
        return _dispatch.operator("edge_conv_backward", backend)(
            grad,
            x,
            idx,
            weight,
            gamma,
            beta,
            winner,
            slot,
            out_sum,
            in_sum,
            degrees,
            centre,
            offset,
            rstd,
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
            "the second derivative of edge_conv is not supported; impl='reference' differentiates any number "
            "of times"
        )


_dispatch.register("edge_conv", "edge_conv", "edge_conv_backward")
