"""Three processes that pre-train one run by turns, sharded and not, one of which dies; what each of them met."""

import contextlib
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.checkpoint import FileSystemWriter

import tiny_ranks
from crosspoint.models import checkpoints
from crosspoint.train import pretrain
from tiny_run import pretrain_module, tiny_config

DIES = 2


def work(rank: int, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    tiny_ranks.without_draws(setattr)
    turns = {
        "three of which one dies": (3, 2, killed_in_writing, {"activation_checkpointing": True}),
        "two on a full disk": (2, 2, on_a_full_disk, {}),
        "two that meet a NaN": (2, 9, nan_in_the_second_step, {}),
        "two without room for weights": (2, 2, no_room_for("weights.safetensors", out), {"parallel": "ddp"}),
        "two without room for a state": (2, 2, no_room_for("state.pt", out), {"parallel": "ddp"}),
        "two without room for a log": (2, 2, no_room_for_the_log, {"parallel": "ddp"}),
        "two": (2, 2, stopped_after(4), {"parallel": "ddp"}),
        "two again": (2, 1, stopped_after(5), {}),
    }
    for name, (world, every, fault, options) in turns.items():
        if rank >= world:
            return
        distributed.init_process_group(
            "gloo", init_method=f"file://{out}.{name}", rank=rank, world_size=world
        )
        config = tiny_config(
            data, out, resume=True, checkpoint_every=every, **{"parallel": "fsdp", **options}
        )
        try:
            with fault(rank):
                pretrain(config)
            said = "the end"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        distributed.destroy_process_group()
        checkpoints.load_model(out, tiny_ranks.build(config.model))  # whole, whatever has failed
        left = sorted(str(path.relative_to(out)) for path in [*out.glob("state*"), *out.glob("state/*")])
        Path(f"{out}.{name}.{rank}").write_text(json.dumps([said, left]))


@contextlib.contextmanager
def changed(owner: object, name: str, value: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def killed_in_writing(rank: int) -> contextlib.AbstractContextManager:
    """A rank dies when half of its part of the second checkpoint is written."""
    original, calls = FileSystemWriter.write_data, []

    def write_data(writer, *args):
        done = original(writer, *args)
        calls.append(1)
        if rank == DIES and len(calls) == 2:
            for path in Path(writer.path).glob(f"__{rank}_*"):
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return changed(FileSystemWriter, "write_data", write_data)


def on_a_full_disk(rank: int) -> contextlib.AbstractContextManager:
    """The last rank can write no large file."""
    original = FileSystemWriter.write_data

    def write_data(writer, *args):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            return original(writer, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return changed(FileSystemWriter, "write_data", write_data)


def no_room_for(name: str, out: Path):
    """The first rank writes this file to a device that is full."""

    def fault(rank: int) -> contextlib.AbstractContextManager:
        if rank == 0:
            (out / f"{name}.tmp").symlink_to("/dev/full")
        return contextlib.nullcontext()

    return fault


def no_room_for_the_log(_: int) -> contextlib.AbstractContextManager:
    original = pretrain_module.RunLog.write

    def write(log, *args):
        log._file.close()
        with open("/dev/full", "a") as log._file:
            original(log, *args)

    return changed(pretrain_module.RunLog, "write", write)


def nan_in_the_second_step(rank: int) -> contextlib.AbstractContextManager:
    """In one rank's share of one gradient."""
    original, calls = pretrain_module.Run._backward, []

    def backward(run, *views):
        output = original(run, *views)
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            next(run.model.parameters()).grad.to_local().fill_(float("nan"))
        return output

    return changed(pretrain_module.Run, "_backward", backward)


def stopped_after(step: int):
    def fault(_: int) -> contextlib.AbstractContextManager:
        original = pretrain_module.Run._save

        def save(run):
            original(run)
            if run.step == step:
                raise InterruptedError

        return changed(pretrain_module.Run, "_save", save)

    return fault
