"""Devices by the name that a user gives."""

from __future__ import annotations

import torch

__all__ = ["resolve_device"]


def resolve_device(name: str) -> torch.device:
    """The first GPU, else the CPU, for "auto"; else the torch device of that name, which must exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto' or a torch device such as 'cuda:0', got {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count <= (device.index or 0):
            raise ValueError(
                f"device {name!r} does not exist: torch {torch.__version__} sees {count} CUDA devices"
            )
        device = torch.device("cuda", device.index or 0)
    return device
