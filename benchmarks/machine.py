"""What results depend on: the machine, its measured limits, the versions, and what else ran meanwhile."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.measure import Clock
from crosspoint.ops import _library

__all__ = ["TUNED_MALLOC", "WIDEST_FIRST", "Others", "facts", "limits", "tuned_malloc"]

# glibc keeps large blocks instead of handing them back to the kernel, which zeroes every page of the next one.
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
WIDEST_FIRST = ("avx512", "avx2", "baseline")  # what CROSSPOINT_CPU can ask for
_PEAK_STEPS = 1_000_000  # of peak.c: about 2 ms


def tuned_malloc() -> bool:
    return all(os.environ.get(name) == value for name, value in TUNED_MALLOC.items())


def facts(device: str = "cpu") -> dict:
    """What the results depend on."""
    return {
        "machine": f"{_cpu_name()}, {os.cpu_count()} threads",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "instruction_set": "none" if _library.load_error else _library.cpu_variant(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "malloc": "tuned" if tuned_malloc() else "default",
        "peers": peers.versions(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _commit() -> str:
    """The checkout's, with a + if files were changed since; "unknown" where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return "unknown" if name.returncode else name.stdout.strip() + ("+" if changed.stdout.strip() else "")


class Others:
    """How much of the processors other processes took while `watched`: a share from 0 to 1, None if unknown."""

    def __init__(self) -> None:
        self._total = self._others = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = self._now()
        yield
        now = self._now()
        if before is not None and now is not None:
            total, busy, own = (b - a for a, b in zip(before, now, strict=True))
            self._total += total
            self._others += max(0.0, busy - own)

    def share(self) -> float | None:
        return self._others / self._total if self._total > 0 else None

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Processor seconds: there were, were used, were used by this process and its children that ended."""
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        total = sum(fields) / os.sysconf("SC_CLK_TCK")
        idle = sum(fields[3:5]) / os.sysconf("SC_CLK_TCK")
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return total, total - idle, sum(u.ru_utime + u.ru_stime for u in usage)


# ---- limits


def limits(device: str = "cpu", seconds: float = 0.5) -> dict[str, float]:
    """This machine's rates, measured: float32 matrix products and (GPU) bfloat16 ones, reading and copying memory;
    on a CPU also multiply-adds on registers, where a C compiler is there to compile benchmarks/peak.c."""
    clock = Clock(device)
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    out = torch.empty_like(a)
    floats = torch.zeros(1 << 27 if device == "cuda" else 1 << 25, device=device)
    target = torch.empty_like(floats)

    def best(run: Callable[[], object]) -> float:
        run()
        times, end = [], time.monotonic() + seconds
        while time.monotonic() < end or len(times) < 3:
            times.append(clock.once(run))
        return min(times)

    found = {
        "gflops": 2e-9 * n**3 / best(lambda: torch.mm(a, b, out=out)),
        "read_gb_s": 1e-9 * 4 * floats.numel() / best(floats.sum),
        "copy_gb_s": 2e-9 * 4 * floats.numel() / best(lambda: target.copy_(floats)),
    }
    if device == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
        found["gflops_bfloat16"] = 2e-9 * n**3 / best(lambda: a @ b)
    elif (multiply_adds := _compiled_peak()) is not None:
        threads = torch.get_num_threads()
        flops = threads * _PEAK_STEPS * multiply_adds.step_flops()
        found["gflops_registers"] = 1e-9 * flops / best(lambda: _on_all(threads, multiply_adds.run))
    return found


def _compiled_peak() -> ctypes.CDLL | None:
    """benchmarks/peak.c, compiled for this processor; None without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.c")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        try:
            done = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True)
        except OSError:
            return None
        if done.returncode:
            return None
        loaded = ctypes.CDLL(str(library))
    loaded.run.restype, loaded.run.argtypes = ctypes.c_float, [ctypes.c_long]
    loaded.step_flops.restype = ctypes.c_long
    return loaded


def _on_all(threads: int, run: Callable[[int], object]) -> None:
    started = [threading.Thread(target=run, args=(_PEAK_STEPS,)) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
