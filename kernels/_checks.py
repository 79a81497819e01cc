"""Values that are looked at only where CROSSPOINT_CHECK=1 asks for it."""

from __future__ import annotations

import os

from torch import Tensor

__all__ = ["check_length_values"]


def check_length_values(name: str, lengths: Tensor | None, most: int) -> None:
    """Where CROSSPOINT_CHECK=1 asks for it, at the price of waiting for the device: an IndexError for a length outside
    [0, most]. Otherwise the kernels clamp them."""
    if lengths is None or os.environ.get("CROSSPOINT_CHECK") != "1":
        return
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= most:
            raise IndexError(f"{name}[{b}] is {length}: expected a number of points between 0 and {most}")
