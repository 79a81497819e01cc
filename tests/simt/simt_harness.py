"""Runs CUDA kernels on the host: builds them with this folder's harness, owns their buffers, calls their launchers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "simt"
CXX = os.environ.get("CXX", "g++")

# plain: quick. watch: every load and store of the kernels is checked (memory.cpp). sanitized: the compiler's
# address and undefined-behaviour sanitizers, for a process that has them preloaded (see `sanitizer_environment`).
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
BUILDS = {
    "plain": (["-O2"], []),
    "watch": (
        ["-O1", "-DSIMT_WATCH"],
        ["-fsanitize=thread", "--param=tsan-distinguish-volatile=1"],
    ),
    "sanitized": (["-O1", *_SANITIZE], []),
}
FLAGS = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DCROSSPOINT_SIMT", f"-ffile-prefix-map={ROOT}/="]
FLAGS += [f"-I{folder}" for folder in (HERE / "include", ROOT / "csrc", ROOT / "csrc" / "include")]
LINK = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs"]


_CHOOSE = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.POINTER(ctypes.c_int64)] * 2)


class SimtError(RuntimeError):
    """A kernel did what it must not; the message says which thread, what and where."""


def builds_here() -> list[str]:
    """The builds that this process can load."""
    return ["sanitized"] if "libasan" in os.environ.get("LD_PRELOAD", "") else ["plain", "watch"]


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process that loads sanitized builds."""
    libraries = [
        subprocess.check_output([CXX, f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libubsan", "libstdc++")
    ]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), **options}


def build(sources: list[Path], kind: str) -> Path:
    """A shared library of these .cu and .cpp files and the harness, compiled unless it already was."""
    flags, kernel_flags = BUILDS[kind]
    headers = [*HERE.rglob("*.h"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    common = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(headers)))
    objects = []
    for source in [*sources, HERE / "fibres.cpp", HERE / "memory.cpp"]:
        own = source.parent == HERE and source.suffix == ".cpp" and source.stem in ("fibres", "memory")
        command = [CXX, *FLAGS, *flags, *([] if own else kernel_flags)]
        digest = common.copy()
        digest.update(source.read_bytes() + repr(command).encode())
        target = CACHE / f"{source.stem}-{kind}-{digest.hexdigest()[:16]}.o"
        _produce(target, [*command, "-x", "c++", "-c", str(source)])
        objects.append(target)
    names = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = CACHE / f"{sources[0].stem}-{kind}-{names}.so"
    link_flags = _SANITIZE if kind == "sanitized" else []
    _produce(library, [CXX, *LINK, *link_flags, *map(str, objects), "-ldl"])
    return library


def _produce(target: Path, command: list[str]) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    subprocess.run([*command, "-o", str(partial)], check=True)
    partial.replace(target)


class Device:
    """One library of kernels, and buffers for them.

    Args:
        sources: .cu files with launchers, and whatever else exports the C functions to call.
        kind: one of `BUILDS`.
    """

    def __init__(self, sources: list[Path], kind: str) -> None:
        self.kind = kind
        self.path = build(sources, kind)
        self.library = ctypes.CDLL(str(self.path))
        self.library.simt_alloc.restype = ctypes.c_void_p
        self.library.simt_alloc.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int]
        self.library.simt_free.argtypes = [ctypes.c_void_p]
        self.library.simt_configure.argtypes = [ctypes.c_uint64, ctypes.c_int]
        self.library.simt_error.restype = ctypes.c_char_p
        self.library.simt_watched.restype = ctypes.c_longlong
        self._buffers: list[int] = []
        self.configure()

    def configure(self, seed: int = 0, resident: int = 1) -> None:
        """Order of threads and blocks (seed 0: ascending, others: shuffled), and how many blocks run interleaved."""
        self.library.simt_configure(seed, resident)

    def choose_blocks(self, choose: Callable[[int], range] | None) -> None:
        """Run only some blocks of every launch: `choose` is told how many it has. None: run all."""

        def answer(blocks: int, first, count) -> None:
            chosen = choose(blocks)
            first[0], count[0] = chosen.start, len(chosen)

        self._choose = _CHOOSE() if choose is None else _CHOOSE(answer)  # kept from the garbage collector
        self.library.simt_choose_blocks(self._choose)

    def input(self, values, name: str = "input", *, written: bool = False) -> np.ndarray:
        """A buffer that holds `values`; kernels may write to it only if `written`."""
        values = np.ascontiguousarray(values)
        array = self._allocate(values.shape, values.dtype, name, 2 if written else 1)
        array[...] = values
        return array

    def output(self, shape, dtype, name: str = "output") -> np.ndarray:
        """A buffer that nobody has written."""
        return self._allocate(shape, np.dtype(dtype), name, 0)

    def sparse(self, shape, dtype, name: str = "sparse") -> np.ndarray:
        """A buffer of zeros that may be larger than memory, of the plain build: only what is touched takes any."""
        return self._allocate(shape, np.dtype(dtype), name, 3)

    def _allocate(self, shape, dtype: np.dtype, name: str, mode: int) -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        address = self.library.simt_alloc(count * dtype.itemsize, name.encode(), mode)
        if address is None:
            raise MemoryError(f"no {count * dtype.itemsize} bytes of addresses for {name}")
        self._buffers.append(address)
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        return np.frombuffer(memory, dtype=dtype, count=count).reshape(shape)

    def free(self) -> None:
        """Release every buffer; arrays over them are not to be used after."""
        for address in self._buffers:
            self.library.simt_free(address)
        self._buffers.clear()

    def call(self, function: str, *arguments) -> None:
        """Call an exported function that returns a cudaError_t.

        Arrays and structures go as pointers, int as int64, float as double, str as a C string.
        """
        status = getattr(self.library, function)(*map(_argument, arguments))
        if status != 0:
            said = self._with_lines(self.library.simt_error().decode())
            raise SimtError(said or f"{function} cannot run this: error {status}")

    def counts(self) -> dict[str, int]:
        """Launches, switches between threads, warp collectives and watched accesses since the library was loaded."""
        counts = (ctypes.c_longlong * 3)()
        self.library.simt_counts(counts)
        names = ("launches", "switches", "collectives")
        return {**dict(zip(names, counts, strict=True)), "watched": self.library.simt_watched()}

    def _with_lines(self, message: str) -> str:
        def line(match: re.Match[str]) -> str:
            found = subprocess.run(
                ["addr2line", "-e", str(self.path), match[1]], capture_output=True, text=True, check=False
            )
            return found.stdout.split("/")[-1].split(" ")[0].strip() or match[0]

        return re.sub(r"pc:(0x[0-9a-f]+)", line, message)


def _argument(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_int64(value)
