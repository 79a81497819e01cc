"""`pytest benchmarks --benchmark-only`, inside this process."""

import json

import pytest

from crosspoint import ops


@pytest.fixture
def run(tmp_path, capfd):
    """pytest-benchmark on an operator's tiny cases: exit status, what was printed, the JSON's rows."""

    def once(op, *arguments):
        out = tmp_path / "speed.json"
        command = ["benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider", "--size", "tiny"]
        command += ["--only", op, "--benchmark-json", str(out), "--benchmark-max-time=0.01"]
        status = pytest.main([*command, *arguments])
        said = capfd.readouterr()
        rows = json.loads(out.read_text())["benchmarks"] if out.exists() and out.stat().st_size else []
        return status, said.out + said.err, rows

    return once


def test_groups_by_operator_and_shape(run):
    status, said, rows = run("nt_xent", "--peers", "plain", "faiss")
    assert status == 0, said
    assert {row["group"] for row in rows} == {"nt_xent N=16, D=24, forward + backward"}
    assert [row["params"]["name"] for row in rows] == ["ours", "plain"]
    assert all(row["extra_info"]["error"] < 1e-4 and row["extra_info"]["floor_flops"] > 0 for row in rows)


def test_no_speed_of_a_wrong_answer(run, monkeypatch):
    real = ops.sup_con
    monkeypatch.setattr(
        ops, "sup_con", lambda *given, impl: real(*given, impl=impl) * (1 if impl == "reference" else 1.01)
    )
    status, said, rows = run("sup_con", "--peers", "plain")
    assert status == 1 and not rows
    assert "2 failed" in said and "our answer is wrong" in said, said  # the peer's test as ours


def test_unknown_peers_are_refused(run):
    status, said, _ = run("nt_xent", "--peers", "plane")
    assert status != 0 and "plane unknown" in said
