"""Sharded pre-training: one run by three, two and one processes, sharded and not, through faults: the same steps."""

import dataclasses
import json
import multiprocessing
import pickle
import re
import signal

import pytest
import torch

import sharded_ranks
import tiny_ranks
import tiny_run
from crosspoint import models
from crosspoint.models import checkpoints
from crosspoint.train import pretrain
from crosspoint.train.checkpoint import Progress, TrainState, load_state, save_state
from crosspoint.train.config import config_to_dict
from crosspoint.train.log import read_log
from crosspoint.train.optim import LAMB
from crosspoint.train.ranks import Ranks
from crosspoint.train.sharded import find_sharded, save_sharded
from tiny_run import STEPS, pretrain_module, tiny_config

ALONE = Ranks(torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The run folder after the last turn of several processes, and what each said: {turn: [(error, files), ...]}."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=sharded_ranks.work, args=(rank, data, out)) for rank in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that still waits for the others
    assert codes == [0, 0, -signal.SIGKILL]
    said = {}
    for path in sorted(out.parent.glob("run.*.[01]")):
        said.setdefault(path.name.split(".")[1], []).append(json.loads(path.read_text()))
    return out, said


def test_a_rank_dies_in_writing(run):
    for error, left in run[1]["three of which one dies"]:
        assert error.startswith("ConnectionError: rank")
        assert set(left) == {"state", "state/step-2", "state/step-4.tmp"}


def test_a_full_disk_keeps_the_former_state(run):
    for error, left in run[1]["two on a full disk"]:
        assert error.startswith("OSError: ") and "the checkpoint of step 4 could not be written" in error
        assert "(rank 1: " in error and "--resume" in error
        assert left == ["state", "state/step-2"]


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        ("weights", r"checkpoint of step 4 could not be written to .*weights\.safetensors"),
        ("a state", r"checkpoint of step 4 could not be written to .*state\.pt"),
        ("a log", "log of step 4 could not be written to .*run"),
    ],
)
def test_a_full_disk_of_the_first_rank_ends_all(run, turn, what):
    """With the reason; the former state stays, and once there is room the run goes on from it."""
    errors = []
    for error, left in run[1][f"two without room for {turn}"]:
        errors.append(error.replace("OSError: on the first rank: ", "OSError: "))
        assert re.match(rf"OSError: the {what} \(\[Errno 28\] No space left on device\)", errors[-1]), error
        assert "intact" in error and "--resume" in error
        assert left == ["state", "state/step-3"]
    assert len(errors) == 2 and errors[0] == errors[1]


def test_a_nan_in_one_share_stops_all(run):
    """The state before that step is saved, and the runs that go on from it are as if nothing had been."""
    for error, left in run[1]["two that meet a NaN"]:
        assert error.startswith("FloatingPointError: step 4: loss ") and "grad_norm nan" in error
        assert left == ["state", "state/step-3"]


def test_each_kind_takes_the_place_of_the_other(run):
    assert run[1]["two"] == [["InterruptedError: ", ["state.pt"]]] * 2
    assert run[1]["two again"] == [["InterruptedError: ", ["state", "state/step-5"]]] * 2


def test_all_steps_are_those_of_one_process(data, run, tmp_path):
    """One process ends the run; it has the losses of every step, and the weights, of one that made it alone."""
    out, _ = run
    weights = checkpoints._read(out / "weights.safetensors")[0]
    runs = [out, tmp_path / "alone"]
    with pytest.MonkeyPatch.context() as patch:
        tiny_ranks.without_draws(patch.setattr)
        model = models.build(tiny_config(data, out).model)
        find_sharded(out / "state").restore(model, torch.optim.Adam(model.parameters()))
        for folder in runs:
            pretrain(tiny_config(data, folder, resume=True))
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value), name
    found, alone = (read_log(folder / "log.jsonl") for folder in runs)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    for record, expected in zip(found, alone, strict=True):
        for name in ("loss", "intra_modal", "cross_modal", "grad_norm"):
            assert record[name] == pytest.approx(expected[name], rel=1e-6), (record["step"], name)
    found, alone = (load_state(folder / "state.pt").model for folder in runs)
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    assert not (out / "state").exists()


def small(folder, step=3):
    """A model, its optimizer after a step, and their state, written."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = LAMB(model.parameters(), lr=0.1)
    model[:2](torch.randn(5, 3)).square().sum().backward()  # the last layer has no gradient
    optimizer.step()
    progress = Progress(step, {"a": [1]}, "shapes", {"loss": 0.1}, 2.5)
    save_sharded(folder, progress, model, optimizer, ALONE)
    return model, optimizer, progress


def test_a_round_trip(tmp_path):
    """Parameters without a state stay without; a state of the same step is not written again."""
    model, optimizer, progress = small(tmp_path)
    state = find_sharded(tmp_path)
    assert {**vars(state), "path": None} == {**vars(progress), "path": None}
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    restored = LAMB(other.parameters(), lr=0.1)
    state.restore(other, restored)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert restored.state_dict().keys() == optimizer.state_dict().keys()
    for i, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(restored.state_dict()["state"][i][name], value)
    assert len(restored.state) == 4
    files = {path: path.stat().st_mtime_ns for path in state.path.iterdir()}
    save_sharded(tmp_path, progress, model, optimizer, ALONE)
    assert {path: path.stat().st_mtime_ns for path in state.path.iterdir()} == files


def test_only_whole_states_are_found(tmp_path):
    assert find_sharded(tmp_path) is None
    small(tmp_path, 9)
    (tmp_path / "step-10.tmp").mkdir()
    small(tmp_path / "more", 10)
    (tmp_path / "more" / "step-10").rename(tmp_path / "step-10")  # killed before it removed the former
    assert find_sharded(tmp_path).step == 10
    model, optimizer, _ = small(tmp_path, 11)
    assert [path.name for path in tmp_path.iterdir()] == ["step-11"]
    damaged = find_sharded(tmp_path)
    part = next(damaged.path.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-11 is not a state of this version"):
        damaged.restore(model, optimizer)
    (damaged.path / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="step-11 is not a state of this version"):
        find_sharded(tmp_path)


def test_the_later_state_counts(data, tmp_path):
    """Where a kill has left both kinds."""
    model, optimizer, progress = small(tmp_path / "state", 2)
    config = tiny_config(data, tmp_path, resume=True)
    progress.config = config_to_dict(config)
    save_sharded(tmp_path / "state", dataclasses.replace(progress, step=3), model, optimizer, ALONE)
    for step in (2, 4):
        values = {**vars(progress), "step": step}
        save_state(tmp_path / "state.pt", TrainState(**values, model={}, optimizer={}))
        assert pretrain_module._find_state(config, tmp_path, print).step == max(3, step)


def test_a_state_of_another_model_is_refused(tmp_path):
    model, optimizer, _ = small(tmp_path)
    with pytest.raises(ValueError, match=r"the model has no model\.1\.bias"):
        find_sharded(tmp_path).restore(model[:1], optimizer)


def test_loads_without_running_code(tmp_path):
    model, optimizer, _ = small(tmp_path)

    class Attack:
        def __reduce__(self):
            return print, ("code of the file runs",)

    state = find_sharded(tmp_path)
    (state.path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"its index names builtins\.print"):
        state.restore(model, optimizer)
