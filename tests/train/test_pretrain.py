import contextlib
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import crosspoint
import tiny_run
from crosspoint import models
from crosspoint.data import PairDataset
from crosspoint.data import pack as pack_module
from crosspoint.data.pack import PackConfig, pack
from crosspoint.data.prepare import PrepareConfig
from crosspoint.ops import _dispatch
from crosspoint.train import pretrain
from crosspoint.train.card import write_card
from crosspoint.train.checkpoint import load_state
from crosspoint.train.config import load_config
from crosspoint.train.log import read_log
from crosspoint.train.nonfinite import load_batch, replay
from crosspoint.train.optim import learning_rate
from crosspoint.train.ranks import Ranks
from tiny_run import BATCH, EPOCHS, SHAPES, STEPS, pretrain_module, tiny_config

ROOT = Path(tiny_run.__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def small_and_repeatable(monkeypatch):
    monkeypatch.setattr(models, "build", tiny_run.build_tiny)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that was never interrupted: its folder and its summary."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", tiny_run.build_tiny)
        torch.set_num_threads(1)
        summary = pretrain(tiny_config(data, out))
    return out, summary


def weights(out):
    return load_state(out / "state.pt").model


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_run_folder(data, finished):
    out, summary = finished
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.yaml", "log.jsonl", "state.pt", "tensorboard", "weights.safetensors",
    }  # fmt: skip
    assert load_config(type(tiny_config(data, out)), out / "config.yaml") == tiny_config(data, out)
    records = read_log(out / "log.jsonl")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in records] == [1, 1, 2, 2, 3, 3]
    for record in records:
        assert record["loss"] == pytest.approx(record["intra_modal"] + record["cross_modal"], rel=1e-6)
        assert {"lr", "grad_norm", "shapes_per_second"} < record.keys()
    assert summary["shapes"] == SHAPES
    assert summary["steps"] == STEPS
    assert summary["loss"] == records[-1]["loss"]
    assert summary["shapes_per_second"] > 0
    json.dumps(summary)


def test_model_card_tells_what_made_the_weights(finished):
    out, summary = finished
    card = (out / "README.md").read_text()
    for text in (
        "finished",
        f"{SHAPES} shapes in 2 folders",
        "48 points each",
        f"| loss | {summary['loss']:.6g} |",
        "| model.k | 4 |",
        "| seed | 0 |",
        f"| crosspoint | {crosspoint.__version__}",
        f"| torch | {torch.__version__} |",
        "| device | cpu |",
    ):
        assert text in card, text
    program = re.search(r"```python\n(.*?)```", card, re.S)[1]
    space = {}
    exec(program, space)
    assert space["encoder"](torch.randn(1, 20, 3)).shape == (1, 2048) and "features (B, 2048)" in program


def test_card_of_an_unfinished_run_says_so(finished, tmp_path):
    write_card(
        tmp_path, tiny_config("d", tmp_path), shapes=["a/b"], device=torch.device("cpu"), step=2, total=6,
        metrics={"loss": 1.25}, seconds=3.0,
    )  # fmt: skip
    assert "stopped or still running: 2 of 6 steps" in (tmp_path / "README.md").read_text()


def test_weights_file_holds_the_final_weights(finished):
    import safetensors.torch as safetensors

    out, _ = finished
    stored = safetensors.load_file(out / "weights.safetensors")
    for name, value in weights(out).items():
        assert torch.equal(stored[name], value), name


def test_tensorboard_gets_every_logged_value(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = finished
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    records = read_log(out / "log.jsonl")
    for name in ("loss", "intra_modal", "cross_modal", "lr"):
        scalars = events.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [r["step"] for r in records]
        assert [s.value for s in scalars] == pytest.approx([r[name] for r in records], rel=1e-6)


def test_learning_rate_is_a_cosine_that_never_trains_at_zero(finished):
    out, _ = finished
    rates = [r["lr"] for r in read_log(out / "log.jsonl")][::2]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.25e-3])
    long = tiny_config(Path(), out, epochs=100)
    rates = [learning_rate(long, epoch, 1) for epoch in range(100)]
    assert rates[0] == long.lr
    assert rates == sorted(rates, reverse=True)
    assert rates[50] == pytest.approx(long.lr / 2)
    assert 0 < rates[-1] < 1e-3 * long.lr


