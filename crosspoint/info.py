"""What is usable on this machine, and for what is not, why and what to do: a text to paste into a bug report.

Needs torch and numpy alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re

import numpy as np
import torch

from crosspoint._version import __version__
from crosspoint.ops import _library, describe_backends

__all__ = ["missing_packages", "report"]


def report() -> str:
    """The text of `crosspoint info`."""
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines)
        for title, lines in (
            (f"crosspoint {__version__}", _versions()),
            ("Devices", _devices()),
            ("Compiled kernels", _build()),
            ("Environment", _environment()),
            *((f"Operators on {device}", _operators(device)) for device in _usable_devices()),
            ("Extras", _extras()),
        )
    )


def missing_packages(requirements: list[str]) -> dict[str, list[str]]:
    """For each extra in `requirements` (as package metadata lists them), its packages that are absent."""
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"""extra\s*==\s*['"]([\w.-]+)['"]""", requirement)
        if extra:
            name, _, included = re.match(r"([\w.-]+)(\[([^]]*)\])?", requirement).groups(default="")
            # crosspoint[train] inside [eval] stands for what [train] holds.
            names = [f"[{e.strip()}]" for e in included.split(",")] if name == "crosspoint" else [name]
            packages.setdefault(extra[1], []).extend(names)

    def expand(extra: str) -> list[str]:
        nested = [expand(name[1:-1]) if name[0] == "[" else [name] for name in packages.get(extra, [])]
        return list(dict.fromkeys(name for names in nested for name in names))

    return {extra: [name for name in expand(extra) if not _installed(name)] for extra in packages}


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _versions() -> list[str]:
    return _table(
        [
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            ("numpy", np.__version__),
            ("system", f"{platform.system()} {platform.machine()}"),
        ]
    )


def _devices() -> list[str]:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("cpu", f"{_cpu_name()}, {affinity} cores, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = properties.total_memory / 2**30
            capability = f"sm_{properties.major}{properties.minor}"
            rows.append((f"cuda:{i}", f"{properties.name}, {capability}, {memory:.0f} GiB"))
        rows.append(("CUDA", f"{torch.version.cuda} in torch"))
    elif torch.version.cuda is None and torch.version.hip is None:
        rows.append(
            ("cuda", "no: this torch was built without CUDA; pytorch.org lists the builds that have it")
        )
    else:
        rows.append(
            ("cuda", f"no: torch (CUDA {torch.version.cuda}) finds no GPU; does `nvidia-smi` list one?")
        )
    return _table(rows)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _build() -> list[str]:
    if _library.load_error is not None:
        return [f"none: {_library.load_error}"]
    facts = [tuple(line.split(": ", 1)) for line in _library.build_info().splitlines()]
    return _table([("CPU variant in use", _library.cpu_variant()), *facts])


def _environment() -> list[str]:
    """The variables that change what runs."""
    prefixes = (
        "CROSSPOINT_",
        "OMP_",
        "MKL_",
        "CUDA_VISIBLE",
        "CUDA_LAUNCH",
        "TRITON_",
        "TORCH_",
        "LD_PRELOAD",
        "MALLOC_",
    )
    return [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(prefixes)] or [
        "nothing set"
    ]


def _usable_devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _operators(device: str) -> list[str]:
    """A table of ops by backends, then each reason once."""
    rows = [row for row in describe_backends() if row.device == device]
    backends = list(dict.fromkeys(row.backend for row in rows))
    usable = {(row.op, row.backend): "yes" if row.usable else "no" for row in rows}
    table = [("", *backends)]
    for op in dict.fromkeys(row.op for row in rows):
        table.append((op, *(usable[op, backend] for backend in backends)))
    reasons = dict.fromkeys(f"no {row.backend}: {row.why}" for row in rows if not row.usable)
    return [*_table(table), *reasons]


def _extras() -> list[str]:
    try:
        requirements = importlib.metadata.requires("crosspoint") or []
    except importlib.metadata.PackageNotFoundError:
        return ["crosspoint runs from a folder and is not installed: pip install --no-build-isolation -e ."]
    return _table(
        [
            (f"[{extra}]", f"no: {', '.join(missing)} missing; pip install 'crosspoint[{extra}]'")
            if missing
            else (f"[{extra}]", "yes")
            for extra, missing in missing_packages(requirements).items()
        ]
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
