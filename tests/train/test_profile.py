"""crosspoint profile: what it says of a run of seconds."""

import json

import pytest

import tiny_run
from crosspoint.train.profile import ProfileConfig, format_table, profile
from tiny_run import STEPS, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setattr(tiny_run.models, "build", tiny_run.build_tiny)


def config_of(data, out, **changes) -> ProfileConfig:
    return ProfileConfig(**vars(tiny_config(data, out)) | {"steps": 3, "warm_up": 1, **changes})


def test_parts_add_up_to_a_step(data, tmp_path, capsys):
    results = profile(config_of(data, tmp_path))
    step, parts = results["step"], results["parts"]
    assert list(parts) == ["wait for data", "augment", "forward", "backward", "optimizer"]
    assert all(part["host_ms"] > 0 and part["gpu_ms"] is None for part in parts.values())
    assert sum(part["host_ms"] for part in parts.values()) < 1e3 * step["seconds"]
    assert step["pairs_per_second"] == pytest.approx(4 / step["seconds"])
    assert results["pipeline"]["pairs_per_second"] > 0 and results["pipeline"]["cpu_ms_per_pair"] > 0
    calls = {row["name"]: row["calls"] for row in results["operators"]}
    assert len(calls) == 12 and all(row["ms"] > 0 for row in results["operators"])
    assert sum(row["ms"] for row in results["operators"]) < 1e3 * step["seconds"]

    assert json.loads((tmp_path / "profile.json").read_text()) == results
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "forward" for event in trace) == 3
    assert not (tmp_path / "state.pt").exists()
    said = capsys.readouterr().out
    assert format_table(results) in said and " ms of a core each" in said
    assert said.count("%") == len(parts) + 1 + 12


def test_a_step_in_parts(data, tmp_path):
    results = profile(config_of(data, tmp_path, part_size=2, steps=1, warm_up=0))
    assert list(results["parts"]) == ["wait for data", "augment", "forward and backward", "optimizer"]
    assert results["pipeline"]["cpu_ms_per_pair"] is None  # no batch after the first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": STEPS}, f"the training has {STEPS} steps, fewer than warm_up"),
        ({"resume": True}, "resume must be off"),
        ({"points": 0}, "points must be at least"),
        ({"cuda_graph": True}, "cuda_graph needs one process with a GPU, got 1 on 'cpu'"),
    ],
)
def test_options_that_cannot_work(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        profile(config_of(data, tmp_path, **changes))
