"""docs/extending.md done as it says: its files are built in a copy of the repository and pass the battery."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
FILE = re.compile(r'^```(?:cpp|python) title="([^"]+)"( append)?\n(.*?)^```$', re.M | re.S)
LEFT_OUT = shutil.ignore_patterns("*.so", "__pycache__", "simt", "*.egg-info")


def run(folder: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=290
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """The repository with the page's files in it, and its build: the objects of the other kernels are taken over."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("crosspoint", "csrc", "kernels", "build/kernels", "tests/ops"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=LEFT_OUT)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    for recipe in (copy / "build").rglob("*.txt"):  # the commands that made the objects name their folder
        recipe.write_text(recipe.read_text().replace(str(ROOT), str(copy)))
    for name, append, content in FILE.findall(PAGE.read_text()):
        path = copy / name
        assert path.exists() == bool(append), f"{name}: new files are whole, others are appended to"
        with open(path, "a") as file:
            file.write("\n" + content if append else content)
        if path.suffix == ".h":
            os.utime(path, (0, 0))  # an older header than every object, which it is new to anyway
    run(copy, "setup.py", "-q", "build_ext", "--inplace")
    return copy


def test_page_names_its_files():
    assert len(FILE.findall(PAGE.read_text())) == PAGE.read_text().count('title="') >= 9


def test_new_operator_and_backend_pass_the_battery(extended):
    printed = run(
        extended, "-m", "pytest", "-v", "-o", "pythonpath=tests/ops", "tests/ops/test_cloud_scatter.py"
    )
    values = [line for line in printed.splitlines() if "test_forward_matches_reference[" in line]
    for backend in ("native-cpu", "matmul-cpu"):
        assert sum(f"{backend}-" in line or f"-{backend}" in line for line in values) == 4 * 5, values
    assert " SKIPPED" not in printed


def test_new_backend_is_chosen_and_explained(extended):
    code = """
import torch
from crosspoint import explain, ops

x = torch.randn(2, 9, 3)
print(explain(ops.cloud_scatter, x, impl="matmul").runs, explain(ops.cloud_scatter, x).runs)
print([row.backend for row in ops.describe_backends() if (row.op, row.device) == ("cloud_scatter", "cpu")])
try:
    ops.knn_graph(x, 3, impl="matmul")
except ValueError as error:
    print(error)
"""
    chosen, backends, refused = run(extended, "-c", code).splitlines()
    assert chosen == "matmul native"
    assert backends == "['native', 'triton', 'matmul', 'reference']"
    assert "impl must be one of" in refused and "matmul" not in refused.partition("got")[0]
