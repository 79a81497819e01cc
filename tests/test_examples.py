"""Every script in examples/ runs and prints what it promises; as a notebook it holds the same code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def percent(pattern: str, output: str) -> float:
    return float(re.search(pattern + r" ([\d.]+)%", output)[1])


def foreign_code(output: str) -> None:
    assert percent("that are equal:", output) > 99
    assert "knn_graph on cpu with impl='auto' runs" in output


def pyg(output: str) -> None:
    assert percent("test accuracy:", output) > 60  # guessing gives 33


def lightly(output: str) -> None:
    first, last = map(float, re.findall(r"loss ([\d.]+)", output))
    assert last < 0.9 * first


def own_meshes(output: str) -> None:
    assert "12 of 12 shapes prepared" in output
    assert re.search(r"^4 steps, loss \d", output, re.M)
    assert "encoder of 2048 features" in output


def probe(output: str) -> None:
    assert percent("accuracy on 60 clouds:", output) > 50  # guessing gives 17


CHECKS = {
    "lightly_model.py": lightly,
    "linear_probe.py": probe,
    "one_op_in_foreign_code.py": foreign_code,
    "pretrain_own_meshes.py": own_meshes,
    "pyg_model.py": pyg,
}


def test_every_example_is_checked():
    assert [script.name for script in SCRIPTS] == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_example(name, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    CHECKS[name](done.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebook_holds_the_script(script, docs_hooks):
    text = script.read_text()
    cells = docs_hooks.cells(text)
    assert cells[0][0] == "markdown" and cells[0][1].startswith("# ")
    book = nbformat.reads(docs_hooks.notebook(cells), as_version=4)
    nbformat.validate(book)
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    without_markup = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in code.splitlines() if line and not line.startswith("#")] == without_markup
