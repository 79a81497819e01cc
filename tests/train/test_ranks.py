"""Pre-training by several processes, as torchrun starts them: the steps of one process, through every fault."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_ranks
import tiny_run
from crosspoint.train import pretrain
from crosspoint.train.checkpoint import load_state
from crosspoint.train.log import read_log
from crosspoint.train.nonfinite import load_batch, replay
from crosspoint.train.ranks import Ranks, joined
from crosspoint.train.sharded import find_sharded
from tiny_run import STEPS, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def no_draws(monkeypatch):
    tiny_ranks.without_draws(monkeypatch.setattr)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The losses of every step in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_ranks.without_draws(patch.setattr)
        pretrain(tiny_config(data, out))
    return losses(out)


def losses(out: Path) -> dict[int, list[float]]:
    records = read_log(out / "log.jsonl")
    assert len({record["step"] for record in records}) == len(records)
    names = ("loss", "intra_modal", "cross_modal", "grad_norm")
    return {record["step"]: [record[name] for name in names] for record in records}


def torchrun(world: int, *command: object, restarts: int = 0) -> subprocess.CompletedProcess:
    options = [f"--nproc-per-node={world}", f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def assert_same_steps(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-6), step


def test_a_dead_rank_is_named_and_a_restart_resumes(data, alone, tmp_path):
    """Two ranks with half of the model each, one of which is killed in step 4: the other says so, torchrun starts both
    again, and they go on."""
    out = tmp_path / "run"
    done = torchrun(2, tiny_ranks.__file__, data, out, 1, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "ConnectionError: rank 0 of 2 has lost contact to another rank" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr
    assert_same_steps(losses(out), alone)
    assert find_sharded(out / "state").step == STEPS


def test_three_uneven_ranks_and_another_number_continues(data, alone, tmp_path, no_draws):
    """Batches of four over three ranks; after a death one process goes on from their checkpoint."""
    out = tmp_path / "run"
    done = torchrun(3, tiny_ranks.__file__, data, out, 2)
    assert done.returncode != 0
    assert load_state(out / "state.pt").step == 3
    pretrain(tiny_config(data, out, checkpoint_every=3, resume=True))
    assert_same_steps(losses(out), alone)


def test_a_loss_of_nan_stops_all_ranks(tmp_path):
    """From the command line: the step, its shapes and the file at fault are named, the state before it and each rank's
    batch are saved, no rank is waited for."""
    data, out = tiny_run.write_pairs(tmp_path / "pairs", 4), tmp_path / "run"
    cloud = data / "ShapeNet" / "table" / "shape03.ply"
    content = bytearray(cloud.read_bytes())
    huge = np.full(6, 3e38, "<f4").tobytes()  # finite, unlike the sum of two
    content[-64 * 12 : -62 * 12] = huge
    cloud.write_bytes(content)
    options = [
        "--epochs=1",
        "--batch-size=4",
        "--points=48",
        "--image-size=32",
        "--workers=0",
        "--device=cpu",
    ]
    options += ["--model.point-encoder=pointnet", "--model.image-encoder=resnet18"]
    done = torchrun(2, "-m", "crosspoint", "pretrain", data, "--out", out, *options)
    assert done.returncode != 0
    said = [
        line for line in done.stderr.splitlines() if "crosspoint pretrain: error: step 1: loss nan" in line
    ]
    folder, fault = (
        out / "nonfinite_step1",
        f"table/shape03 (its cloud after augmentation, finite in {cloud})",
    )
    shapes = "chair/shape00, chair/shape02, table/shape01, table/shape03"
    assert len(said) == 2, done.stderr
    for line in said:
        assert fault in line and str(folder) in line, line
        named = line.split("Its shapes: ")[1].split(". ")[0]
        assert sorted(named.split(", ")) == shapes.split(", ")
    assert "lost contact" not in done.stderr
    state = load_state(out / "state.pt")
    assert state.step == 0 and all(value.isfinite().all() for value in state.model.values())
    batches = [load_batch(folder / f"rank{rank}.pt") for rank in range(2)]
    assert [(batch.rank, batch.world, len(batch.names)) for batch in batches] == [(0, 2, 2), (1, 2, 2)]
    again = replay(folder)
    assert list(again.bad_inputs) == ["table/shape03"] and again.module.startswith("point_encoder.")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parts_make_the_batch(world):
    ranks = [Ranks(torch.device("cpu"), rank, world) for rank in range(world)]
    parts = [rank.part(list(range(7))) for rank in ranks]
    assert [item for part in parts for item in part] == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len({rank.key for rank in ranks}) == world


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cpu") as ranks:
        assert (
            ranks == Ranks(torch.device("cpu")) and ranks.first and ranks.any(True) and not ranks.any(False)
        )
    assert not torch.distributed.is_initialized()


def test_one_gpu_for_all_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="'auto' with several processes on a machine, got 'cuda:0'"),
        joined("cuda:0"),
    ):
        pass
