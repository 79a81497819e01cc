"""The pre-training loop.

Every random decision is a function of the seed and the step (or epoch): the order of the shapes, the view of
each, both augmentations, and PyTorch's global generator during the step. So a run that is killed and resumed
from a checkpoint, in the middle of an epoch too, goes through the same numbers as one that never stopped.

Several processes (`torchrun -m crosspoint pretrain ...`) share each batch: every rank loads and encodes its part of it.
Negatives and batch statistics come from all of them, so a step computes what one process would with the whole batch;
only augmentations and dropout are drawn by each rank for itself. The first rank writes the run folder, which all must
see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset, Sampler

from crosspoint import models
from crosspoint.data import CloudAugmentation, ImageAugmentation, PairDataset
from crosspoint.data.pack import open_pairs
from crosspoint.data.pairs import listed
from crosspoint.data.prepare import GENERATED, PrepareConfig, prepare
from crosspoint.models import checkpoints
from crosspoint.models.blocks import checkpoint_activations, shard
from crosspoint.train.cached import cached_backward
from crosspoint.train.capture import CapturedStep
from crosspoint.train.card import write_card
from crosspoint.train.checkpoint import (
    Progress,
    TrainState,
    check_same_run,
    load_state,
    not_written,
    save_state,
)
from crosspoint.train.config import PretrainConfig, config_to_dict, save_config
from crosspoint.train.log import NoLog, RunLog
from crosspoint.train.nonfinite import FailedBatch, save_batch
from crosspoint.train.optim import learning_rate, make_optimizer
from crosspoint.train.ranks import Ranks, joined
from crosspoint.train.repeatable import Signals, derive_seed, isolated

if TYPE_CHECKING:
    from crosspoint.train.sharded import ShardedState

__all__ = ["Run", "check_ranks", "open_dataset", "pretrain"]

log = logging.getLogger(__name__)

# One stream of random numbers per purpose.
_INIT, _SHUFFLE, _STEP, _AUGMENT = range(4)

_COMPILER = "inductor"

# The state in the run folder: a file, or a folder to which every rank writes its share of a sharded one.
_WHOLE, _SHARDED = "state.pt", "state"


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run (or, with `config.resume`, continue) the pre-training that `config` describes; returns a summary.

    The run folder gets config.yaml, log.jsonl, tensorboard/, state.pt (state/ where parameters are sharded),
    weights.safetensors and README.md, a model card.
    Under torchrun (or in a process group of the caller) this process is one of several; any number of them can continue
    a run, and where torchrun has restarted them they do so unasked.

    Raises:
        FileExistsError: the folder holds a run and `resume` is off.
        FileNotFoundError: there is no data.
        ValueError: the options cannot work, or are not those of the run to continue.
        FloatingPointError: the loss or a gradient is not finite; the state before that step is saved, and its batch
            (`crosspoint.train.nonfinite`).
        OSError: the disk is full, on all ranks; the former checkpoint is intact.
        KeyboardInterrupt: SIGINT or SIGTERM came, on any rank; the state is saved.
        ConnectionError: another rank is gone.
    """
    config.validate()
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        config = dataclasses.replace(config, resume=True)
    out = Path(config.out)
    with joined(config.device) as ranks:
        check_ranks(config, ranks)
        state = _find_state(config, out, log.info if ranks.first else log.debug)
        ranks.barrier()  # all have looked before one writes
        dataset = ranks.first_then_all(lambda: open_dataset(config, out))

        def make_folder() -> None:
            out.mkdir(parents=True, exist_ok=True)
            if state is None:
                save_config(out / "config.yaml", _without_resume(config))

        ranks.on_first(make_folder)
        with isolated(ranks.device):
            return Run(config, dataset, ranks, state).train()


def check_ranks(config: PretrainConfig, ranks: Ranks) -> None:
    """Raise ValueError, naming the option, if a value cannot work with these processes and their device."""
    if config.cuda_graph and (ranks.device.type != "cuda" or ranks.world > 1):
        raise ValueError(
            f"cuda_graph needs one process with a GPU, got {ranks.world} on {ranks.device.type!r}: leave it off"
        )
    if config.compile and ranks.world > 1:
        raise ValueError(
            f"compile needs one process, got {ranks.world}, whose exchanges no graph goes across: leave it off"
        )
    if config.batch_size < ranks.world:
        raise ValueError(
            f"batch_size must be at least {ranks.world}, one shape a rank, got {config.batch_size}"
        )


