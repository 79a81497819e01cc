"""Builds the operator library: csrc/cpu once per instruction set, csrc/torch once, csrc/cuda where there is CUDA,
linked into one shared object; and crosspoint._host: csrc/python_module.cpp with its kernels, which needs no torch.

CROSSPOINT_BUILD=0 installs without compiling anything; the plain-PyTorch reference then runs every operator.
CROSSPOINT_CUDA=auto|0|1: auto (the default) builds the CUDA kernels where torch has CUDA and a toolkit is found,
    0 never does, 1 fails with the reason where it cannot. TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") names the architectures.
CROSSPOINT_ONLY=avx512|avx2|baseline builds the CPU kernels for that instruction set alone, in a third of the time.
CROSSPOINT_SANITIZE=address,undefined builds with the compiler's sanitizers (see `make sanitize`).
MAX_JOBS limits the compilers that run at a time.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
SANITIZE = os.environ.get("CROSSPOINT_SANITIZE", "")
X86 = platform.machine().lower() in ("x86_64", "amd64")

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
if SANITIZE:
    COMMON_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer"]
    COMMON_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
LINK_FLAGS = [f"-fsanitize={SANITIZE}"] if SANITIZE else ["-Wl,-z,defs", "-s"]
VARIANT_FLAGS = {"baseline": []}
if X86:
    VARIANT_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    VARIANT_FLAGS["avx512"] = [
        *VARIANT_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]
ONLY = os.environ.get("CROSSPOINT_ONLY", "")
if ONLY:
    if ONLY not in VARIANT_FLAGS:
        raise SystemExit(f"CROSSPOINT_ONLY must be one of {', '.join(VARIANT_FLAGS)} here, got {ONLY!r}")
    VARIANT_FLAGS = {ONLY: VARIANT_FLAGS[ONLY]}
    COMMON_FLAGS.append(f"-DCROSSPOINT_ONLY={ONLY}")
HOST_KERNELS = {"farthest_point_sampling", "knn", "neighbor_sum"}
HOST_ONLY_KERNELS = {"farthest_point_sampling"}
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest whose stable ABI has what the bindings use
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# Code of one minor version runs on the later ones of its major; PTX of the last serves what comes after it.
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")


class Cuda(NamedTuple):
    """The toolkit that compiles csrc/cuda."""

    home: Path
    version: str
    architectures: tuple[str, ...]  # as in TORCH_CUDA_ARCH_LIST: "9.0", "9.0a", "12.0+PTX"

    @property
    def nvcc(self) -> str:
        return str(self.home / "bin" / "nvcc")

    def gencode(self, source: Path) -> list[str]:
        """For `*_wgmma.cu`, whose instructions only compute capability 9.0 has, 9.0 is the 9.0a that has them."""
        flags = []
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX").replace(".", "")
            if number == "90" and source.stem.endswith("_wgmma"):
                number = "90a"
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return list(dict.fromkeys(flags))


def cuda_home() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME, CUDA_PATH, that of the nvcc on PATH, or the usual place."""
    found = shutil.which("nvcc")
    places = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        Path(found).resolve().parents[1] if found else None,
        "/usr/local/cuda",
    ]
    for place in map(Path, filter(None, places)):
        if (place / "bin" / "nvcc").exists() and (place / "include" / "cuda_runtime.h").exists():
            return place
    return None