def test_same_seed_same_weights_whatever_the_loader(data, finished, tmp_path):
    out, _ = finished
    torch.manual_seed(99)
    before = torch.get_rng_state()
    pretrain(tiny_config(data, tmp_path / "again", workers=2))
    assert_same_weights(out, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state changed"


def test_another_seed_other_weights(data, finished, tmp_path):
    out, _ = finished
    pretrain(tiny_config(data, tmp_path / "other", seed=1))
    first, second = read_log(out / "log.jsonl")[0], read_log(tmp_path / "other/log.jsonl")[0]
    assert first["loss"] != second["loss"]


def test_every_epoch_draws_full_batches_of_distinct_shapes(data, tmp_path, monkeypatch):
    seen, views = [], []

    class Spy(PairDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            seen.append(index)
            views.append(item["image"].float().mean().item())
            return item

    monkeypatch.setattr(pack_module, "PairDataset", Spy)
    pretrain(tiny_config(data, tmp_path / "run"))
    used = SHAPES // BATCH * BATCH
    epochs = [seen[i : i + used] for i in range(0, len(seen), used)]
    assert len(epochs) == EPOCHS
    assert all(len(set(epoch)) == used for epoch in epochs)
    assert len(set(map(tuple, epochs))) == EPOCHS
    drawn = {}
    for index, view in zip(seen, views, strict=True):
        drawn.setdefault(index, set()).add(view)
    assert max(map(len, drawn.values())) == 2, "one shape shows one view in all epochs"


def test_ablations_train(data, tmp_path, monkeypatch):
    shapes, crops = [], []

    class Spy(pretrain_module.ImageAugmentation):
        def __call__(self, images, generator):
            crops.append(self.crop)
            return super().__call__(images, generator)

    def build(config):
        model = tiny_run.build_tiny(config)
        model.image_encoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        return model

    monkeypatch.setattr(pretrain_module, "ImageAugmentation", Spy)
    monkeypatch.setattr(models, "build", build)
    config = tiny_config(data, tmp_path / "views", epochs=1, views=2, crop=0.3)
    pretrain(config)
    assert set(shapes) == {(2 * BATCH, 3, 16, 16)} and set(crops) == {0.3}
    assert load_config(type(config), tmp_path / "views/config.yaml") == config
    monkeypatch.setattr(
        models,
        "build",
        lambda config: models.CrossPoint(
            models.DGCNN(config.k, projection_dim=16), tiny_run.TinyImageEncoder(), cross_weight=0.0
        ),
    )
    summary = pretrain(tiny_config(data, tmp_path / "intra", epochs=1))
    assert summary["cross_modal"] == 0 and summary["loss"] == summary["intra_modal"] > 0


def test_every_step_draws_its_own_two_views(data, tmp_path, monkeypatch):
    draws = []
    original = pretrain_module.CloudAugmentation

    class Spy:
        def __init__(self, **options):
            self.augmentation = original(**options)

        def __call__(self, points, generator):
            draws.append(generator.get_state().numpy().tobytes())
            return self.augmentation(points, generator)

    monkeypatch.setattr(pretrain_module, "CloudAugmentation", Spy)
    pretrain(tiny_config(data, tmp_path / "run"))
    assert len(draws) == 2 * STEPS
    assert len(set(draws)) == 2 * STEPS


def test_killed_and_resumed_equals_uninterrupted(data, finished, tmp_path):
    """One run, killed again and again: in a step, in the middle of an epoch, while writing either file."""
    out = tmp_path / "killed"
    script = Path(tiny_run.__file__)
    assert 3 % (SHAPES // BATCH), "the first checkpoint, after step 3, is to fall into an epoch"
    moments = [  # where it dies, and the step of the state that this leaves
        ("step", 1, None),
        ("state.pt", 0, None),
        ("step", 4, 3),
        ("step", 1, 3),
        ("weights.safetensors", 0, 3),
        ("state.pt", 0, 3),
    ]
    for where, nth, step in moments:
        done = subprocess.run(
            [sys.executable, script, data, out, where, str(nth)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (out / "state.pt").exists() == (step is not None)
        assert step is None or load_state(out / "state.pt").step == step
    summary = pretrain(tiny_config(data, out, checkpoint_every=3, resume=True))
    assert_same_weights(finished[0], out)
    assert summary["loss"] == finished[1]["loss"]
    timeless = [
        [{k: v for k, v in r.items() if k != "shapes_per_second"} for r in read_log(folder / "log.jsonl")]
        for folder in (finished[0], out)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves(data, finished, tmp_path, monkeypatch, number):
    out = tmp_path / "stopped"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    original = nn.utils.get_total_norm

    steps = []

    def interrupted_norm(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            loaders = multiprocessing.active_children()
            assert len(loaders) == 2
            for process in loaders:  # a terminal or a scheduler signals the whole group
                os.kill(process.pid, number)
            signal.raise_signal(number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "get_total_norm", interrupted_norm)
        with pytest.raises(KeyboardInterrupt, match=f"{number.name} after step 3 of 6.*--resume"):
            pretrain(tiny_config(data, out, checkpoint_every=100, workers=2))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert load_state(out / "state.pt").step == 3
    pretrain(tiny_config(data, out, checkpoint_every=100, resume=True))
    assert_same_weights(finished[0], out)


def test_runs_outside_the_main_thread(data, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(pretrain(tiny_config(data, tmp_path / "thread", epochs=1)))
    )
    thread.start()
    thread.join()
    assert results[0]["steps"] == 2


def test_a_second_run_in_the_same_folder_is_refused(data, finished):
    out, _ = finished
    before = (out / "state.pt").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="--resume"):
        pretrain(tiny_config(data, out))
    assert (out / "state.pt").stat().st_mtime_ns == before


def test_resuming_a_finished_run_changes_nothing(data, finished):
    out, summary = finished
    log = (out / "log.jsonl").read_bytes()
    again = pretrain(tiny_config(data, out, resume=True))
    assert again["steps"] == STEPS
    assert again["loss"] == summary["loss"]
    assert (out / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 4}, "epochs: 3 in the run, 4 now"),
        ({"lr": 0.1}, "lr: 0.001 in the run, 0.1 now"),
        ({"model": models.CrossPointConfig(k=5, projection_dim=16)}, r"model\.k: 4 in the run, 5 now"),
    ],
)
def test_resuming_with_other_options_names_them(data, finished, changes, named):
    with pytest.raises(ValueError, match=named):
        pretrain(replace(tiny_config(data, finished[0], resume=True), **changes))


def test_resuming_on_other_shapes_is_refused(finished, tmp_path):
    other = tiny_run.write_pairs(tmp_path / "other", SHAPES + 1)
    with pytest.raises(ValueError, match="does not hold the shapes"):
        pretrain(tiny_config(other, finished[0], resume=True))


def test_a_moved_data_folder_may_resume(finished, tmp_path):
    copy = tiny_run.write_pairs(tmp_path / "moved")
    assert pretrain(tiny_config(copy, finished[0], resume=True, workers=1))["steps"] == STEPS


def test_packed_pairs_train_the_same(data, finished, tmp_path):
    packed, out = tmp_path / "packed", tmp_path / "run"
    pack(PackConfig(str(data), str(packed), points=48, image_size=16, shard_size=4))
    pretrain(tiny_config(packed, out, workers=2))
    assert_same_weights(finished[0], out)


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_layer_wise_optimizers_resume(data, tmp_path, optimizer):
    """What they keep is part of the state."""
    options = {"optimizer": optimizer, "lr": 0.3, "lr_scaling": "sqrt", "warmup_epochs": 1, "epochs": 2}
    pretrain(tiny_config(data, tmp_path / "whole", **options))
    rates = [r["lr"] for r in read_log(tmp_path / "whole" / "log.jsonl")]
    assert rates == pytest.approx([0.3 * (BATCH / 20) ** 0.5 * share for share in (0.5, 1, 0.5, 0.5)])
    out = tmp_path / "stopped"
    config = tiny_config(data, out, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_module.Run, "_save", stop_after(3, pretrain_module.Run._save))
        with pytest.raises(InterruptedError):
            pretrain(config)
    assert load_state(out / "state.pt").step == 3
    pretrain(replace(config, resume=True))
    assert_same_weights(tmp_path / "whole", out)


def stop_after(step: int, save):
    def stopping(run):
        save(run)
        if run.step == step:
            raise InterruptedError

    return stopping


def test_fewer_shapes_than_a_batch(data, tmp_path):
    with pytest.raises(ValueError, match=f"{SHAPES} shapes, fewer than one batch of 12"):
        pretrain(tiny_config(data, tmp_path / "run", batch_size=12))


def test_generated_shapes_go_into_the_run_folder(tmp_path, monkeypatch):
    asked = []

    def prepare(config):
        asked.append(config)
        tiny_run.write_pairs(Path(config.out))

    monkeypatch.setattr(pretrain_module, "prepare", prepare)
    out = tmp_path / "run"
    pretrain(replace(tiny_config("generated", out), epochs=1, seed=5))
    expected = PrepareConfig("generated", str(out / "data"), points=48, image_size=16, workers=0)
    assert asked == [expected], "they depend on more than what the run needs"


def test_no_data_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="ShapeNetRendering"):
        pretrain(tiny_config(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists(), "a run that never started left a folder"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"up": "x"}, "up must be 'y' or 'z'"),
        ({"part_size": 1}, "part_size must leave each of the even parts"),
        ({"optimizer": "sgd"}, "optimizer must be 'adam', 'lars' or 'lamb'"),
        ({"lr_scaling": "cubic"}, "lr_scaling must be 'none'"),
        ({"exchange": "tree"}, "exchange must be 'gather' or 'ring'"),
        ({"parallel": "fsdp1"}, "parallel must be 'ddp' or 'fsdp'"),
        ({"crop": 0.0}, "crop must be a share of the area"),
        ({"compile": True, "part_size": 2}, "compile must be off with part_size"),
        ({"compile": True, "cuda_graph": True}, "compile must be off with cuda_graph"),
        ({"views": 3}, "have fewer than 3 views"),
        ({"device": "gpu"}, "device must be .* got 'gpu'"),
        ({"data": "generated", "up": "z"}, "built-in shapes have y up"),
    ],
)
def test_options_that_cannot_work(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(replace(tiny_config(data, tmp_path / "run"), **changes))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_with_the_state_before_it(data, finished, tmp_path, monkeypatch, where):
    out = tmp_path / "nan"
    steps = []

    def poison(module, inputs):
        steps.append(1)
        if len(steps) == 4:
            if where == "loss":
                inputs[0][0] = float("nan")
            else:
                inputs[0].register_hook(lambda gradient: gradient * float("inf"))

    def build(config):
        model = tiny_run.build_tiny(config)
        target = model.point_encoder if where == "loss" else model.image_encoder.layers[1]
        target.register_forward_pre_hook(poison)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(models, "build", build)
        with pytest.raises(FloatingPointError, match=r"step 4: loss .* Its shapes: (chair|table)/shape\d\d"):
            pretrain(tiny_config(data, out, checkpoint_every=100))
    state = load_state(out / "state.pt")
    assert state.step == 3
    assert all(value.isfinite().all() for value in state.model.values())
    batch = load_batch(out / "nonfinite_step4" / "rank0.pt")
    again = replay(out / "nonfinite_step4", model=tiny_run.build_tiny(tiny_config(data, out).model))
    assert again.bad_inputs == {} and again.module is None and again.gradients == []
    assert math.isfinite(again.metrics["loss"])
    if where == "gradient":  # dropout included
        assert again.metrics["loss"] == batch.metrics["loss"]
    # Without the poison the run goes on from there as if nothing had been.
    pretrain(tiny_config(data, out, checkpoint_every=100, resume=True))
    assert_same_weights(finished[0], out)


def test_a_cloud_of_nan_is_named_and_its_batch_kept(data, tmp_path):
    packed, out = tmp_path / "packed", tmp_path / "run"
    pack(PackConfig(str(data), str(packed), points=48, image_size=16))
    clouds, checksums = (packed / f"shard-00000.{kind}.npy" for kind in ("clouds", "checksums"))
    values, sums = np.load(clouds), np.load(checksums)
    values[:, 7, 1] = np.nan
    values[0] = 0.5
    sums[:SHAPES] = [zlib.crc32(cloud) for cloud in values]
    np.save(clouds, values)
    np.save(checksums, sums)
    with pytest.raises(FloatingPointError) as caught:
        pretrain(tiny_config(packed, out, views=2))
    folder = out / "nonfinite_step1"
    batch = load_batch(folder / "rank0.pt")
    assert (batch.step, batch.rank, batch.world, len(batch.names)) == (1, 0, 1, BATCH)
    assert batch.images.shape == (BATCH, 2, 3, 16, 16)
    expected = {}
    for i, (name, sources) in enumerate(zip(batch.names, batch.sources, strict=True)):
        assert len(sources) == 3
        path, row = sources[0].removesuffix("]").split("[")
        assert np.array_equal(np.load(path)[int(row)], batch.points[i].numpy(), equal_nan=True)
        if int(row) > 0:
            expected[name] = f"its cloud, {sources[0]}"
    assert len(expected) >= BATCH - 1 and batch.bad_inputs() == expected
    again = replay(folder, model=tiny_run.build_tiny(tiny_config(data, out).model))
    assert again.bad_inputs == expected and again.module.startswith("point_encoder.") and again.gradients
    said = str(caught.value)
    assert str(folder) in said and "mend it" in said
    assert all(f"{name} ({what})" in said for name, what in expected.items())


def test_a_rate_too_high_is_told_from_bad_data(data, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(
        FloatingPointError, match=r"step (\d): .* All its inputs are finite: lower --lr"
    ) as caught:
        pretrain(tiny_config(data, out, lr=1e30))
    (folder,) = out.glob("nonfinite_step*")
    assert str(folder) in str(caught.value)
    batch = load_batch(folder / "rank0.pt")
    again = replay(folder, model=tiny_run.build_tiny(tiny_config(data, out).model))
    assert again.metrics == pytest.approx(batch.metrics, nan_ok=True)
    assert again.module is not None and again.bad_inputs == {}
    (folder / "rank0.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"rank0\.pt is not a batch"):
        replay(folder)


def test_no_room_for_what_led_to_it(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "state.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(
        FloatingPointError, match=r"could not be saved \(the checkpoint .* No space left .* lower --lr"
    ):
        pretrain(tiny_config(data, out, lr=1e30, checkpoint_every=100))


def test_a_full_disk_keeps_the_former_checkpoint(data, finished, tmp_path, monkeypatch):
    out = tmp_path / "full"
    original = pretrain_module.save_state
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(path, state):
        if state.step < 3:
            return original(path, state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            return original(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_module, "save_state", save_on_a_full_disk)
        with pytest.raises(OSError, match=r"checkpoint of step 3 .* former one, if any, is intact"):
            pretrain(tiny_config(data, out))
    assert load_state(out / "state.pt").step == 2
    assert not list(out.glob("*.tmp"))
    pretrain(tiny_config(data, out, resume=True))
    assert_same_weights(finished[0], out)


def test_a_state_file_of_something_else_is_refused(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "state.pt").write_bytes(b"not a state")
    with pytest.raises(ValueError, match=r"state\.pt"):
        pretrain(tiny_config(data, out, resume=True))


def test_loads_the_state_without_running_code(finished):
    torch.load(finished[0] / "state.pt", weights_only=True)


def test_bfloat16(data, tmp_path):
    summary = pretrain(tiny_config(data, tmp_path / "amp", amp=True, image_size=32, epochs=1))
    assert summary["loss"] > 0
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "amp").values())


def test_activation_checkpointing_changes_no_number(data, finished, tmp_path):
    """Dropout and batch norm included; a run may go on with it or without."""
    out = tmp_path / "run"
    config = tiny_config(data, out, activation_checkpointing=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_module.Run, "_save", stop_after(3, pretrain_module.Run._save))
        with pytest.raises(InterruptedError):
            pretrain(config)
    pretrain(replace(config, resume=True, activation_checkpointing=False))
    assert_same_weights(finished[0], out)


def test_channels_last_changes_the_order_in_memory_alone(data, tmp_path, monkeypatch):
    """And a run may go on with it or without."""
    orders, build = [], pretrain_module.models.build

    def without_dropout(config):  # which draws in that order
        model = build(config)
        model.image_encoder.layers[3].p = 0
        return model

    monkeypatch.setattr(pretrain_module.models, "build", without_dropout)
    pretrain(tiny_config(data, tmp_path / "contiguous"))
    restore = pretrain_module.Run._restore

    def look(self, state):
        restore(self, state)
        weight = self.model.image_encoder.layers[0].weight
        moment = self.optimizer.state[weight]["exp_avg"]
        orders.append([t.is_contiguous(memory_format=torch.channels_last) for t in (weight, moment)])

    monkeypatch.setattr(pretrain_module.Run, "_restore", look)
    out = tmp_path / "run"
    config = tiny_config(data, out)
    save = pretrain_module.Run._save
    for stop, channels_last in ((2, False), (4, True)):
        monkeypatch.setattr(pretrain_module.Run, "_save", stop_after(stop, save))
        with pytest.raises(InterruptedError):
            pretrain(replace(config, resume=True, channels_last=channels_last))
    monkeypatch.setattr(pretrain_module.Run, "_save", save)
    pretrain(replace(config, resume=True))
    assert orders == [[True, True], [False, False]]
    for one, other in zip(
        *(read_log(folder / "log.jsonl") for folder in (tmp_path / "contiguous", out)), strict=True
    ):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("amp", [False, True])
def test_a_compiled_step_is_the_step(data, tmp_path, monkeypatch, amp):
    """As one graph, dropout included, which this compiler draws as PyTorch does; weights have a plain run's names."""
    if amp:  # by the reference, whose backward pass autocast would reach
        for rows in _dispatch._table.values():
            monkeypatch.setitem(rows, "native", "switched off by the test")
    monkeypatch.setattr(pretrain_module, "_COMPILER", "aot_eager")
    # Of 16 pixels, bfloat16 on a CPU leaves a part of the weight gradients in the last stage unwritten (oneDNN).
    config = tiny_config(data, tmp_path / "plain", epochs=1, image_size=32, amp=amp)
    pretrain(config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pretrain(replace(config, out=str(tmp_path / "compiled"), compile=True))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    plain, compiled = (read_log(tmp_path / name / "log.jsonl") for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


def test_a_compiled_run_goes_on_uncompiled(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_module, "_COMPILER", "aot_eager")
    plain = tiny_config(data, tmp_path / "plain", epochs=1)
    pretrain(plain)
    torch._dynamo.reset()
    config = replace(plain, out=str(tmp_path / "run"))
    save = pretrain_module.Run._save
    monkeypatch.setattr(pretrain_module.Run, "_save", stop_after(1, save))
    with pytest.raises(InterruptedError):
        pretrain(replace(config, compile=True))
    monkeypatch.setattr(pretrain_module.Run, "_save", save)
    pretrain(replace(config, resume=True))
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "message"), [("compile", "compile needs"), ("cuda_graph", "cuda_graph needs")]
)
def test_several_processes_refuse_what_one_can(data, tmp_path, monkeypatch, option, message):
    two = Ranks(torch.device("cpu"), rank=0, world=2)
    monkeypatch.setattr(pretrain_module, "joined", lambda device: contextlib.nullcontext(two))
    with pytest.raises(ValueError, match=f"{message} one process.* got 2"):
        pretrain(tiny_config(data, tmp_path / "run", **{option: True}))


def test_trains(data, tmp_path):
    out = tmp_path / "long"
    pretrain(tiny_config(data, out, epochs=15, checkpoint_every=100))
    losses = [r["loss"] for r in read_log(out / "log.jsonl")]
    assert sum(losses[-6:]) / 6 < 0.9 * sum(losses[:6]) / 6
