"""Which backend runs a call: one table, filled once at import, that both chooses and explains."""

from __future__ import annotations

from typing import NamedTuple

import torch

from crosspoint.ops import _library

__all__ = ["IMPLS", "BackendRow", "choose", "describe_backends", "register"]

IMPLS = ("auto", "native", "triton", "reference")
_DEVICES = ("cpu", "cuda")

# (op, device type) -> {backend: None, or why it cannot run}, in the order that "auto" prefers
_table: dict[tuple[str, str], dict[str, str | None]] = {}


class BackendRow(NamedTuple):
    """One line of `describe_backends`: whether `backend` can run `op` on `device`, and if not, why."""

    op: str
    device: str
    backend: str
    usable: bool
    why: str


def register(op: str, *operators: str) -> None:
    """Enter public function `op` into the table; its native backend needs all `operators`."""
    for device in _DEVICES:
        _table[op, device] = {
            "native": _why_not_native(operators, device),
            "triton": _why_not_triton(op),
            "reference": None,
        }


def _why_not_native(operators: tuple[str, ...], device: str) -> str | None:
    if _library.load_error is not None:
        return _library.load_error
    if all(_library.has_kernel(name, device) for name in operators):
        return None
    return f"this build has no {device.upper()} kernels; use impl='reference' there"


def _why_not_triton(op: str) -> str | None:
    return f"{op} has no Triton kernel in this version"


def choose(op: str, impl: str, device: torch.device) -> str:
    """The backend that runs `op` on `device`: `impl` itself, or the first usable one for "auto"."""
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "reference":
        return impl
    rows = _table.get((op, device.type))
    if rows is None:
        if impl == "auto":
            return "reference"
        raise RuntimeError(
            f"{op}: impl={impl!r} has no kernels for {device.type} tensors; use impl='reference'"
        )
    if impl == "auto":
        for backend, why in rows.items():
            if why is None:
                return backend
    if rows[impl] is not None:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run on {device.type} tensors: {rows[impl]}")
    return impl


def describe_backends() -> list[BackendRow]:
    """Every op, device type and backend, with the reason where a backend cannot run."""
    return [
        BackendRow(op, device, backend, why is None, why or "usable")
        for (op, device), rows in _table.items()
        for backend, why in rows.items()
    ]
