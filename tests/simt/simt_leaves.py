"""Leaves of an orchestrator in the harness: each is called on CPU tensors, as the operator of its name on a GPU's."""

from __future__ import annotations

import torch
from torch import Tensor

from simt_harness import Device


class SimtLeaves:
    """Copies tensors that are given to the harness, and those that are filled back."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def run(
        self, function: str, *arguments, given: tuple[Tensor, ...] = (), filled: tuple[Tensor, ...] = ()
    ) -> None:
        """Tensors in `given` hold values and are read only, those in `filled` are written; of what is in both, what
        the kernel is given lies in the output."""
        buffers = {}

        def place(argument):
            if not isinstance(argument, Tensor):
                return argument
            values = bits_of(argument).numpy()
            if any(argument is t for t in filled):
                both = any(argument is t for t in given)
                buffer = (
                    self.device.input(values, written=True)
                    if both
                    else self.device.output(values.shape, values.dtype)
                )
                buffers[id(argument)] = (argument, buffer)
                return buffer
            return self.device.input(values)

        try:
            self.device.call(function, *map(place, arguments))
            for tensor, buffer in buffers.values():
                bits_of(tensor).copy_(torch.from_numpy(buffer.copy()))
        finally:
            self.device.free()


def bits_of(x: Tensor) -> Tensor:
    """numpy has no bfloat16."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x
