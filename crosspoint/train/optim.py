"""Optimisation for batches of any size: the rate of a step, LARS and LAMB."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from crosspoint.train.config import PretrainConfig

__all__ = ["LAMB", "LARS", "learning_rate", "make_optimizer"]

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
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    kind = {"lars": LARS, "lamb": LAMB}[config.optimizer]
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay)


class _LayerWise(torch.optim.Optimizer):
    """The step on a matrix (or larger) is in proportion to its norm; vectors (biases, norms) are not scaled or decayed.

    No value is read on the host. A tensor that is sharded (DTensor) has the norm of the whole; norms take one exchange.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict], options: dict[str, float]):
        for name, value in options.items():
            if not value >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {value}")
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for alike in ([w for w in weights if w.dim() > 1], [w for w in weights if w.dim() <= 1]):
                if alike:
                    steps = torch._foreach_mul(self._directions(alike, group), group["lr"])
                    torch._foreach_sub_(_local(alike), steps)
        return loss

    @abstractmethod
    def _directions(self, weights: list[Tensor], group: dict) -> list[Tensor]:
        """Of each weight, what `lr` times of is taken away; all are matrices, or none is."""

    def _of(self, weights: list[Tensor], name: str) -> list[Tensor]:
        """What is kept of each weight under a name, zeros at first."""
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(weight)
        return _local([self.state[weight][name] for weight in weights])


def _scale(changes: list[Tensor], weights: list[Tensor], trust: float) -> None:
    """Give each change the length `trust` times its weight's, where neither is 0."""
    norms = torch.stack(torch._foreach_norm([*changes, *_local(weights)]))
    placed = {(w.device_mesh, w.placements) if _is_sharded(w) else None for w in weights}
    if len(placed) > 1:
        raise ValueError(
            "LARS and LAMB: all parameters must be sharded in one way, or none; make a group of parameters of each"
        )
    if (place := placed.pop()) is not None:
        from torch.distributed.tensor import DTensor, Partial

        mesh, placements = place
        summed = [Partial() if placement.is_shard() else placement for placement in placements]
        norms = DTensor.from_local(norms.double().square(), mesh, summed).full_tensor().sqrt()
    lengths, own = norms.chunk(2)
    known = (lengths > 0) & (own > 0)  # decided where the tensors are: no waiting for a GPU
    torch._foreach_mul_(changes, torch.where(known, trust * own / lengths, 1.0).unbind())


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """This process's parts."""
    return [tensor.to_local() if _is_sharded(tensor) else tensor for tensor in tensors]


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # a DTensor, whose module takes half a second to import


class LARS(_LayerWise):
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
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, options)

    def _directions(self, weights: list[Tensor], group: dict) -> list[Tensor]:
        changes = _local([weight.grad for weight in weights])
        if weights[0].dim() > 1:
            changes = torch._foreach_add(changes, _local(weights), alpha=group["weight_decay"])
            _scale(changes, weights, group["trust"])
        momentum = self._of(weights, "momentum")
        torch._foreach_mul_(momentum, group["momentum"])
        torch._foreach_add_(momentum, changes)
        return momentum


class LAMB(_LayerWise):
    """Adam whose step on a tensor is in proportion to the tensor's norm (arXiv 1904.00962).

    With r Adam's m / (sqrt(v) + eps), both without bias, plus weight_decay times w, a weight w moves along |w| / |r| r.
    Vectors (biases, norms) take Adam's step itself, without decay.

    Args:
        params: tensors or groups of them.
        lr: the rate, length of a step over that of the weight.
        beta1, beta2: shares of the former averages of gradients and of their squares that are kept.
        eps: added to the root of the squares' average.
        weight_decay: of weights, beside Adam's step.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < value < 1:
                raise ValueError(f"LAMB: {name} must be between 0 and 1, got {value}")
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)

    def _directions(self, weights: list[Tensor], group: dict) -> list[Tensor]:
        steps = []
        for weight in weights:
            state = self.state[weight]
            if "step" not in state:
                dtype = torch.promote_types(weight.dtype, torch.float32)
                state["step"] = torch.zeros((), dtype=dtype)
            state["step"] = state["step"].to(weight.device)  # load_state_dict leaves it where it was
            steps.append(state["step"])
        torch._foreach_add_(steps, 1)
        gradients = _local([weight.grad for weight in weights])
        average, squares = self._of(weights, "average"), self._of(weights, "squares")
        torch._foreach_lerp_(average, gradients, 1 - group["beta1"])
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["beta2"])
        roots = torch._foreach_div(squares, _unbias(group["beta2"], steps))
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        changes = torch._foreach_div(average, _unbias(group["beta1"], steps))
        torch._foreach_div_(changes, roots)
        if weights[0].dim() > 1:
            torch._foreach_add_(changes, _local(weights), alpha=group["weight_decay"])
            _scale(changes, weights, 1.0)
        return changes


def _unbias(beta: float, steps: list[Tensor]) -> list[Tensor]:
    """1 - beta^step: the weight that averages which began at 0 have gathered."""
    return [-torch.expm1(step * math.log(beta)) for step in steps]
