"""What is measured: who is timed, memory, growth, whole steps."""

import argparse

import pytest
import torch

from benchmarks import machine, measure, memory, registry, run, scaling, train_step
from crosspoint import ops


def tiny(op):
    return next(registry.cases([op], ("tiny",)))


@pytest.mark.parametrize("op", registry.OPS)
def test_every_operator_agrees_with_plain_pytorch_before_it_is_timed(op):
    names = ["cdist"] if op == "knn" else ["plain"]
    row = measure.measure(tiny(op), names, rounds=1)
    assert set(row["ms"]) == {row["ours"], *names} and all(check["right"] for check in row["checks"].values())
    assert row["floor"]["bytes"] > 0 and row["floor"]["flops"] > 0
    assert any("ratio" in line for line in run.lines(row))


def test_no_speed_of_our_wrong_answer(monkeypatch):
    real = ops.gather_max

    def wrong(x, idx, impl):
        values, slots = real(x, idx, impl=impl)
        return (values if impl == "reference" else values + 1), slots

    monkeypatch.setattr(ops, "gather_max", wrong)
    row = measure.measure(tiny("gather_max"), ["plain"], rounds=1)
    assert not row["ms"] and not row["ratio"]
    assert "no speed is reported" in "\n".join(run.lines(row))


def test_no_speed_of_a_wrong_peer(monkeypatch):
    table = measure.peers.PEERS["plain"]._replace(functions=lambda: {"neighbor_sum": lambda x, idx: x})
    monkeypatch.setitem(measure.peers.PEERS, "plain", table)
    row = measure.measure(tiny("neighbor_sum"), ["plain"], rounds=1)
    assert set(row["ms"]) == {row["ours"]} and not row["ratio"]
    assert not row["checks"]["plain"]["right"]


# ---- memory


def test_peak_memory_is_that_of_the_call():
    case = registry.Case("neighbor_sum", "", {"B": 4, "N": 512, "k": 20, "C": 256})
    ours, plain = (memory.peak_apart(case, name) for name in ("native", "plain"))
    gathered = 4 * 4 * 512 * 20 * 256
    assert plain > gathered  # all neighbours' rows
    assert ours < gathered / 2


def test_peak_memory_of_what_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"memory of scipy in gather_max .* failed: KeyError"):
        memory.peak_apart(tiny("gather_max"), "scipy")


# ---- growth


def test_slope_of_a_power():
    assert scaling.slope({str(n): 3.0 * n**1.7 for n in (10, 20, 80)}) == pytest.approx(1.7)


def test_growth_in_time_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SWEEPS", {"nt_xent": ({"N": 16, "D": 24}, {"N": (16, 32), "D": (8, 24)})})
    monkeypatch.setattr(scaling, "peak_apart", lambda case, name: 1000 * case.sizes["N"] ** 2)
    over_n, over_d = scaling.growth(["nt_xent"], ["plain"], rounds=1, memory=True)
    assert set(over_n["ms"]["plain"]) == {"16", "32"} and set(over_n["slope"]) == {over_n["ours"], "plain"}
    assert over_n["slope_bytes"]["plain"] == pytest.approx(2)
    assert over_d["size"] == "D" and "peak_bytes" not in over_d  # memory over the batch alone
    assert "slope" in capsys.readouterr().out


def test_growth_over_threads(capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (row,) = scaling.over_threads([tiny("gather_max")], rounds=1)
    finally:
        torch.set_num_threads(before)
    assert set(row["ms"]) == {"1", "2"} and row["speedup"]["1"]["median"] == 1


# ---- the machine


def test_facts_and_limits_of_this_machine():
    facts = machine.facts()
    assert facts["threads"] == torch.get_num_threads() and facts["malloc"] in ("default", "tuned")
    assert all(rate > 0 for rate in machine.limits(seconds=0.01).values())


def test_limits_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert machine._compiled_peak() is None


def test_share_of_others_is_what_is_not_ours(monkeypatch):
    now = iter([(100.0, 40.0, 30.0), (110.0, 48.0, 33.0)])  # seconds: there were, were used, by us
    monkeypatch.setattr(machine.Others, "_now", staticmethod(lambda: next(now)))
    others = machine.Others()
    assert others.share() is None
    with others.watched():
        pass
    assert others.share() == pytest.approx(0.5)


# ---- whole steps


def args_of(**changed):
    values = {
        "model": "crosspoint", "batch": 2, "points": 32, "k": 4, "depth": 18, "image_size": 32, "steps": 2,
        "threads": 1, "malloc": "default", "device": "cpu", "variants": ["fused", "plain"],
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changed})


def test_a_crosspoint_step_of_both_variants():
    result = train_step.measure(args_of())
    assert result["fused"]["loss"] == pytest.approx(result["plain"]["loss"], rel=1e-3)
    assert len(result["plain"]["seconds_all"]) == 2 and result["speedup"] > 0
    assert result["fused"]["shapes_per_second"] == pytest.approx(2 / result["fused"]["seconds"])
    assert result["plain"]["peak_mib"] > 0 and result["device"] == "cpu"


@pytest.mark.parametrize(
    ("first", "exact", "named"),
    [((1.0, 1.1), (1.0, 1.0), "first losses"), ((1.0, 1.001), (1.0, 1.0 + 1e-7), "losses in float64")],
)
def test_variants_that_disagree_have_no_speed(first, exact, named):
    steps = {
        name: [{"seconds": 1.0, "loss": loss, "peak_bytes": 1}]
        for name, loss in zip(("fused", "plain"), first, strict=True)
    }
    with pytest.raises(SystemExit, match=f"no speed is reported: {named}"):
        train_step.summarise(args_of(), steps, {}, list(exact))
    train_step.summarise(args_of(), {"fused": steps["fused"]}, {"plain": "does not fit"}, [exact[0]])


@pytest.mark.parametrize("variant", ["plain", "fused"])
def test_a_batch_that_does_not_fit_fails_alone(variant):
    """Distances of 4 GiB, or a feature of 1.25 GiB, in a process that may take 1."""
    worker = train_step.Worker(variant, args_of(model="dgcnn", batch=64, points=4096), 1 << 30)
    with pytest.raises(train_step.DoesNotFit, match="allocate"):
        worker.step()
    worker.stop()


@pytest.mark.parametrize(
    ("each", "optimizer", "trials"), [(7 << 20, 0, 7), (100 << 20, 0, 7), (17 << 20, 200 << 20, 9)]
)
def test_the_largest_batch_is_found(monkeypatch, each, optimizer, trials):
    most, start = 4 << 30, 700 << 20  # of which the processes know two thirds
    tried = []

    class Fake:
        def __init__(self, variant, args, limit):
            self.batch = args.batch

        def step(self):
            tried.append(self.batch)
            if start + each * self.batch > most:
                raise train_step.DoesNotFit("no")
            return {"peak_bytes": max(optimizer, each * self.batch), "held_bytes": 2 * start // 3}

        def stop(self):
            pass

    monkeypatch.setattr(train_step, "Worker", Fake)
    found = train_step.largest_batch(args_of(), "fused", most)
    truth = (most - start) // each
    assert found["batch"] <= truth < found["too_large"]
    assert found["too_large"] - found["batch"] <= max(1, found["batch"] // 16)
    assert len(tried) <= trials
