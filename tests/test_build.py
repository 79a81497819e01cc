"""The build itself: what objects may contain, and what setup.py says when it cannot go on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import crosspoint

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


@pytest.mark.parametrize("page", ["README.md"])
def test_code_in_the_documentation_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


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
