"""Builds the operator library: csrc/cpu once per instruction set, csrc/torch once, linked into one shared object.

CROSSPOINT_BUILD=0 installs without compiling anything; the plain-PyTorch reference then runs every operator.
CROSSPOINT_SANITIZE=address,undefined builds with the compiler's sanitizers (see `make sanitize`).
MAX_JOBS limits the compilers that run at a time.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
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
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest whose stable ABI has what the bindings use


def torch_paths() -> tuple[list[str], list[str]]:
    """Include and library folders of the torch to build against."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        raise SystemExit(
            "crosspoint's kernels are built against an installed torch >= 2.11, and this Python has none. Either "
            "install torch first and run `pip install --no-build-isolation .`, or set CROSSPOINT_BUILD=0 to "
            "install without kernels (the plain-PyTorch reference runs everything, slower)."
        ) from None
    return cpp_extension.include_paths(), cpp_extension.library_paths()


def compile_units() -> list[tuple[Path, str, list[str]]]:
    """(source, label, flags) of every object file."""
    kernels = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.name != "isa.cpp"]
    units = [
        (source, variant, [f"-DCROSSPOINT_ISA={variant}", *flags])
        for source in kernels
        for variant, flags in VARIANT_FLAGS.items()
    ]
    units.append((CSRC / "cpu" / "isa.cpp", "common", []))
    units += [
        (source, "torch", [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"])
        for source in sorted((CSRC / "torch").glob("*.cpp"))
    ]
    return units


class BuildOperatorLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # No Python symbol is used, so the name carries no Python version.
        return str(Path(*fullname.split("."))) + ".so"

    def finalize_options(self) -> None:
        super().finalize_options()
        # One place, so that every way to build reuses the objects.
        self.build_temp = str(ROOT / "build" / ("kernels" if not SANITIZE else "kernels-sanitized"))

    def build_extension(self, extension: Extension) -> None:
        include, library = torch_paths()
        headers = max(path.stat().st_mtime for path in [*CSRC.rglob("*.h"), Path(__file__)])

        def compile_unit(unit: tuple[Path, str, list[str]]) -> str:
            source, label, flags = unit
            relative = str(source.relative_to(ROOT))
            folder = str(Path(self.build_temp) / label)
            (built,) = self.compiler.object_filenames([relative], output_dir=folder)
            fresh = Path(built).exists() and Path(built).stat().st_mtime > max(
                source.stat().st_mtime, headers
            )
            if self.force or not fresh:
                torch_headers = include if label == "torch" else []
                Path(built).parent.mkdir(parents=True, exist_ok=True)
                self.spawn(
                    [*self.compiler.compiler_so_cxx, "-c", relative, "-o", built, *COMMON_FLAGS, *flags]
                    + [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
                    + [f"-isystem{path}" for path in torch_headers]
                )
            return built

        os.chdir(ROOT)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_unit, compile_units()))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            library_dirs=library,
            libraries=["torch", "torch_cpu", "c10"],
            extra_postargs=LINK_FLAGS,
            target_lang="c++",
        )


build = os.environ.get("CROSSPOINT_BUILD", "1") != "0"
sources = [str(source.relative_to(ROOT)) for source, _, _ in compile_units()]
setup(
    ext_modules=[Extension("crosspoint.ops.libcrosspoint_ops", sorted(set(sources)))] if build else [],
    cmdclass={"build_ext": BuildOperatorLibrary},
)