class Run:
    """One training: `train` makes it whole; `batches` and `train_step` are its parts."""

    def __init__(
        self,
        config: PretrainConfig,
        dataset: PairDataset,
        ranks: Ranks,
        state: TrainState | ShardedState | None,
    ) -> None:
        self.config, self.dataset, self.ranks, self.device = config, dataset, ranks, ranks.device
        self.out = Path(config.out)
        self.shapes = _fingerprint(dataset)
        self.steps_per_epoch = len(dataset) // config.batch_size
        self.total = config.epochs * self.steps_per_epoch
        torch.manual_seed(derive_seed(config.seed, _INIT))
        self.model = models.build(config.model).to(self.device).train()
        self.cloud_augmentation = CloudAugmentation(up=config.up)
        self.image_augmentation = ImageAugmentation(size=config.image_size, crop=config.crop)
        self.step, self.metrics, self.seconds = 0, {}, 0.0
        if config.channels_last:
            self.model.image_encoder.to(memory_format=torch.channels_last)  # which the images follow
        if ranks.world > 1:
            self.model.synchronise(exchange=config.exchange)
        if config.activation_checkpointing:
            checkpoint_activations(self.model)
        self.averaging = None
        self.sharded = config.parallel == "fsdp" and ranks.world > 1
        if self.sharded:
            shard(self.model, ranks.mesh())
        elif ranks.world > 1 and config.part_size is None:
            self.averaging = DistributedDataParallel(
                self.model,
                find_unused_parameters=not config.model.cross_weight,  # the image encoder's
            )
        self.forward = self.averaging or self.model
        if config.compile:
            self.forward = _compiled(self.model)
        self.optimizer = make_optimizer(config, self.model.parameters())
        if state is not None:
            self._restore(state)
        self.passes = CapturedStep(self._passes, self.model) if config.cuda_graph else self._passes

    def train(self) -> dict[str, Any]:
        config = self.config
        left_out = len(self.dataset) % config.batch_size
        (log.info if self.ranks.first else log.debug)(
            "%d shapes, %d steps of %d an epoch%s, %d epochs, on %s%s%s",
            len(self.dataset),
            self.steps_per_epoch,
            config.batch_size,
            f" ({left_out} shapes, different ones, sit out each)" if left_out else "",
            config.epochs,
            self.device,
            f" and {self.ranks.world - 1} more" if self.ranks.world > 1 else "",
            f"; continuing after step {self.step} of {self.total}" if self.step else "",
        )
        open_log = RunLog if self.ranks.first else NoLog
        run_log = open_log(self.out, first=self.step, total=self.total, batch_size=config.batch_size)
        before, started = self.seconds, time.perf_counter()
        with contextlib.closing(run_log), Signals() as signals, warnings.catch_warnings():
            # Nothing here changes an output in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            for batch in self.batches():
                epoch = self.step // self.steps_per_epoch
                self.metrics = self.train_step(batch)
                self.step += 1
                self.seconds = before + time.perf_counter() - started
                ends_epoch = self.step % self.steps_per_epoch == 0
                run_log.advance(self.metrics["loss"], f"{epoch + 1}/{config.epochs}")
                if ends_epoch or self.step % config.log_every == 0:
                    self.ranks.on_first(lambda epoch=epoch: run_log.write(self.step, epoch + 1, self.metrics))
                every = config.checkpoint_every or self.steps_per_epoch
                stop = self.ranks.any(bool(signals.received))
                if stop or self.step % every == 0 or self.step == self.total:
                    self._save()
                if stop and self.step < self.total:
                    raise KeyboardInterrupt(
                        f"stopped by {signals.received or 'a signal to another rank'} after step {self.step} of "
                        f"{self.total}; the state is saved: the same command with --resume continues"
                    )
        return {
            "out": str(self.out),
            "shapes": len(self.dataset),
            "epochs": config.epochs,
            "steps": self.step,
            **self.metrics,
            "seconds": round(self.seconds, 3),
            "shapes_per_second": round(self.step * config.batch_size / max(self.seconds, 1e-9), 3),
        }

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """What this rank loads for every step that is left."""
        config = self.config
        return iter(
            DataLoader(
                _AtEpoch(self.dataset),
                batch_sampler=_Schedule(len(self.dataset), config, self.ranks, self.step, self.total),
                num_workers=config.workers,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),
            )
        )

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Forward, backward and the update; what the log says of it. Its parts have names in a profile."""
        config, device, step = self.config, self.device, self.step
        torch.manual_seed(derive_seed(config.seed, _STEP, step, *self.ranks.key))
        # On the CPU, so that every device sees the same views.
        seed = derive_seed(config.seed, _AUGMENT, step, *self.ranks.key)
        generator = torch.Generator().manual_seed(seed)
        points = batch["points"].to(device, non_blocking=True)  # (B, N, 3)
        images = batch["image"].to(device, non_blocking=True)  # (B, [V,] 3, H, W), uint8
        with record_function("augment"):
            view1 = self.cloud_augmentation(points, generator)
            view2 = self.cloud_augmentation(points, generator)
            rows = images.shape[:-3]
            images = self.image_augmentation(images.flatten(0, -4), generator).unflatten(0, rows)

        lr = learning_rate(config, step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        values = self.passes(view1, view2, images).tolist()
        metrics = dict(zip(("loss", "intra_modal", "cross_modal", "grad_norm"), values, strict=True))
        if not all(map(math.isfinite, values)):
            for buffer, former in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(former)
            self._stop_at_non_finite(metrics, batch, view1, view2, images)
        with record_function("optimizer"):
            self.optimizer.step()
        return {**metrics, "lr": lr}

    def _passes(self, view1: Tensor, view2: Tensor, images: Tensor) -> Tensor:
        """Gradients of all parameters, the same on all ranks; (loss, intra_modal, cross_modal, grad_norm)."""
        self.optimizer.zero_grad(set_to_none=True)
        output = self._backward(view1, view2, images)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.sharded:
            norm = norm.full_tensor()
        return torch.stack([output.loss, output.intra_modal, output.cross_modal, norm]).detach()

    def _backward(self, view1: Tensor, view2: Tensor, images: Tensor) -> models.CrossPointOutput:
        """The losses of the step; parameters get their gradients."""

        def autocast() -> torch.autocast:
            # Narrowed weights that it kept would be those of the capture at every replay.
            kept = not self.config.cuda_graph
            return torch.autocast(
                self.device.type, dtype=torch.bfloat16, enabled=self.config.amp, cache_enabled=kept
            )

        if self.config.part_size is None:
            with record_function("forward"), autocast():
                output = self.forward(view1, view2, images)
            with record_function("backward"):
                output.loss.backward()
            return output
        largest = -(-self.config.batch_size // self.ranks.world)  # rank's share
        parts = -(-largest // self.config.part_size)
        with record_function("forward and backward"):
            output = cached_backward(self.model, view1, view2, images, parts=parts, autocast=autocast)
        if not self.sharded:
            self.ranks.average([p.grad for p in self.model.parameters() if p.grad is not None])
        return output

    def _stop_at_non_finite(
        self,
        metrics: dict[str, float],
        loaded: dict[str, Tensor],
        view1: Tensor,
        view2: Tensor,
        images: Tensor,
    ) -> None:
        config, step, key = self.config, self.step, self.ranks.key
        indices = loaded["index"].tolist()
        self.dataset.set_epoch(step // self.steps_per_epoch)  # of which the sources are
        batch = FailedBatch(
            step=step + 1,
            rank=self.ranks.rank,
            world=self.ranks.world,
            metrics=metrics,
            config=config_to_dict(_without_resume(config)),
            seeds={
                "step": derive_seed(config.seed, _STEP, step, *key),
                "augment": derive_seed(config.seed, _AUGMENT, step, *key),
            },
            names=[self.dataset.names[i] for i in indices],
            sources=[self.dataset.sources(i) for i in indices],
            points=loaded["points"],
            view1=view1.cpu(),
            view2=view2.cpu(),
            images=images.cpu(),
        )
        try:
            self._save()
            folder = save_batch(self.out, batch)
            kept = f"its batch is in {folder}, for crosspoint.train.nonfinite.replay; the state before it is saved"
        except OSError as error:
            kept = f"what led to it could not be saved ({error})"
        names = [name for names in self.ranks.gather(batch.names) for name in names]
        bad = {name: what for found in self.ranks.gather(batch.bad_inputs()) for name, what in found.items()}
        values = ", ".join(f"{name} {value}" for name, value in metrics.items())
        said = "; ".join(f"{name} ({what})" for name, what in bad.items())
        raise FloatingPointError(
            f"step {step + 1}: {values}; {kept}. Its shapes: {listed(names)}. "
            + (
                f"NaN or infinity in the input of {said}: mend it, then --resume repeats the step"
                if bad
                else "All its inputs are finite: lower --lr, or see where the replay leaves the finite numbers"
            )
        )

    def _save(self) -> None:
        """The first rank writes all but its share of a sharded state; the others wait, so that none goes on, or ends,
        before the state is there. Where it cannot be written, all raise OSError."""
        progress = {
            "step": self.step,
            "config": config_to_dict(_without_resume(self.config)),
            "shapes": self.shapes,
            "metrics": self.metrics,
            "seconds": self.seconds,
        }
        if self.sharded:
            from crosspoint.train import sharded

            weights = sharded.gather_weights(self.model, self.ranks)
        else:
            weights = self.model.state_dict()
        # Weights first: a kill in between leaves a state that will write them again.
        self.ranks.on_first(lambda: self._write_weights(weights))
        if self.sharded:
            state = Progress(**progress)
            sharded.save_sharded(self.out / _SHARDED, state, self.model, self.optimizer, self.ranks)
        else:
            state = TrainState(**progress, model=weights, optimizer=self.optimizer.state_dict())
            self.ranks.on_first(lambda: save_state(self.out / _WHOLE, state))
        self.ranks.on_first(self._finish_folder)

    def _write_weights(self, weights: dict[str, Tensor]) -> None:
        path = self.out / "weights.safetensors"
        try:
            checkpoints.save_model(path, weights, self.config.model)
        except OSError as error:
            raise OSError(not_written(self.step, path, error)) from error

    def _finish_folder(self) -> None:
        if self.sharded:  # what is left from before `parallel` was changed
            (self.out / _WHOLE).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.out / _SHARDED, ignore_errors=True)
        self._write_card()

    def _write_card(self) -> None:
        write_card(
            self.out,
            _without_resume(self.config),
            shapes=self.dataset.names,
            device=self.device,
            step=self.step,
            total=self.total,
            metrics=self.metrics,
            seconds=self.seconds,
        )

    def _restore(self, state: TrainState | ShardedState) -> None:
        if state.shapes != self.shapes:
            raise ValueError(
                f"{self.config.data} does not hold the shapes that the run in {self.out} was started on; "
                "a run can only continue on the same ones"
            )
        state.restore(self.model, self.optimizer)
        self.step, self.metrics, self.seconds = state.step, state.metrics, state.seconds


def _compiled(model: nn.Module) -> Callable[..., models.CrossPointOutput]:
    """The model as one graph; a break is an error. Its backward pass is outside autocast, as it is uncompiled."""
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=_COMPILER)

    def forward(*batch: Tensor) -> models.CrossPointOutput:
        with functorch.patch(backward_pass_autocast="off"):  # the first call traces both passes
            return compiled(*batch)

    return forward


class _AtEpoch(Dataset):
    """Items by (epoch, index), so that one set of loader processes serves all epochs."""

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        self.dataset.set_epoch(epoch)
        return self.dataset[index]


class _Schedule(Sampler[list[tuple[int, int]]]):
    """This rank's (epoch, index) pairs of every step from `first` to the end of the run."""

    def __init__(self, shapes: int, config: PretrainConfig, ranks: Ranks, first: int, total: int) -> None:
        self.shapes, self.config, self.ranks, self.first, self.total = shapes, config, ranks, first, total

    def __len__(self) -> int:
        return self.total - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.config.batch_size
        order, order_epoch = [], -1
        for step in range(self.first, self.total):
            epoch, batch = divmod(step, self.shapes // size)
            if epoch != order_epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.config.seed, _SHUFFLE, epoch))
                order, order_epoch = torch.randperm(self.shapes, generator=generator).tolist(), epoch
            yield [(epoch, index) for index in self.ranks.part(order[batch * size : (batch + 1) * size])]


