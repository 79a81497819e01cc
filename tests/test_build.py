"""The build itself: what objects may contain, and what setup.py says when it cannot go on."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import crosspoint
from crosspoint.ops import _library

ROOT = Path(__file__).parents[1]
OBJECTS = ROOT / "build" / "kernels"


@pytest.mark.skipif(not OBJECTS.exists(), reason="no object files beside the tests")
@pytest.mark.parametrize("variant", ["baseline", "avx2", "avx512"])
def test_variants_define_weak_symbols_in_their_own_namespace_only(variant):
    """A weak symbol outside it could be merged across variants, and hand AVX-512 code to an older processor."""
    objects = sorted((OBJECTS / variant).rglob("*.o"))
    assert objects
    for path in objects:
        command = ["nm", "-C", "--defined-only", path]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        weak = [line for line in listed.splitlines() if re.match(r"[0-9a-f]+ [WVu] ", line)]
        stray = [line for line in weak if f"crosspoint::{variant}::" not in line and "DW.ref" not in line]
        assert not stray, f"{path.name}: {stray[:5]}"


def test_library_needs_no_torch_symbol_newer_than_2_11():
    """tests/torch_2.11_stable_abi.txt lists the C symbols of torch 2.11's stable ABI, from its libraries by nm."""
    known = set((ROOT / "tests" / "torch_2.11_stable_abi.txt").read_text().split())
    command = ["nm", "--dynamic", "--undefined-only", _library.LIBRARY_PATH]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1] for line in listed.splitlines()}
    foreign = {name for name in needed if "torch" in name or "c10" in name}
    assert "torch_library_impl" in foreign
    assert foreign <= known, f"not in torch 2.11: {sorted(foreign - known)}"


@pytest.fixture
def recipe():
    """setup.py as a module: its lists and functions, nothing built."""
    spec = importlib.util.spec_from_file_location("crosspoint_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA 13.0 toolkit as far as setup.py looks."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88"\n'
        '[ "$1" = --list-gpu-code ] && printf "sm_75\\nsm_80\\nsm_90\\nsm_100\\n"\n'
        "exit 0\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("CROSSPOINT_CUDA", raising=False)
    return home


def test_cuda_is_built_where_torch_and_toolkit_have_it(recipe, toolkit):
    cuda = recipe.wanted_cuda("13.0")
    assert cuda == recipe.Cuda(toolkit, "13.0", ("8.0", "9.0", "10.0+PTX")), (
        "what this nvcc knows, PTX of the last"
    )
    assert cuda.nvcc == str(toolkit / "bin" / "nvcc")
    assert cuda.gencode(Path("knn.cu")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_cuda_architectures_can_be_named(recipe, toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    assert recipe.wanted_cuda("13.0").gencode(Path("knn.cu")) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_what_only_hopper_has_is_compiled_for_it(recipe, toolkit, monkeypatch):
    for names in ("8.0 9.0", "8.0 9.0a", "8.0 9.0 9.0a"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
        assert recipe.wanted_cuda("13.0").gencode(Path("nt_xent_wgmma.cu")) == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
        ]


@pytest.mark.parametrize(("names", "error"), [("Hopper", "expected numbers"), ("7.5", "8.0 or later")])
def test_unusable_cuda_architectures_are_refused(recipe, toolkit, monkeypatch, names, error):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
    with pytest.raises(SystemExit, match=error):
        recipe.wanted_cuda("13.0")


@pytest.mark.parametrize(
    ("torch_cuda", "reason"),
    [(None, "torch is built without CUDA"), ("12.8", "built for CUDA 12.8, but .* is of CUDA 13.0")],
)
def test_why_cuda_is_not_built(recipe, toolkit, monkeypatch, torch_cuda, reason):
    assert re.search(reason, recipe.wanted_cuda(torch_cuda))
    monkeypatch.setenv("CROSSPOINT_CUDA", "1")
    with pytest.raises(SystemExit, match=f"CROSSPOINT_CUDA=1, but .*{reason}"):
        recipe.wanted_cuda(torch_cuda)


def test_a_missing_cuda_toolkit_is_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "cuda_home", lambda: None)
    assert "no CUDA toolkit" in recipe.wanted_cuda("13.0")


def test_a_folder_without_headers_is_no_toolkit(recipe, toolkit):
    (toolkit / "include" / "cuda_runtime.h").unlink()
    assert recipe.cuda_home() != toolkit


def test_cuda_can_be_switched_off(recipe, toolkit, monkeypatch):
    monkeypatch.setenv("CROSSPOINT_CUDA", "0")
    assert recipe.wanted_cuda("13.0") == "switched off by CROSSPOINT_CUDA=0"
    monkeypatch.setenv("CROSSPOINT_CUDA", "yes")
    with pytest.raises(SystemExit, match="auto, 0 or 1, got 'yes'"):
        recipe.wanted_cuda("13.0")


def test_an_old_torch_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.raises(SystemExit, match=r"torch >= 2\.11, and this Python has 2\.10\.1"):
        recipe.import_torch()


def test_setup_without_torch_says_what_to_do(tmp_path):
    blocked = tmp_path / "torch"
    blocked.mkdir()
    (blocked / "__init__.py").write_text("raise ImportError('blocked by the test')\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "CROSSPOINT_BUILD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "install torch" in done.stderr and "CROSSPOINT_BUILD=0" in done.stderr


def test_install_without_compiler_builds_a_pure_python_wheel(tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", ".venv*", "build", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    env = {**os.environ, "CROSSPOINT_BUILD": "0", "CXX": "false", "CC": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_there_is_one_version():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert citation.group(1) == crosspoint.__version__


@pytest.mark.parametrize("value", ["avx2", "baseline"])
def test_a_lower_instruction_set_can_be_forced(value):
    code = "from crosspoint.ops import _library; print(_library.cpu_variant())"
    env = {**os.environ, "CROSSPOINT_CPU": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == value, done.stderr


def test_unknown_instruction_set_is_refused():
    code = "from crosspoint.ops import _library; _library.cpu_variant()"
    env = {**os.environ, "CROSSPOINT_CPU": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "CROSSPOINT_CPU must be" in done.stderr
