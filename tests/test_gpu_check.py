"""scripts/gpu_check.sh, rehearsed without a GPU, and the table of preferences that its results decide."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import contrast_paths
from benchmarks.gpu_check import deterministic, forward_backward
from benchmarks.knn_paths import SETTINGS, forced
from benchmarks.preferences import committed, faster
from benchmarks.small_calls import CALLS, small_calls
from crosspoint import ops
from crosspoint.ops import _dispatch, _preferences

ROOT = Path(__file__).parents[1]
STAGES = [
    "install",
    "build",
    "environment",
    "behaviour",
    "speeds",
    "steps",
    "paths",
    "battery",
    "wgmma",
    "sanitizers",
]
STATUSES = {"passed", "failed", "timed out", "no time left", "needs a GPU"}


def gpu_check(out: Path, *arguments: str, **environment: str) -> tuple[int, dict]:
    ran = subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", *arguments, out],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (out / "gpu_check.json").exists(), ran.stderr
    whole = json.loads((out / "gpu_check.json").read_text())
    assert list(whole) == ["schema", "stages", "environment", "behaviour", "speeds", "paths", "steps"]
    assert whole["schema"] == 1
    assert list(whole["stages"]) == STAGES
    assert {stage["status"] for stage in whole["stages"].values()} <= STATUSES
    return ran.returncode, whole


def test_rehearsal_runs_every_stage(tmp_path):
    code, whole = gpu_check(tmp_path, "--rehearse", "--only", "knn_graph")
    log = (tmp_path / "log.txt").read_text()
    assert code == 0, log
    status = {name: stage["status"] for name, stage in whole["stages"].items()}
    assert status == {
        **dict.fromkeys(STAGES, "passed"),
        **dict.fromkeys(("build", "wgmma", "sanitizers"), "needs a GPU"),
    }
    facts = {row["name"]: row["value"] for row in whole["environment"]}
    assert facts["device"] == "needs a GPU"
    assert "native" in facts["backends"]["knn_graph"]
    assert {row["op"] for row in whole["behaviour"]} == {"knn_graph"}
    by_check = {(row["check"], row["status"]) for row in whole["behaviour"]}
    assert by_check == {
        ("ten runs give the same bits", "passed"),
        ("CUDA graph", "needs a GPU"),
        ("non-default stream", "needs a GPU"),
    }
    assert {case.op for case in contrast_paths.CASES} == {"nt_xent", "info_nce", "sup_con"}
    by_wgmma = ["CROSSPOINT_WGMMA"] * len(contrast_paths.CASES)
    assert [row["setting"] for row in whole["paths"]] == [setting.name for setting in SETTINGS] + by_wgmma
    assert {row["status"] for row in whole["paths"]} == {"needs a GPU"}
    for row in whole["speeds"]:
        assert row["us"]["native"] > 0
        assert row["us"]["plain"] > 0
        assert row["extra_bytes"] == dict.fromkeys(row["us"], "needs a GPU")
        assert row["errors"] == {"compiled": "needs a GPU"}
    assert [step["model"] for step in whole["steps"]] == ["dgcnn", "crosspoint"]
    for step in whole["steps"]:
        assert (
            step["device"] == "cpu"
            and step["fused"]["shapes_per_second"] > 0
            and step["plain"]["peak_mib"] >= 0
        )
    assert " passed" in whole["stages"]["battery"]["last_line"]
    table = (tmp_path / "table.txt").read_text()
    assert "knn_graph (2, 100, 3), k=5: native" in table and "crosspoint 2 x 64 fused: " in table


def test_a_stage_that_fails_loses_nothing_else(tmp_path):
    code, whole = gpu_check(tmp_path, "--rehearse", "--only", "softmax")
    status = {name: stage["status"] for name, stage in whole["stages"].items()}
    assert code != 0
    assert status["behaviour"] == status["speeds"] == "failed"
    assert status["environment"] == status["battery"] == "passed"
    assert len(whole["environment"]) > 5


def test_out_of_time(tmp_path):
    code, whole = gpu_check(tmp_path, "--rehearse", GPU_CHECK_SECONDS="1")
    assert code != 0
    assert {stage["status"] for stage in whole["stages"].values()} == {"no time left"}


def test_it_needs_a_gpu_or_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ran = subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", tmp_path],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "--rehearse" in ran.stderr


def test_every_operator_has_small_calls():
    assert set(CALLS) == {row.op for row in ops.describe_backends()}


@pytest.mark.parametrize("op", CALLS)
def test_small_calls_repeat_and_reach_every_input(op):
    """As the stage `behaviour` calls them; and they agree with the reference, so that they are what they seem."""
    for small in small_calls("cpu", op):
        deterministic(small, "native")
        expected = forward_backward(small, "reference")
        for found, wanted in zip(forward_backward(small, "native"), expected, strict=True):
            if wanted.is_floating_point():
                assert (found - wanted).nan_to_num().norm() <= 1e-4 * wanted[wanted.isfinite()].norm()
        gradients = expected[-len(small.inputs) :] if op != "knn_graph" else []
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_settings_of_paths_are_those_of_the_source(monkeypatch):
    source = (ROOT / "csrc" / "cuda" / "knn_paths.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"int64_t (k\w+) = (\d+);", source)}
    assert numbers.keys() == {setting.name for setting in SETTINGS}
    monkeypatch.delenv("CROSSPOINT_KNN_PATH", raising=False)
    for setting in SETTINGS:
        assert all(path in source for path in setting.paths)
    with forced("tree"):
        assert os.environ["CROSSPOINT_KNN_PATH"] == "tree"
    assert "CROSSPOINT_KNN_PATH" not in os.environ


def test_preferences_follow_the_committed_results():
    assert faster(committed()) == _preferences.FASTER


def test_faster_is_decided_over_all_cases_that_both_ran():
    def row(op: str, **us: float) -> dict:
        return {"op": op, "us": us}

    results = [
        {"speeds": [row("knn", native=10, triton=30), row("knn", native=20, triton=10)]},
        {"speeds": [row("nt_xent", native=10, triton=9), row("edge_conv", native=5), row("knn", triton=1)]},
    ]
    assert faster(results) == {"knn": "native", "nt_xent": "triton"}


def test_auto_tries_the_faster_backend_first(monkeypatch):
    monkeypatch.setitem(_preferences.FASTER, "an_op", "triton")
    monkeypatch.setattr(_dispatch, "_table", {})
    _dispatch.register("an_op", "an_operator")
    _dispatch.register("another_op", "an_operator")
    first = {key: next(iter(rows)) for key, rows in _dispatch._table.items()}
    assert first == {
        ("an_op", "cpu"): "native",
        ("an_op", "cuda"): "triton",
        ("another_op", "cpu"): "native",
        ("another_op", "cuda"): "native",
    }