def _ignore_interrupts(_: int) -> None:
    # Terminals and schedulers signal loader processes too; the training process ends them when it is ready.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _find_state(
    config: PretrainConfig, out: Path, say: Callable[..., None]
) -> TrainState | ShardedState | None:
    if not config.resume:
        for name in (_WHOLE, _SHARDED, "config.yaml"):
            if (out / name).exists():
                raise FileExistsError(
                    f"{out} already holds a run; pass --resume to continue it, or another --out to start one"
                )
        return None
    states = []
    if (out / _WHOLE).exists():
        states.append(load_state(out / _WHOLE))
    if (out / _SHARDED).exists():
        from crosspoint.train.sharded import find_sharded

        states += filter(None, [find_sharded(out / _SHARDED)])
    if not states:
        say("%s holds no checkpoint yet: starting at step 0", out)
        return None
    state = max(states, key=lambda state: state.step)  # a kill may leave both where `parallel` was changed
    check_same_run(state.config, config_to_dict(config))
    return state


def open_dataset(config: PretrainConfig, out: Path) -> PairDataset:
    root = Path(config.data)
    if config.data == GENERATED:
        if config.up != "y":
            raise ValueError("the built-in shapes have y up: leave up at 'y'")
        root = out / "data"
        # The same shapes for every seed of the training.
        prepare(
            PrepareConfig(
                meshes=GENERATED,
                out=str(root),
                points=config.points,
                image_size=config.image_size,
                workers=config.workers,
            )
        )
    dataset = open_pairs(
        root, points=config.points, image_size=config.image_size, seed=config.seed, views=config.views
    )
    if len(dataset) < config.batch_size:
        raise ValueError(
            f"{root} holds {len(dataset)} shapes, fewer than one batch of {config.batch_size}: "
            f"add shapes, or pass --batch-size {len(dataset)} or less"
        )
    return dataset


def _fingerprint(dataset: PairDataset) -> str:
    return hashlib.sha256("\n".join(dataset.names).encode()).hexdigest()


def _without_resume(config: PretrainConfig) -> PretrainConfig:
    """The recipe, which does not depend on how often it was interrupted."""
    return PretrainConfig(**{**config.__dict__, "resume": False})
