"""The state of a run whose parameters are sharded: every rank writes its part (torch.distributed.checkpoint).

A state is a folder step-N that appears by rename once all parts are there. Any number of ranks reads it, into a model
that is sharded over them or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from crosspoint._files import replace_file, sync_folder
from crosspoint.train.checkpoint import Progress, not_written
from crosspoint.train.ranks import Ranks

__all__ = ["ShardedState", "find_sharded", "gather_weights", "save_sharded"]

_PROGRESS = "progress.json"


@dataclass
class ShardedState(Progress):
    """A run after `step` steps, its tensors in the folder `path`."""

    path: Path

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill the model and its fresh optimizer, sharded or not; all ranks must call it."""
        try:
            reader = _Reader(self.path)
            stored = reader.read_metadata().state_dict_metadata
            target = {"model": model.state_dict(), "optimizer": {}}
            for name, parameter in model.named_parameters():
                prefix = f"optimizer.{name}."
                kept = {key.removeprefix(prefix): of for key, of in stored.items() if key.startswith(prefix)}
                if kept:
                    target["optimizer"][name] = {
                        key: torch.zeros_like(parameter, requires_grad=False)
                        if of.size == parameter.shape
                        else torch.zeros(of.size, dtype=of.properties.dtype)
                        for key, of in kept.items()
                    }
            names = {f"model.{name}" for name in target["model"]}
            if unknown := sorted(key for key in stored if key.startswith("model.") and key not in names):
                raise ValueError(f"the model has no {', '.join(unknown)}")
            with _also_alone():
                load(_filled(target), storage_reader=reader)
        except RuntimeError:
            raise  # another rank is gone: what a file is to blame for comes as one of those below
        except (Exception, CheckpointException) as error:
            reason = _reasons(error) if isinstance(error, CheckpointException) else error
            raise ValueError(f"{self.path} is not a state of this version of crosspoint: {reason}") from error
        numbers = {name: i for i, (name, _) in enumerate(model.named_parameters())}
        state = {numbers[name]: values for name, values in target["optimizer"].items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def find_sharded(folder: Path) -> ShardedState | None:
    """The state of the last step in a folder that `save_sharded` wrote, if there is any."""
    found = {path.name.removeprefix("step-"): path for path in folder.glob("step-*")}
    steps = [int(step) for step in found if step.isdigit()]  # others are parts of one that was never finished
    if not steps:
        return None
    path = found[str(max(steps))]
    try:
        return ShardedState(**json.loads((path / _PROGRESS).read_text()), path=path)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a state of this version of crosspoint: {error}") from error


def save_sharded(
    folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Write FOLDER/step-N, then remove what else the folder holds; all ranks must call it.

    If it fails on any rank, all raise OSError and the former state is intact.
    """
    final = folder / f"step-{progress.step}"
    fresh = folder / f"{final.name}.tmp"
    if ranks.any(ranks.first and final.exists()):
        return  # the run went on from there, and stops before the next step ends
    if ranks.first:
        shutil.rmtree(fresh, ignore_errors=True)  # a killed run's
    ranks.barrier()
    moments = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    tensors = _filled({"model": model.state_dict(), "optimizer": moments})
    failure = ""
    try:
        with _also_alone():
            save(tensors, storage_writer=FileSystemWriter(fresh))
    except CheckpointException as error:  # the same on all ranks
        failure = _reasons(error)

    def publish() -> None:
        try:
            if failure:
                raise OSError(failure)
            content = json.dumps(dataclasses.asdict(progress)).encode()
            replace_file(fresh / _PROGRESS, lambda file: file.write(content))
            os.rename(fresh, final)
            sync_folder(folder)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise OSError(not_written(progress.step, final, error)) from error
        for other in folder.iterdir():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    ranks.on_first(publish)


def gather_weights(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The state dict of a sharded model, of whole tensors on the CPU; all ranks must call it, the first gets it."""
    gathered = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if ranks.first:
            gathered[name] = whole.cpu()
    return gathered


def _filled(tensors: dict[str, dict]) -> dict[str, dict]:
    """Without what is empty, which would be written as an object."""
    return {name: values for name, values in tensors.items() if values}


@contextlib.contextmanager
def _also_alone() -> Iterator[None]:
    """Without a warning where there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())


class _Reader(FileSystemReader):
    """Reads the index, a pickle, without running code that it names."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        with open(self.path / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = dataclasses.replace(
            metadata.storage_meta or StorageMeta(), load_id=self.load_id
        )
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name in _INDEX_OF.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which has no place there")


_INDEX_OF = {
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # Python 3.13
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.serialization": ("_get_layout",),
}
