"""The gate against another commit. Builds are faked: a folder on PYTHONPATH changes operators in that side's processes,
which sleep in every call or answer wrongly."""

import json
import random
import statistics
from contextlib import contextmanager

import pytest

from benchmarks import compare


@pytest.fixture
def built_as(monkeypatch):
    """Takes an environment for the other commit's build."""

    def fake(env):
        @contextmanager
        def built(ref):
            yield env

        monkeypatch.setattr(compare, "built", built)

    return fake


def test_a_regression_and_a_wrong_answer_fail_the_gate(
    built_as, changed_operators, monkeypatch, tmp_path, capsys
):
    slow, out = "time.sleep(0.05); return real(*given, **named)", tmp_path / "compare.json"
    built_as({"PYTHONPATH": changed_operators(info_nce=slow)})
    here = changed_operators(nt_xent=slow, sup_con="return 1.01 * real(*given, **named)")
    monkeypatch.setenv("PYTHONPATH", here)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(compare, "_AGAIN", 1)
    only = ["--only", "nt_xent", "sup_con", "info_nce", "--size", "tiny"]
    status = compare.main(["some-commit", *only, "--rounds", "6", "--out", str(out)])
    said = capsys.readouterr().out
    rows = {row["case"].split()[0]: row for row in json.loads(out.read_text())["rows"]}
    assert status == 1
    assert rows["nt_xent"]["verdict"] == "slower" and statistics.median(rows["nt_xent"]["ratios"]) > 1
    assert len(rows["nt_xent"]["again"]) == 1  # in processes of its own
    assert rows["sup_con"]["verdict"] == "wrong" and not {"ms", "ratios"} & set(rows["sup_con"])
    assert rows["info_nce"]["verdict"] == "faster"
    assert "slower: nt_xent N=16" in said and "wrong: sup_con" in said and "a regression" in said


def test_no_regression_passes(built_as, monkeypatch, capsys):
    built_as({})
    verdicts = ("same", "faster", "new")
    monkeypatch.setattr(compare, "compare", lambda *_: [{"case": "x", "verdict": v} for v in verdicts])
    assert compare.main(["some-commit", "--size", "tiny"]) == 0
    assert "no regression" in capsys.readouterr().out


def test_what_the_other_commit_cannot_do_is_new():
    old, new = {"failed": "AttributeError: no such operator"}, {"right": True, "error": 0.0}
    row = {"case": "x", "old": old, "new": new}
    row["verdict"] = compare._verdict(row, 0.05)
    assert row["verdict"] == "new"
    assert "the other commit: AttributeError" in compare.line(row)


def test_noise_is_no_regression():
    random.seed(0)
    alarms = sum(
        compare.slower([random.lognormvariate(0, 0.1) for _ in range(15)], tolerance=0.02)
        for _ in range(1000)
    )
    assert alarms < 40  # the interval leaves out 1 by chance in 2.5 % at the most
    assert compare.slower([random.lognormvariate(0.2, 0.1) for _ in range(15)], tolerance=0.05)
    assert not compare.slower([1.03 + 0.001 * i for i in range(15)], tolerance=0.05)  # sure, but too small


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (9, 2, 8), (15, 4, 12), (21, 6, 16)])
def test_interval_is_that_of_the_tables(n, low, high):
    assert compare.interval([float(i) for i in range(n, 0, -1)]) == (low, high)


def test_a_side_that_would_measure_another_package_is_refused(tmp_path):
    env = {"PYTHONPATH": str(compare._ROOT), compare._SITE: str(tmp_path)}  # where there is none
    with pytest.raises(compare.Unusable, match="would measure"), compare.Side(env):
        pass


def test_an_unknown_commit(capsys):
    assert compare.main(["no-such-commit", "--size", "tiny"]) == 2
    assert "no-such-commit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["main", "--rounds", "5"], ["main", "--case", "nothing has this name"]]
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as stop:
        compare.main(arguments)
    assert stop.value.code == 2
