"""Checks of tensors that several operators share; those that arrays share too are in crosspoint._check."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from crosspoint import _check

__all__ = [
    "FLOATS",
    "check_embeddings",
    "check_lengths",
    "check_neighbours",
    "check_norm",
    "check_temperature",
    "compute_dtype",
]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_lengths(op: str, name: str, lengths: Tensor | None, of: str, x: Tensor) -> Tensor | None:
    """`lengths` as int64: one number per cloud of `x` (B, ...), which the caller names `of`."""
    if lengths is None:
        return None
    _check.lengths_shape(op, name, lengths.shape, of, x.shape)
    if lengths.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} must be integers, got {lengths.dtype}; convert it with .long()")
    if lengths.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {lengths.device}, {of} on {x.device}; move it with .to({of}.device)"
        )
    return lengths.long()


def check_neighbours(op: str, x: Tensor, idx: Tensor) -> None:
    """x (B, N, C) of a floating dtype, idx (B, M, k) int64 on the same device."""
    _check.points_shape(op, "x", x.shape)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if idx.dtype != torch.int64:
        raise TypeError(f"{op}: idx must be int64, got {idx.dtype}; use idx.long()")
    _check.graph_shape(op, idx.shape, x.shape)
    if idx.device != x.device:
        raise ValueError(f"{op}: idx is on {idx.device}, but x is on {x.device}")


def check_norm(
    op: str,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    values: int | None,
    negative_slope: float,
    layer: str = "",
) -> None:
    """The weight (C_out, ...), norm and activation that follow a product with x; `values`: of a channel, if known.

    `layer` ends the names of the arguments in messages.
    """
    for (first, one), (second, other) in (
        (("gamma", gamma), ("beta", beta)),
        (("running_mean", running_mean), ("running_var", running_var)),
    ):
        if (one is None) != (other is None):
            given, missing = (second, first) if one is None else (first, second)
            raise ValueError(
                f"{op}: {first}{layer} and {second}{layer} go together: got {given}{layer} but {missing}{layer} is None"
            )
    tensors = {
        "weight": weight,
        "gamma": gamma,
        "beta": beta,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name != "weight" and tensor.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: {name}{layer} must be (C_out,) = ({weight.shape[0]},), got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in FLOATS or (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(
                f"{op}: {name}{layer} is {tensor.dtype} and x is {x.dtype}; all tensors must be float64, or "
                "none of them (float32, float16 and bfloat16 mix)"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name}{layer} is on {tensor.device}, but x is on {x.device}")
    if not negative_slope >= 0:
        raise ValueError(
            f"{op}: negative_slope must be >= 0, got {negative_slope}; the maximum is taken before the "
            "activation, which must not decrease"
        )
    if gamma is None:
        return
    if training and values == 1:
        raise ValueError(
            f"{op}: expected more than 1 value per channel when training, got one in all; "
            "use training=False, which takes the running statistics"
        )
    if not training and running_mean is None:
        raise RuntimeError(
            f"{op}: running_mean{layer} and running_var{layer} must be given in evaluation mode; pass them, or "
            "training=True to use the statistics of this batch"
        )


def check_graph(op: str, idx: Tensor, n: int) -> None:
    """Where CROSSPOINT_CHECK=1 asks for it, at the price of waiting for the device: an IndexError for an entry of
    idx (B, N, k) that is neither -1 nor in [0, n). Otherwise kernels take such an entry for no edge."""
    if os.environ.get("CROSSPOINT_CHECK") != "1":
        return
    wrong = ((idx < -1) | (idx >= n)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise IndexError(
            f"{op}: idx{place} is {idx[tuple(place)].item()}, but it must be -1 (no edge) or in [0, {n}), a row of x"
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays; float32 and the half types are computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_embeddings(op: str, name: str, z: Tensor) -> None:
    """Embeddings must be (N, D) and floating."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {z.dtype}; convert it with .float()")
    if z.dim() != 2:
        raise ValueError(f"{op}: {name} must be (N, D), got {z.dim()} dimensions: {tuple(z.shape)}")


def check_temperature(op: str, temperature: float | Tensor, z: Tensor) -> Tensor:
    """The temperature as a scalar tensor on z's device, of the dtype that is computed in."""
    dtype = compute_dtype(z)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"{op}: temperature must have one element, got shape {tuple(temperature.shape)}")
        if not temperature.is_floating_point():
            raise TypeError(f"{op}: temperature must have a floating dtype, got {temperature.dtype}")
        return temperature.reshape(()).to(z.device, dtype)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"{op}: temperature must be a float or a one-element tensor, got {type(temperature).__name__}"
        )
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    return torch.full((), temperature, dtype=dtype, device=z.device)
