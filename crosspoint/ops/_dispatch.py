"""Which backend runs a call: one table, filled once at import, that both chooses and explains."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from crosspoint.ops import _library, _preferences

__all__ = [
    "IMPLS",
    "BackendRow",
    "Question",
    "add_backend",
    "asking",
    "backends",
    "choose",
    "describe_backends",
    "operator",
    "register",
    "why_not",
]

IMPLS = ("auto", "native", "triton", "reference")
_DEVICES = ("cpu", "cuda")
# What the GPU kernels need: bfloat16 on tensor cores, and copies to shared memory that run beside other work.
LEAST_CAPABILITY = (8, 0)

# (op, device type) -> {backend: None, or why it cannot run}, in the order that "auto" prefers
_table: dict[tuple[str, str], dict[str, str | None]] = {}
# (op, backend) -> f(**traits): None, or why this backend cannot run a call of these traits
_limits: dict[tuple[str, str], Callable[..., str | None]] = {}

# `asking.active = True` makes the next `choose` of this thread raise a Question instead of answering: `explain` hears
# from the public function itself what it would have asked.
asking = threading.local()


class BackendRow(NamedTuple):
    """One line of `describe_backends`: whether `backend` can run `op` on `device`, and if not, why."""

    op: str
    device: str
    backend: str
    usable: bool
    why: str


class Question(Exception):
    """What `choose` was asked; `explain` catches it."""

    def __init__(self, op: str, impl: str, device: torch.device, traits: dict[str, object]) -> None:
        self.op, self.impl, self.device, self.traits = op, impl, device, traits


def register(op: str, *operators: str, limits: dict[str, Callable[..., str | None]] | None = None) -> None:
    """Enter public function `op` into the table; its native backend needs all `operators`.

    `limits` names, per backend, what depends on the call: a function of the traits that the public function hands to
    `choose` (dtype, k, ...), which returns None or why this backend cannot run such a call.
    """
    for device in _DEVICES:
        rows = {
            "native": _why_not_native(operators, device),
            "triton": _why_not_triton(op, operators, device),
            "reference": None,
        }
        _table[op, device] = {backend: rows[backend] for backend in _preferences.order(op, device)}
    for backend, limit in (limits or {}).items():
        _limits[op, backend] = limit


def add_backend(backend: str, op: str, device: str, why_not: str | None = None) -> None:
    """Enter another backend of `op` on a type of device, behind those that are there; `why_not`: that it cannot run."""
    rows = _table[op, device]
    reference = rows.pop("reference")
    rows.update({backend: why_not, "reference": reference})


def backends(op: str, device: str) -> tuple[str, ...]:
    """What `impl` may name for such tensors beside "auto", in the order that "auto" prefers."""
    return tuple(_table.get((op, device), IMPLS[1:]))


def operator(name: str, backend: str) -> Callable:
    """The operator by which a backend does `name`: crosspoint::name is native, crosspoint::name_B is that of B."""
    return getattr(torch.ops.crosspoint, name if backend == "native" else f"{name}_{backend}")


def _why_not_native(operators: tuple[str, ...], device: str) -> str | None:
    if _library.load_error is not None:
        return _library.load_error
    if all(_library.has_kernel(name, device) for name in operators):
        return None
    return f"this build has no {device.upper()} kernels; use impl='reference' there"


def _why_not_triton(op: str, operators: tuple[str, ...], device: str) -> str | None:
    names = [f"{name}_triton" for name in operators]
    if not all(_library.has_kernel(name, "cuda") for name in names):
        return f"{op} has no Triton kernel in this version"
    if not all(_library.has_kernel(name, device) for name in names):
        return "Triton runs on CUDA tensors; on the CPU it only interprets, for tests (TRITON_INTERPRET=1)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    if device == "cuda" and torch.version.cuda is None:
        return "this torch was built without CUDA; pytorch.org lists the builds that have it"
    return None


def choose(op: str, impl: str, device: torch.device, **traits: object) -> str:
    """The backend that runs `op` on `device`: `impl` itself, or the first usable one for "auto"."""
    if not torch.compiler.is_compiling() and getattr(asking, "active", False):
        raise Question(op, impl, device, traits)
    rows = backends(op, device.type)
    if impl != "auto" and impl not in rows:
        raise ValueError(f"{op}: impl must be one of {', '.join(map(repr, ('auto', *rows)))}, got {impl!r}")
    if impl == "reference":
        return impl
    if impl != "auto":
        why = why_not(op, impl, device, traits)
        if why is not None:
            raise RuntimeError(f"{op}: impl={impl!r} cannot run on {device.type} tensors: {why}")
        return impl
    for backend in rows:
        if why_not(op, backend, device, traits) is None:
            return backend
    return "reference"


def why_not(op: str, backend: str, device: torch.device, traits: dict[str, object]) -> str | None:
    """None where `backend` can run such a call of `op`, else why it cannot."""
    if backend == "reference":
        return None
    if backend not in _table.get((op, device.type), ()):
        return f"no kernels for {device.type} tensors; use impl='reference'"
    why = _table[op, device.type][backend]
    if why is None and device.type == "cuda" and backend in IMPLS:
        why = _why_not_gpu(device.index)
    if why is None and (op, backend) in _limits:
        why = _limits[op, backend](**traits)
    return why


def _why_not_gpu(index: int | None) -> str | None:
    """Whether this GPU (None: the current one) is too old for the kernels."""
    if not torch.cuda.is_available():
        return None  # fake tensors, which run nothing
    found = torch.cuda.get_device_capability(index)
    if found >= LEAST_CAPABILITY:
        return None
    least = "{}.{}".format(*LEAST_CAPABILITY)
    return (
        f"the kernels need compute capability {least} (A100 or later), this GPU has {found[0]}.{found[1]}; "
        "use impl='reference'"
    )


# What torch.compiler.assume_constant_result does, without importing the compiler whenever crosspoint is imported.
_why_not_gpu._dynamo_marked_constant = True


def describe_backends() -> list[BackendRow]:
    """Every op, device type and backend, with the reason where a backend cannot run."""
    return [
        BackendRow(op, device, backend, why is None, why or "usable")
        for (op, device), rows in _table.items()
        for backend, why in rows.items()
    ]
