"""Optimisation for batches of any size: the rate of a step, and LARS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from crosspoint.train.config import PretrainConfig

__all__ = ["LARS", "learning_rate", "make_optimizer"]

_BATCH = 20  # the authors': what `lr` is for where it is scaled
_SCALES = {"none": lambda times: 1.0, "linear": lambda times: times, "sqrt": math.sqrt}


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of a step, counted from 0: a cosine by epochs that would reach 0 one epoch after the last, and a line
    towards it in the epochs of warm-up."""
    epoch, warm_up = step // steps_per_epoch, config.warmup_epochs * steps_per_epoch
    rate = config.lr * _SCALES[config.lr_scaling](config.batch_size / _BATCH)
    rate *= 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    return rate * (step + 1) / warm_up if step < warm_up else rate


def make_optimizer(config: PretrainConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    if config.optimizer == "lars":
        return LARS(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on a tensor is in proportion to the tensor's norm (arXiv 1708.03888).

    With g the gradient plus weight_decay times w, a weight w moves along trust |w| / |g| g, so that large rates suit
    all layers alike. Vectors (biases, norms) take the gradient itself, without decay, as in SimCLR (arXiv 2002.05709).

    Args:
        params: tensors or groups of them.
        lr: the rate; in SimCLR 0.3 for each 256 samples of a batch.
        momentum: share of the former step that is kept.
        weight_decay: L2 penalty of weights.
        trust: length of a step over that of the weight, at a rate of 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        for name, value in values.items():
            if not value >= 0:
                raise ValueError(f"LARS: {name} must not be negative, got {value}")
        super().__init__(params, values)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)
        return loss

    def _move(self, weight: Tensor, change: Tensor, group: dict) -> None:
        if weight.dim() > 1:
            change = change.add(weight, alpha=group["weight_decay"])
            length, own = change.norm(), weight.norm()
            known = (length > 0) & (own > 0)  # decided where the tensors are: no waiting for a GPU
            change = change * torch.where(known, group["trust"] * own / length, 1.0)
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(group["momentum"]).add_(change)
        weight.add_(state["momentum"], alpha=-group["lr"])
