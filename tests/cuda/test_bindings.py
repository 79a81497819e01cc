"""The bindings of CUDA kernels compile against this torch, and need nothing that torch 2.11 lacks."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CUDA = Path("/usr/local/cuda")


@pytest.mark.skipif(
    not (CUDA / "include" / "cuda_runtime_api.h").exists(), reason=f"no CUDA headers in {CUDA}"
)
@pytest.mark.parametrize(
    "source", sorted((ROOT / "csrc" / "torch" / "cuda").glob("*.cpp")), ids=lambda p: p.stem
)
def test_binding_compiles_and_asks_torch_2_11_for_what_it_has(source, tmp_path):
    spec = importlib.util.spec_from_file_location("crosspoint_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    built = tmp_path / "binding.o"
    include = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), CUDA / "include")]
    command = ["g++", *setup.COMMON_FLAGS, "-Werror", "-O0", f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET}"]
    command += ["-DUSE_CUDA", f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}", *include]
    done = subprocess.run([*command, "-c", source, "-o", built], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        ["nm", "--undefined-only", built], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split()[-1] for line in listed.splitlines()}
    foreign = {
        name
        for name in needed
        if ("torch" in name and not name.startswith("_ZN10crosspoint")) or "c10" in name
    }
    assert "aoti_torch_get_current_cuda_stream" in foreign
    known = set((ROOT / "tests" / "torch_2.11_stable_abi.txt").read_text().split())
    assert foreign <= known, f"not in torch 2.11: {sorted(foreign - known)}"
    waiting = {
        name for name in needed if re.fullmatch(r"cuda(\w+Synchronize|Memcpy|Memset|Malloc|Free)", name)
    }
    assert not waiting, "a binding enqueues, and waits for nothing"