def parse_architectures(text: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST as torch reads it: numbers between semicolons, commas or spaces."""
    names = tuple(filter(None, re.split(r"[;,\s]+", text)))
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0a;10.0+PTX', got {name!r}"
            )
        if float(re.match(r"\d+\.\d", name)[0]) < 8:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: crosspoint's CUDA kernels need compute capability 8.0 or later, got {name!r}"
            )
    return names


def find_cuda(torch_cuda: str | None) -> Cuda | str:
    """The toolkit for a torch of CUDA version `torch_cuda`, or why csrc/cuda cannot be compiled."""
    if torch_cuda is None:
        return "the installed torch is built without CUDA"
    home = cuda_home()
    if home is None:
        return "no CUDA toolkit (nvcc and headers) in CUDA_HOME, on PATH or in /usr/local/cuda"
    nvcc = str(home / "bin" / "nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    if release is None:
        return f"{nvcc} --version names no release"
    if release[1].split(".")[0] != torch_cuda.split(".")[0]:
        return f"torch is built for CUDA {torch_cuda}, but {nvcc} is of CUDA {release[1]}: the first number must agree"
    asked = parse_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not asked:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        known = [name for name in CUDA_ARCHITECTURES if f"sm_{name.replace('.', '')}" in listed]
        asked = (*known[:-1], f"{known[-1]}+PTX")
    return Cuda(home, release[1], asked)


def wanted_cuda(torch_cuda: str | None) -> Cuda | str:
    """What CROSSPOINT_CUDA asks for, or why the CUDA kernels are left out."""
    mode = os.environ.get("CROSSPOINT_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"CROSSPOINT_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return "switched off by CROSSPOINT_CUDA=0"
    cuda = find_cuda(torch_cuda)
    if isinstance(cuda, str) and mode == "1":
        raise SystemExit(f"CROSSPOINT_CUDA=1, but the CUDA kernels cannot be built: {cuda}")
    return cuda


def import_torch():
    """The torch to build against."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise SystemExit(
            "crosspoint's kernels are built against an installed torch >= 2.11, and this Python has none. Either "
            "install torch first and run `pip install --no-build-isolation .`, or set CROSSPOINT_BUILD=0 to "
            "install without kernels (the plain-PyTorch reference runs everything, slower)."
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise SystemExit(
            f"crosspoint's kernels are built against torch >= 2.11, and this Python has {torch.__version__}. "
            "Update torch, or set CROSSPOINT_BUILD=0 to install without kernels."
        )
    return torch, cpp_extension


class Unit(NamedTuple):
    """One object file: a source, the folder and flags it is compiled with."""

    source: Path
    label: str
    flags: list[str]


def cpu_units(names: Iterable[str]) -> list[Unit]:
    units = [
        Unit(CSRC / "cpu" / f"{name}.cpp", variant, [f"-DCROSSPOINT_ISA={variant}", *flags])
        for name in sorted(names)
        for variant, flags in VARIANT_FLAGS.items()
    ]
    return [*units, Unit(CSRC / "cpu" / "isa.cpp", "common", [])]


def operator_kernels() -> set[str]:
    return {path.stem for path in (CSRC / "cpu").glob("*.cpp")} - {"isa", *HOST_ONLY_KERNELS}


def host_units() -> list[Unit]:
    try:
        import pybind11
    except ImportError:
        raise SystemExit(
            "crosspoint's NumPy module is built with pybind11 >= 2.13, and this Python has none. Either install "
            "pybind11 first, or set CROSSPOINT_BUILD=0 to install without kernels."
        ) from None
    flags = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    built_with = " ".join(COMMON_FLAGS)
    flags.append(f'-DCROSSPOINT_FLAGS="{built_with}"')
    return [
        *cpu_units(HOST_KERNELS),
        Unit(CSRC / "python_module.cpp", f"host-{sys.version_info.minor}", flags),
    ]


def binding_units(torch, headers: list[str], cuda: Cuda | str, build: str) -> list[Unit]:
    flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(f"-isystem{path}" for path in headers)]
    sources = sorted((CSRC / "torch").glob("*.cpp"))
    if isinstance(cuda, Cuda):
        sources += sorted((CSRC / "torch" / "cuda").glob("*.cpp"))
        flags += ["-DUSE_CUDA", f"-isystem{cuda.home / 'include'}"]
    described = [f'-DCROSSPOINT_BUILD_INFO="{build}"']
    return [
        Unit(
            source, f"torch-{torch.__version__}", flags + (described if source.name == "library.cpp" else [])
        )
        for source in sources
    ]


def cuda_units(cuda: Cuda | str) -> list[Unit]:
    if isinstance(cuda, str):
        return []
    return [Unit(path, "cuda", cuda.gencode(path)) for path in sorted((CSRC / "cuda").glob("*.cu"))]


def build_line(cuda: Cuda | str) -> str:
    if isinstance(cuda, str):
        return f"CUDA kernels: no: {cuda}"
    return f"CUDA kernels: CUDA {cuda.version} for {' '.join(cuda.architectures)}"


