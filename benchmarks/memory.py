"""Peak memory, and how much there is. The peak of a call is that of a process of its own: ours and others keep
workspace between calls, and resident memory is a process's figure.
"""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers, registry
from benchmarks.measure import runner
from benchmarks.registry import Case, build

__all__ = ["Growth", "available", "extra_bytes", "peak_apart", "peak_bytes"]


def peak_resident() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return _status("VmHWM")


def _status(name: str, file: str = "/proc/self/status") -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {name}; peak memory needs Linux")


def _start_counting() -> int:
    """Forget the peak so far, and return what is resident now: the peak counts from there."""
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_resident()
    return _status("VmRSS")


def peak_bytes(case: Case, name: str, warm: Case) -> int:
    """What one call gains over its inputs, in this process. It must be fresh: ours keeps workspace between calls.

    `warm` is run before, so that libraries are loaded and threads started; of a compiled peer, the case itself.
    """
    if name == peers.COMPILED:
        warm = case
    runner(name, build(warm))()
    problem = build(case)
    run = runner(name, problem)
    if name == peers.COMPILED:
        run()
    before = _start_counting()
    run()
    return peak_resident() - before


def peak_apart(case: Case, name: str) -> int:
    """`peak_bytes` in a process of its own, with this process's threads and allocator."""
    # The server has imported this module, and done nothing with it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answer, pipe = context.Pipe(duplex=False)
    process = context.Process(
        target=_send_peak, args=(case, name, torch.get_num_threads(), pipe), daemon=True
    )
    process.start()
    pipe.close()
    try:
        found = answer.recv()
    except EOFError:
        process.join()
        found = f"its process ended with {process.exitcode}"
    process.join()
    if isinstance(found, str):
        raise RuntimeError(f"measuring the memory of {name} in {case.name} failed: {found}")
    return found


def _send_peak(case: Case, name: str, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    warm = dataclasses.replace(next(registry.cases([case.op], ("tiny",))), backward=case.backward)
    try:
        pipe.send(peak_bytes(case, name, warm))
    except Exception as error:  # a peer's own limits come as errors of any kind
        pipe.send(f"{type(error).__name__}: {error}"[:500])


def extra_bytes(run: Callable[[], list[Tensor]]) -> int:
    """On a GPU: peak memory of a call beyond what was there before and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    returned = sum(y.untyped_storage().nbytes() for y in result)
    return torch.cuda.max_memory_allocated() - before - returned


# ---- limits


def available(device: str = "cpu") -> int:
    """Bytes that new processes can take before this machine, the container around us, or the GPU has none left."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = _status("MemAvailable", "/proc/meminfo")
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - used)


class Growth:
    """The memory that this process takes on a device: at most so many bytes (beyond, allocations fail, and nothing else
    suffers), and how much more at its peak than when `start` was called."""

    def __init__(self, device: str, most: int) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, most / total))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.held = (
            torch.cuda.memory_reserved() if self.on_gpu else _status("VmData")
        )  # what the limit counts
        self._base = self._peak()

    def bytes(self) -> int:
        return self._peak() - self._base

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_gpu else peak_resident()
