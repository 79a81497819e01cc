"""A step's kernels as one CUDA graph, where launching them one by one takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

__all__ = ["CapturedStep", "capture"]

_WARM_UP = 3  # calls before the capture, in which libraries choose their algorithms and allocate


class CapturedStep:
    """`function` of tensors of fixed shapes, captured at the first call and replayed from then on.

    What it leaves elsewhere (gradients, running statistics) is where the capture left it: a replay writes the same
    memory. Gradients must be None when the function begins, as after `optimizer.zero_grad(set_to_none=True)` within it.

    Args:
        function: of tensors, to a tensor; it must not wait for the device.
        model: whose buffers the warm-up must not change.
    """

    def __init__(self, function: Callable[..., Tensor], model: nn.Module) -> None:
        self._function, self._model = function, model
        self._inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Its result, in memory that the next call overwrites. Raises ValueError for other shapes than the first's."""
        if not self._inputs:
            self._inputs = [each.clone() for each in inputs]
            self._result, self._replay = capture(
                lambda: self._function(*self._inputs), self._model, inputs[0].device
            )
        shapes, expected = ([tuple(each.shape) for each in every] for every in (inputs, self._inputs))
        if shapes != expected:
            raise ValueError(f"a captured step takes tensors of shapes {expected}, got {shapes}")
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        with record_function("forward and backward"):
            self._replay()
        return self._result


def capture(
    function: Callable[[], Tensor], model: nn.Module, device: torch.device
) -> tuple[Tensor, Callable[[], None]]:
    """The tensor that `function` returns, and what fills it anew: the replay of a CUDA graph of all its kernels.

    The first replay draws the random numbers that a plain call would have drawn in place of this.
    """
    buffers = list(model.buffers())
    former = [buffer.clone() for buffer in buffers]
    with torch.cuda.device(device):  # streams are of the current one
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(aside)
        _restore(buffers, former)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's pins memory meanwhile, which a global capture forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
    return result, graph.replay


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
