"""DGCNN code on (B, C, N) tensors: its helper functions, its blocks and whole models, on the fused operators.

The calls are those of antao97's dgcnn.pytorch; the original (WangYueFt) and CrossPoint's code share them.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspoint.interop._blocks import CannotFuse, max_over_edges, read_block
from crosspoint.ops import knn_graph

__all__ = ["CannotFuse", "fuse", "fused_edge_conv", "get_graph_feature", "knn"]

_EDGE_BLOCKS = ("conv1", "conv2", "conv3", "conv4")
_BACKBONE = {*_EDGE_BLOCKS, "conv5", "bn1", "bn2", "bn3", "bn4", "bn5"}
_CLASSIFIER = {"linear1", "bn6", "dp1", "linear2", "bn7", "dp2", "linear3"}
_CLOSE = 1e-6  # of the largest value, in float64


def knn(x: Tensor, k: int, *, impl: str = "auto") -> Tensor:
    """The k nearest points of each point, itself first.

    Signature of `knn` in dgcnn.pytorch. The same: x (B, C, N) -> (B, N, k) int64, nearest first. Different:
    distances are squared differences instead of |a|^2 - 2ab + |b|^2, which cancels far from the origin; equal
    ones go by index; half types compute in float32. k > N raises, as there.

    Memory: as `crosspoint.ops.knn_graph`; there, three N x N matrices per cloud.
    """
    x = _as_clouds("knn", x)
    if k > x.shape[2]:
        raise ValueError(f"knn: k = {k} neighbours of clouds with {x.shape[2]} points; choose k <= N")
    return knn_graph(x.transpose(1, 2), k, impl=impl)


def get_graph_feature(
    x: Tensor, k: int = 20, idx: Tensor | None = None, dim9: bool = False, *, impl: str = "auto"
) -> Tensor:
    """The edge features [x_j - x_i, x_i] as a tensor.

    Signature and values of `get_graph_feature` in dgcnn.pytorch, on x's own device (there, CUDA only).

    Args:
        x: (B, C, N), floating point; (B, C, N, 1) too.
        k: neighbours; with idx, its last size.
        idx: (B, N, k) int64, or None for the k nearest, each point among its own.
        dim9: search by the channels from the seventh on, as for S3DIS.
        impl: backend of the search.

    Returns:
        (B, 2 C, N, k), differentiable in x.

    Memory: the result and the gathered neighbours, 3 B C N k elements; no N x N matrix. `fused_edge_conv` does
    without them.
    """
    x = _as_clouds("get_graph_feature", x)
    idx = _neighbours("get_graph_feature", x[:, 6:] if dim9 else x, k, idx, impl)
    points = x.transpose(1, 2)
    neighbours = points[torch.arange(len(x), device=x.device)[:, None, None], idx]  # (B, N, k, C)
    centres = points[:, :, None].expand_as(neighbours)
    return torch.cat([neighbours - centres, centres], dim=3).permute(0, 3, 1, 2)


def fused_edge_conv(
    block: nn.Module, x: Tensor, k: int = 20, idx: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """`block(get_graph_feature(x, k, idx)).max(dim=-1)[0]`, fused: for one block in code of your own.

    The same values, gradients and running statistics as that line, and the parameters stay the block's. Of
    neighbours that tie for the maximum, the first takes the gradient.

    Args:
        block: `nn.Sequential(Conv2d, BatchNorm2d, LeakyReLU)`; the norm, the activation or both may be missing,
            ReLU may stand for LeakyReLU, and Conv2d, 1 x 1, may have a bias.
        x, k, idx: as for `get_graph_feature`.
        impl: backend of `crosspoint.ops.edge_conv` and of the search.

    Returns:
        (B, C_out, N).

    Raises:
        CannotFuse: for any other block; the message says why.

    Memory: what `crosspoint.ops.edge_conv` keeps; nothing with an edge axis and a channel axis.
    """
    parts = read_block(block, nn.Conv2d, nn.BatchNorm2d)
    _check_pointwise(block if isinstance(block, nn.Conv2d) else block[0])
    x = _as_clouds("fused_edge_conv", x)
    weight = parts.weight.flatten(1)
    if weight.shape[1] != 2 * x.shape[1]:
        raise ValueError(
            f"fused_edge_conv: block takes {weight.shape[1]} channels, but edges have 2 * {x.shape[1]}"
        )
    idx = _neighbours("fused_edge_conv", x, k, idx, impl)
    return max_over_edges(x.transpose(1, 2), idx, weight, parts, impl).transpose(1, 2)


def fuse(model: nn.Module, *, verify: bool = True, impl: str = "auto") -> nn.Module:
    """Make a DGCNN classifier or encoder compute its edge convolutions fused; same weights, same output.

    The structures that are recognised, by their attributes:

    * `conv1` to `conv4`: each a block of `fused_edge_conv`, on the k-NN graph of its own input; `k`, an int;
    * `conv5`: a Sequential from Conv1d, on the outputs of the four side by side, then the global maximum and
      the global mean side by side;
    * `linear1`, `bn6`, `dp1`, `linear2`, `bn7`, `dp2`, `linear3`: the classifier, with LeakyReLU 0.2 after each
      norm; and / or `inv_head`, CrossPoint's head, with which the model returns (logits or feature, projection,
      feature); and no other modules.

    These are WangYueFt's and antao97's `DGCNN` and `DGCNN_cls` and CrossPoint's `DGCNN`. Segmentation models
    (`DGCNN_partseg`, `DGCNN_semseg`) have two layers on edges before the maximum, which are not computed exactly
    by one fused layer: they are refused, and their last block alone can use `fused_edge_conv`.

    The model itself is changed and returned: its class becomes a subclass of its class with a forward of ours.
    Modules, parameters, buffers, state_dict keys and hooks on the model stay as they are; optimisers,
    DataParallel, copy and pickle go on working. A model that is already fused is returned as it is.

    Args:
        model: as above, on any device.
        verify: before anything is changed, run a float64 copy of the model and of the fused one on random
            clouds, in training and evaluation, and compare outputs, gradients and buffers. Its own forward has
            to run for that: where its `get_graph_feature` names a device that is not here, replace that
            function by this module's, or pass False.
        impl: backend of the operators.

    Raises:
        CannotFuse: the structure is another, or its results are; the message says what differed.
    """
    if isinstance(model, _Fused):
        return model
    _check_structure(model)
    fused = _fused_class(type(model))
    if verify:
        _check_results(model, fused)
    model.__class__ = fused
    model.fused_impl = impl
    return model


class _Fused:
    """The forward of a fused model, before its own class in the order of look-up."""

    original: type[nn.Module]
    fused_impl = "auto"

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        stages = []
        for name in _EDGE_BLOCKS:
            x = fused_edge_conv(getattr(self, name), x, self.k, impl=self.fused_impl)
            stages.append(x)
        x = self.conv5(torch.cat(stages, dim=1))
        feature = torch.cat([F.adaptive_max_pool1d(x, 1), F.adaptive_avg_pool1d(x, 1)], dim=1).squeeze(2)
        result = self._classify(feature) if hasattr(self, "linear1") else feature
        return (result, self.inv_head(feature), feature) if hasattr(self, "inv_head") else result

    def _classify(self, feature: Tensor) -> Tensor:
        x = self.dp1(F.leaky_relu(self.bn6(self.linear1(feature)), 0.2))
        return self.linear3(self.dp2(F.leaky_relu(self.bn7(self.linear2(x)), 0.2)))

    def __reduce_ex__(self, protocol):
        return _new, (self.original,), self.__dict__


@functools.cache
def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    body = {"original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(f"Fused{original.__name__}", (_Fused, original), body)


def _new(original: type[nn.Module]) -> nn.Module:
    fused = _fused_class(original)
    return fused.__new__(fused)


def _as_clouds(name: str, x: Tensor) -> Tensor:
    if x.dim() == 4 and x.shape[3] == 1:
        x = x.squeeze(3)
    if x.dim() != 3:
        raise ValueError(f"{name}: x must be (B, C, N), got shape {tuple(x.shape)}")
    return x


def _neighbours(name: str, x: Tensor, k: int, idx: Tensor | None, impl: str) -> Tensor:
    if idx is None:
        return knn(x, k, impl=impl)
    if idx.shape != (x.shape[0], x.shape[2], k) or idx.dtype != torch.int64:
        raise ValueError(
            f"{name}: idx must be (B, N, k) = ({x.shape[0]}, {x.shape[2]}, {k}) int64, got {tuple(idx.shape)} "
            f"{idx.dtype}; k is an argument of its own"
        )
    return idx


def _check_pointwise(conv: nn.Conv2d) -> None:
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding not in ((0, 0), "valid", "same"):
        raise CannotFuse(f"{conv} is not 1 x 1 with stride 1 and no padding")
    if conv.groups != 1:
        raise CannotFuse(f"{conv} works in groups of channels")


def _check_structure(model: nn.Module) -> None:
    name = type(model).__name__
    children = {child for child, _ in model.named_children()}
    missing = [child for child in (*_EDGE_BLOCKS, "conv5") if child not in children]
    if missing:
        raise CannotFuse(f"{name} has no {', '.join(missing)}: not a structure that fuse() recognises")
    if not isinstance(getattr(model, "k", None), int):
        raise CannotFuse(f"{name} has no attribute k, the number of neighbours")
    widths = []
    for block in _EDGE_BLOCKS:
        convs = [m for m in getattr(model, block).modules() if isinstance(m, nn.Conv2d)]
        if widths and convs and convs[0].in_channels == widths[-1]:
            raise CannotFuse(
                f"{name}: {block} works on the edges of the block before it, as in DGCNN_partseg and DGCNN_semseg. "
                "Two layers before the maximum are not one fused layer; for a block of one layer there is "
                "crosspoint.interop.dgcnn.fused_edge_conv"
            )
        try:
            weight = read_block(getattr(model, block), nn.Conv2d, nn.BatchNorm2d).weight
        except CannotFuse as reason:
            raise CannotFuse(f"{name}.{block}: {reason}") from None
        _check_pointwise(convs[0])
        if widths and weight.shape[1] != 2 * widths[-1]:
            raise CannotFuse(f"{name}.{block} takes {weight.shape[1]} channels, not 2 * {widths[-1]}")
        widths.append(weight.shape[0])
    conv5 = next(model.conv5.children(), model.conv5)
    if not isinstance(conv5, nn.Conv1d) or conv5.in_channels != sum(widths):
        raise CannotFuse(f"{name}.conv5 does not begin with a Conv1d on {sum(widths)} channels")
    heads = children - _BACKBONE
    if not heads:
        raise CannotFuse(f"{name} has neither a classifier (linear1 to linear3) nor inv_head")
    if heads not in (_CLASSIFIER, {"inv_head"}, _CLASSIFIER | {"inv_head"}):
        odd = sorted(heads ^ _CLASSIFIER if heads & _CLASSIFIER else heads - {"inv_head"})
        raise CannotFuse(
            f"{name}: {', '.join(odd)} too many or missing, compared with the structures of fuse()"
        )


@torch.enable_grad()
def _check_results(model: nn.Module, fused: type[nn.Module]) -> None:
    name = type(model).__name__
    try:
        theirs = copy.deepcopy(model).double()
    except Exception as error:
        raise CannotFuse(
            f"{name} cannot be copied for the comparison ({error}); verify=False leaves it out"
        ) from error
    ours = copy.deepcopy(theirs)
    ours.__class__ = fused
    device = next(theirs.parameters()).device
    clouds = torch.randn(
        4,
        next(m for m in theirs.conv1.modules() if isinstance(m, nn.Conv2d)).in_channels // 2,
        max(32, 2 * theirs.k),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    for training in (True, False):
        mode = "training" if training else "evaluation"
        try:
            expected = _run(theirs.train(training), clouds)
        except Exception as error:
            raise CannotFuse(
                f"{name}: its own forward does not run on {device} for the comparison ({type(error).__name__}: "
                f"{error}). If its get_graph_feature names a device, put crosspoint.interop.dgcnn."
                "get_graph_feature in its place; verify=False leaves the comparison out"
            ) from error
        actual = _run(ours.train(training), clouds)
        if actual.keys() != expected.keys():
            odd = ", ".join(sorted(actual.keys() ^ expected.keys()))
            raise CannotFuse(
                f"{name}: in {mode} only one of its forward and the recognised structure's gives {odd}"
            )
        # Gradients that cancel, as of a bias before a norm, are rounding of the others.
        floor = 1e-4 * max(g.abs().max() for what, g in expected.items() if what.startswith("gradient"))
        for what, value in expected.items():
            same_shape = actual[what].shape == value.shape
            scale = torch.maximum(value.abs().max(), floor)
            if not same_shape or not (actual[what] - value).abs().max() <= _CLOSE * scale:
                by = f"by {(actual[what] - value).abs().max():.1e}, where values reach {scale:.1e}"
                raise CannotFuse(
                    f"{name}: in {mode} the {what} of its forward is not that of the recognised structure "
                    f"({by if same_shape else 'shapes differ'}); it computes something else"
                )


def _run(model: nn.Module, clouds: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one pass, dropout drawn alike."""
    x = clouds.clone().requires_grad_()
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(0)
        out = model(x)
    outputs = {f"output {i}": t for i, t in enumerate(out if isinstance(out, tuple | list) else (out,))}
    inputs = {"gradient of the input": x}
    inputs |= {f"gradient of {name}": p for name, p in model.named_parameters() if p.requires_grad}
    weights = [
        torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view_as(t) for t in outputs.values()
    ]
    loss = sum((t * w).sum() for t, w in zip(outputs.values(), weights, strict=True))
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(inputs, found, strict=True) if g is not None}
    buffers = {f"buffer {name}": b.double() for name, b in model.named_buffers() if b.numel()}
    return {name: t.detach().clone() for name, t in {**outputs, **gradients, **buffers}.items()}
