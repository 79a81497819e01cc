"""The operator library: the `crosspoint::` namespace, and the compiled kernels where they were built."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = [
    "LIBRARY_PATH",
    "build_info",
    "cpu_variant",
    "define",
    "define_leaf",
    "define_like",
    "has_kernel",
    "implement",
    "implement_triton",
    "load_error",
]

# CROSSPOINT_LIBRARY names another build of the same kernels, such as one with sanitizers.
LIBRARY_PATH = Path(os.environ.get("CROSSPOINT_LIBRARY") or Path(__file__).parent / "libcrosspoint_ops.so")

_namespace = torch.library.Library("crosspoint", "DEF")
_fakes: dict[str, tuple[str, Callable]] = {}  # operator -> its schema without the name, its shape function


def define(schema: str, fake: Callable) -> None:
    """Define the operator `schema`, with `fake` as its shape function; backends add kernels to it."""
    name, parenthesis, signature = schema.partition("(")
    _fakes[name] = (parenthesis + signature, fake)
    _namespace.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"crosspoint::{name}", fake, lib=_namespace)


def define_like(name: str, backend: str, fake: Callable | None = None) -> None:
    """Define `name`_`backend`, the operator by which another backend serves what operator `name` does; `fake` is its
    shape function where what it keeps for the backward pass differs."""
    signature, shared = _fakes[name]
    define(f"{name}_{backend}{signature}", fake or shared)


def define_leaf(schema: str) -> None:
    """Define an operator that only implementations of others call, and so needs no shape function."""
    _namespace.define(schema)


def implement(name: str, run: Callable, key: str) -> None:
    """Let `run` implement operator `name` for a dispatch key of torch ("CPU", "CUDA")."""
    _namespace.impl(name, run, key)


def implement_triton(name: str, run: Callable) -> None:
    """Let `run` implement operator `name` on CUDA tensors; on the CPU too where Triton interprets its kernels."""
    implement(name, run, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        implement(name, run, "CPU")


def has_kernel(name: str, device_type: str) -> bool:
    """Whether operator `name` has a kernel for devices of this type."""
    if not hasattr(torch.ops.crosspoint, name):
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"crosspoint::{name}", key)


def _load() -> str | None:
    """Load the compiled kernels; the reason, if that is not possible."""
    if os.environ.get("CROSSPOINT_NATIVE", "1") == "0":
        return "switched off by CROSSPOINT_NATIVE=0"
    if not LIBRARY_PATH.exists():
        return (
            "the compiled kernels are not in this installation; with a C++17 compiler, run "
            "`pip install --no-build-isolation .` where torch >= 2.11 is installed"
        )
    try:
        torch.ops.load_library(LIBRARY_PATH)
    except OSError as error:
        return f"{LIBRARY_PATH.name} could not be loaded ({error}); rebuild it against this torch"
    return None


_namespace.define("cpu_variant() -> str")
_namespace.define("build_info() -> str")
load_error = _load()


def cpu_variant() -> str:
    """The instruction-set variant of the CPU kernels that this process runs: "avx512", "avx2" or "baseline"."""
    return torch.ops.crosspoint.cpu_variant()


def build_info() -> str:
    """What the compiled library was built from and for: a line "name: fact" each."""
    return torch.ops.crosspoint.build_info()
