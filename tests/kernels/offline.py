"""Compiles every Triton kernel for GPUs that need not be there, and reads what came out."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crosspoint.kernels import gather_max, knn_direct, knn_filter, neighbor_sum
from crosspoint.kernels._common import gather_blocks

CACHE = Path(__file__).parents[2] / "build" / "triton"  # by content, so that a second run compiles nothing
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)

TYPES = {
    **dict.fromkeys(["M", "N", "k", "C", "n_block", "s_point", "s_channel"], "i32"),
    **dict.fromkeys(["p_lengths_query", "p_lengths_points", "p_idx", "p_space"], "*i64"),
    **dict.fromkeys(
        ["p_candidates", "p_count", "p_wanted", "p_extent", "p_slots", "p_start", "p_edges"], "*i32"
    ),
    **dict.fromkeys(["p_query", "p_points", "p_dist2", "p_centre", "p_x", "p_out", "p_grad"], "*fp32"),
    **dict.fromkeys(["p_norm2", "p_lost2", "p_norm2_query", "p_lost2_query"], "*fp32"),
    "p_rounded": "*bf16",
}


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: its constants (None for a tensor that is left out) and the types that differ."""

    name: str
    kernel: object
    constants: dict
    types: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    tensor_cores: bool = False


@dataclass(frozen=True)
class Compiled:
    ptx: str
    stack: int
    registers: int
    shared: int


def variants() -> list[Variant]:
    """Every kernel with every entry of its table."""
    direct, filtered = knn_direct, knn_filter
    graph = {"SELF": direct.SELF_FIRST.value, "p_dist2": None}
    found = []
    for entry in direct.DIRECT:
        few = {**entry.constants(), **graph, "CHANNELS": 3, "p_wanted": None, "s_point": 1}
        any_number = {**entry.constants(), "SELF": direct.OTHER_SET.value, "CHANNELS": 0}
        found += [
            Variant(f"direct-{entry.k}-3", direct.direct_kernel, few, options=entry.options()),
            Variant(f"direct-{entry.k}-any", direct.direct_kernel, any_number, options=entry.options()),
        ]
    for name, kernel, entry in (
        ("merge", direct.merge_kernel, direct.MERGE),
        ("sweep", direct.sweep_kernel, direct.SWEEP),
    ):
        constants = {**entry.constants(), "SELF": direct.OTHER_SET.value, "CHANNELS": 3, "s_point": 1}
        double = dict.fromkeys(["p_query", "p_points", "p_dist2"], "*fp64") if name == "sweep" else {}
        found.append(Variant(name, kernel, constants, double, {"num_warps": entry.warps}))
    found.append(Variant("centre", filtered.centre_kernel, filtered.CENTRE))
    for width in filtered.WIDTHS:
        constants = {"ROWS": filtered.ROUND_ROWS, "WIDTH": width}
        found.append(Variant(f"round-{width}", filtered.round_kernel, constants))
    halves = dict.fromkeys(["p_query", "p_points"], "*bf16")
    for entry in filtered.FILTER:
        for width in filtered.WIDTHS:
            constants = {**entry.constants(), "SELF": direct.SELF_FIRST.value, "WIDTH": width}
            options = {"num_warps": entry.warps}
            name = f"filter-{entry.k}-{width}"
            found.append(Variant(name, filtered.filter_kernel, constants, halves, options, tensor_cores=True))
        constants = {**entry.rerank_constants(), "SELF": direct.OTHER_SET.value}
        found.append(Variant(f"rerank-{entry.k}", filtered.rerank_kernel, constants))
    return [*found, *gathering()]


def gathering() -> list[Variant]:
    """Kernels that gather rows, for points and for features."""
    kernels = [neighbor_sum.sum_kernel, neighbor_sum.sum_turned_kernel]
    kernels += [gather_max.most_kernel, gather_max.winners_kernel]
    double = dict.fromkeys(["p_x", "p_out", "p_grad"], "*fp64")
    found = []
    for kernel in kernels:
        name = kernel.__name__.removesuffix("_kernel")
        for channels in (3, 64):
            found.append(Variant(f"{name}-{channels}", kernel, gather_blocks(1, 1, channels)[1]))
        found.append(Variant(f"{name}-double", kernel, gather_blocks(1, 1, 64)[1], double))
    return found


def compile_all() -> dict[tuple[str, int], Compiled]:
    """(name, architecture) -> what came out."""
    jobs = [(i, architecture) for i in range(len(variants())) for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(_compile, *zip(*jobs, strict=True)))
    return {(variants()[i].name, arch): result for (i, arch), result in zip(jobs, results, strict=True)}


def _compile(index: int, architecture: int) -> Compiled:
    variant = variants()[index]
    triton.knobs.cache.dir = str(CACHE)
    names = variant.kernel.arg_names
    types = {
        name: "constexpr" if name in variant.constants else variant.types.get(name) or TYPES[name]
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*"}
    source = ASTSource(variant.kernel, types, variant.constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=variant.options)
    cubin = CACHE / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "-res-usage", cubin]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cubin.unlink()
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    return Compiled(kernel.asm["ptx"], stack, registers, kernel.metadata.shared)
