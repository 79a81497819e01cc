"""Writes empty stand-ins for the CUDA libraries that a CUDA build of torch links, so that it imports without them.

    python scripts/stub_cuda_libraries.py TORCH_FOLDER OUT      then import torch with LD_LIBRARY_PATH=OUT

The gigabytes of CUDA packages are then not needed to load the operator library under such a torch, and to run it on the
CPU. Every function in the stand-ins returns 100, cudaErrorNoDevice.
"""

import subprocess
import sys
from pathlib import Path

PREFIXES = ("cu", "libcu", "nv", "libnv", "nccl", "libnccl", "__cuda")


def printed(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def main(torch: Path, out: Path) -> None:
    libraries = sorted((torch / "lib").glob("*.so*"))
    needed: set[str] = set()
    undefined: set[str] = set()
    defined: set[str] = set()
    for library in libraries:
        needed |= {
            line.split("[")[1].split("]")[0]
            for line in printed("readelf", "-dW", library)
            if "(NEEDED)" in line
        }
        for line in printed("nm", "--dynamic", library):
            *_, kind, symbol = line.split()
            (undefined if kind == "U" else defined).add(symbol.partition("@")[0])
    absent = [name for name in needed - {path.name for path in libraries} if name.startswith(PREFIXES)]
    functions = [name for name in undefined - defined if name.startswith(PREFIXES)]

    out.mkdir(parents=True, exist_ok=True)
    source = out / "stubs.c"
    source.write_text("".join(f"long {name}(void) {{ return 100; }}\n" for name in sorted(functions)))
    shared = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin"]
    subprocess.run([*shared, "-o", out / "libcuda_stubs.so", source], check=True)
    link = ["-Wl,--no-as-needed", f"-L{out}", "-lcuda_stubs", "-Wl,-rpath,$ORIGIN"]
    for name in absent:
        subprocess.run([*shared, f"-Wl,-soname,{name}", "-o", out / name, *link], check=True)
    print(f"{len(absent)} libraries, {len(functions)} functions")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
