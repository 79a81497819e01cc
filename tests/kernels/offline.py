"""Compiles every Triton kernel for GPUs that need not be there, and reads what came out.

Beside this file, *_variants.py list an operator's kernels as they are launched: `MODULES`, and `variants()`.
"""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CACHE = Path(__file__).parents[2] / "build" / "triton"  # by content, so that a second run compiles nothing
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
LISTS = (
    "knn_variants",
    "gather_variants",
    "edge_conv_variants",
    "edge_layer_variants",
    "edge_conv2_variants",
    "conv_bn_act_pool_variants",
    "nt_xent_variants",
)


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: the types of its arguments (others may be there too; "i32/16" for multiples of 16,
    which Triton compiles for), its constants (None for a tensor that is left out) and options."""

    name: str
    kernel: object
    types: dict
    constants: dict
    options: dict = field(default_factory=dict)
    tensor_cores: bool = False
    architectures: tuple[int, ...] = ARCHITECTURES
    shared: int | None = None  # bytes that it must do with, if not all shared memory that the processor has


@dataclass(frozen=True)
class Compiled:
    ptx: str
    stack: int
    registers: int
    shared: int


def modules() -> list[ModuleType]:
    """Those that hold the kernels listed."""
    return [module for name in LISTS for module in import_module(name).MODULES]


def variants() -> list[Variant]:
    """Every kernel with every entry of its table."""
    return [variant for name in LISTS for variant in import_module(name).variants()]


def compile_all() -> dict[tuple[str, int], Compiled]:
    """(name, architecture) -> what came out."""
    jobs = [
        (i, architecture) for i, variant in enumerate(variants()) for architecture in variant.architectures
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(_compile, *zip(*jobs, strict=True)))
    return {(variants()[i].name, arch): result for (i, arch), result in zip(jobs, results, strict=True)}


def _compile(index: int, architecture: int) -> Compiled:
    variant = variants()[index]
    triton.knobs.cache.dir = str(CACHE)
    names = variant.kernel.arg_names
    types = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    multiples = [
        i for i, name in enumerate(names) if types[name].startswith("*") or types[name].endswith("/16")
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i in multiples}
    types = {name: kind.removesuffix("/16") for name, kind in types.items()}
    source = ASTSource(variant.kernel, types, variant.constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=variant.options)
    cubin = CACHE / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "-res-usage", cubin]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cubin.unlink()
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    return Compiled(kernel.asm["ptx"], stack, registers, kernel.metadata.shared)