def describe_build(torch_version: str, cuda: Cuda | str, compiler: str) -> str:
    """One fact a line, for `crosspoint info`."""
    facts = [
        f"built against: torch {torch_version}, stable ABI of torch 2.11",
        f"compiler: {compiler}",
        f"CPU variants: {' '.join(VARIANT_FLAGS)}",
        build_line(cuda),
    ]
    if SANITIZE:
        facts.append(f"sanitizers: {SANITIZE}")
    return "\\n".join(facts).replace('"', "'")


def is_fresh(built: Path, needs: Path, recipe: Path, command: str) -> bool:
    """Whether the object is newer than the files it was made from (the compiler's list), by this very command."""
    if not (built.exists() and needs.exists() and recipe.exists()) or recipe.read_text() != command:
        return False
    files = needs.read_text().partition(":")[2].replace("\\\n", " ").split()
    return all(Path(file).exists() and Path(file).stat().st_mtime < built.stat().st_mtime for file in files)


class BuildOperatorLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_host"):
            return super().get_ext_filename(fullname)
        # No Python symbol is used, so the name carries no Python version.
        return str(Path(*fullname.split("."))) + ".so"

    def finalize_options(self) -> None:
        super().finalize_options()
        # One place, so that every way to build reuses the objects.
        self.build_temp = str(ROOT / "build" / ("kernels" if not SANITIZE else "kernels-sanitized"))

    def build_extension(self, extension: Extension) -> None:
        os.chdir(ROOT)
        if extension.name.endswith("_host"):
            self.build_host_module(extension)
        else:
            self.build_operator_library(extension)

    def build_host_module(self, extension: Extension) -> None:
        self.compiler.link_shared_object(
            self.compile_units(host_units()),
            self.get_ext_fullpath(extension.name),
            # Its undefined symbols are Python's.
            extra_postargs=["-pthread", *(flag for flag in LINK_FLAGS if flag != "-Wl,-z,defs")],
            target_lang="c++",
        )

    def build_operator_library(self, extension: Extension) -> None:
        torch, cpp_extension = import_torch()
        cuda = wanted_cuda(torch.version.cuda)
        print(f"crosspoint: {build_line(cuda)}", file=sys.stderr)
        compiler = subprocess.run(
            [self.compiler.compiler_so_cxx[0], "--version"], capture_output=True, text=True
        )
        build = describe_build(torch.__version__, cuda, compiler.stdout.partition("\n")[0])
        objects = self.compile_units(
            cpu_units(operator_kernels())
            + binding_units(torch, cpp_extension.include_paths(), cuda, build)
            + cuda_units(cuda),
            cuda,
        )
        libraries, folders = ["torch", "torch_cpu", "c10"], cpp_extension.library_paths()
        if isinstance(cuda, Cuda):
            # The runtime is linked in, so that any driver and any torch of the same CUDA major will do.
            libraries += ["torch_cuda", "c10_cuda", "cudart_static", "dl", "rt", "pthread"]
            folders.append(str(cuda.home / "lib64"))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            library_dirs=folders,
            libraries=libraries,
            extra_postargs=LINK_FLAGS,
            target_lang="c++",
        )

    def compile_units(self, units: list[Unit], cuda: Cuda | str = "") -> list[str]:
        def compile_unit(unit: Unit) -> str:
            relative = unit.source.relative_to(ROOT)
            built = Path(self.build_temp, unit.label, relative).with_suffix(".o")
            if unit.source.suffix == ".cu":
                command = [cuda.nvcc, *NVCC_FLAGS]
            else:
                command = [*self.compiler.compiler_so_cxx, *COMMON_FLAGS]
            needs = built.with_suffix(".d")
            command += ["-c", str(relative), "-o", str(built), "-MMD", "-MF", str(needs), *unit.flags]
            command += ["-Icsrc/include", "-Icsrc"]
            recipe = built.with_suffix(".txt")
            if self.force or not is_fresh(built, needs, recipe, " ".join(command)):
                built.parent.mkdir(parents=True, exist_ok=True)
                self.spawn(command)
                recipe.write_text(" ".join(command))
            return str(built)

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compile_unit, units))


def main() -> None:
    build = os.environ.get("CROSSPOINT_BUILD", "1") != "0"
    sources = [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.c*"))]
    extensions = [
        Extension(name, sources) for name in ("crosspoint.ops.libcrosspoint_ops", "crosspoint._host")
    ]
    setup(
        ext_modules=extensions if build else [],
        cmdclass={"build_ext": BuildOperatorLibrary},
    )


if __name__ == "__main__":
    main()
