"""`crosspoint bench`, and the suite's parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, report, run, suite, train_step
from crosspoint import bench, cli


@pytest.fixture
def commands(monkeypatch):
    """The commands that `crosspoint bench` would have run, which end well."""
    seen = []

    def fake(command, cwd):
        seen.append((command, cwd))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench.subprocess, "run", fake)
    return seen


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        ([], suite),
        (["--quick", "--data", "meshes", "--minutes", "2"], suite),
        (["--results", "benchmarks/results/cpu-2core-zen4"], report),
        (["--compare", "main"], compare),
    ],
)
def test_each_form_runs_its_module(commands, arguments, module, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--out", "here", *arguments]) == 0
    ((command, cwd),) = commands
    assert command[:3] == [sys.executable, "-m", module.__name__]
    assert (cwd / "benchmarks" / "suite.py").is_file()
    assert str(tmp_path / "here") in " ".join(command)  # of the caller's folder, not of the checkout


def test_exit_status_is_that_of_the_gate(monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--compare", "main"])
    assert stop.value.code == 1


def test_an_installed_package_says_that_the_suite_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="Clone the repository"):
        bench.bench(bench.BenchConfig(), checkout=tmp_path)


@pytest.mark.parametrize("wrong", [{"results": (Path("a"),), "compare": "main"}, {"minutes": 0}])
def test_bad_options(wrong):
    with pytest.raises(ValueError, match=r"exclude each other|must be positive"):
        bench.BenchConfig(**wrong)


@pytest.mark.parametrize("quick", [True, False])
def test_every_part_is_a_command_that_its_module_knows(quick, monkeypatch):
    chosen = suite.parts(quick=quick, data="meshes")
    assert len({part.file for part in chosen}) == len(chosen)
    for part in chosen:
        if part.module == "benchmarks.run":
            assert run.parse([*part.arguments, "--out", part.file]).rounds > 0
        else:
            monkeypatch.setattr(train_step, "measure", lambda args: {"batch": args.batch})
            monkeypatch.setattr(train_step, "largest_batch", lambda *_: {})
            train_step.main(part.arguments)


def test_parts_end_in_time_and_keep_what_they_measured(tmp_path):
    slow = tmp_path / "slow_part.py"
    slow.write_text(
        "import pathlib, sys, time\npathlib.Path(sys.argv[-1]).write_text('{}')\ntime.sleep(600)\n"
    )
    parts = [
        suite.Part("slow.json", 10, "slow_part", [], {"PYTHONPATH": str(tmp_path)}),
        suite.Part("failing.json", 60, "no_such_module", [], {}),
        suite.Part("late.json", 60, "slow_part", [], {}),
    ]
    troubles = suite.run(parts[:2], tmp_path / "out", 120)
    assert [trouble.split(":")[0] for trouble in troubles] == ["slow.json", "failing.json"]
    assert "ended after its 10 s" in troubles[0] and "failed with 1" in troubles[1]
    assert json.loads((tmp_path / "out" / "slow.json").read_text()) == {}
    assert suite.run(parts[2:], tmp_path / "out", 1) == ["late.json: no time left"]
