"""Training on labels from a pre-trained encoder and from random initialisation: what the fine-tuned protocols share.

The recipe is DGCNN's (arXiv 1801.07829), which CrossPoint's authors use: all layers, SGD with momentum, a cosine down
to a small rate, label smoothing. The weights of the last epoch are tested, once: nothing is chosen on the test split.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspoint._device import resolve_device
from crosspoint._optional import require
from crosspoint.data import CloudAugmentation, ScaleShift
from crosspoint.evaluate.protocol import NAMES, output_folder, up_axis, versions, write_results
from crosspoint.models import checkpoints, create
from crosspoint.models.checkpoints import EncoderConfig
from crosspoint.train.checkpoint import TrainState, check_same_run, load_state, save_state
from crosspoint.train.config import config_to_dict
from crosspoint.train.log import RunLog, read_log
from crosspoint.train.repeatable import Signals, derive_seed, isolated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ConfigOfClouds",
    "Examples",
    "FinetuneConfig",
    "FinetunedProtocol",
    "Outcome",
    "Task",
    "architecture_of",
    "fine_tune",
    "format_by_name",
    "format_scores",
    "learning_rate",
    "load_backbone",
    "report",
    "smoothed_cross_entropy",
]

log = logging.getLogger(__name__)

# One stream of random numbers per purpose.
_INIT, _SHUFFLE, _STEP, _AUGMENT = range(4)
# Options that no weight depends on; of `run`, the weights themselves are compared.
_MAY_CHANGE = {"run", "data", "out", "resume", "seeds", "random_init", "picture", "device"}


@dataclass
class FinetuneConfig:
    """The options of every protocol that trains on labels."""

    run: Path | None = None
    """Run folder, or weights file. None: random initialisation alone, of the default architecture."""
    data: Path = Path("data")
    """Folder that holds the data set, or the data set's own folder."""
    out: Path | None = None
    """Folder for the results and for the state of every training; the run folder by default."""
    resume: bool = False
    """Continue the trainings that OUT holds, with the options they were started with; finished ones are only tested."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training each: of the weights that are not pre-trained, the order of the clouds, augmentation, dropout."""
    epochs: int = 250
    """Passes over the training split."""
    batch_size: int = 32
    """Clouds per step. What is left of an epoch's shuffle after the last full batch waits for the next epoch."""
    lr: float = 0.1
    """Learning rate of SGD in the first epoch."""
    final_lr: float = 1e-3
    """Where the cosine of the learning rate would be one epoch after the last."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """L2 penalty in SGD."""
    label_smoothing: float = 0.2
    """Probability that the target spreads evenly over the wrong classes."""
    points: int = 1024
    """The first so many points of each cloud."""
    k: int | None = None
    """Neighbours in the encoder's graphs; None: as in pre-training, or the architecture's default without a run."""
    random_init: bool = True
    """Train the same architecture from random initialisation too."""
    picture: bool = True
    """Draw the picture beside the JSON file."""
    device: str = "auto"
    """Where the models run: "auto" (the first GPU, else the CPU) or a torch device."""

    def validate(self) -> None:
        """Raise ValueError, naming the option, if a value cannot work."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers from 0 on, at least one; got {self.seeds}")
        for name, least in (("epochs", 1), ("batch_size", 2), ("points", 1)):  # batch norm needs two clouds
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.final_lr <= self.lr or not 0 < self.lr < math.inf:
            raise ValueError(
                f"lr must be positive and final_lr between 0 and lr; got {self.lr} and {self.final_lr}"
            )
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.run is None and not self.random_init:
            raise ValueError("nothing to train: give a run, or leave random_init on")


@dataclass
class ConfigOfClouds(FinetuneConfig):
    """The options of the protocols on shapes that stand upright."""

    up: Literal["y", "z"] = "y"
    """Axis that points up in these clouds; they are turned to the one about which the run was pre-trained."""
    augmentation: Literal["scale_shift", "views", "none"] = "scale_shift"
    """Of the training clouds: DGCNN's (every axis scaled, the cloud moved), pre-training's views, or none."""

    def augment(self) -> Callable[[Tensor, torch.Generator], Tensor]:
        """What `augmentation` names, as a callable (points, generator) -> points."""
        return {
            "scale_shift": ScaleShift(),
            "views": CloudAugmentation(up=up_axis(self.run)),
            "none": lambda points, _: points,
        }[self.augmentation]


class Examples(NamedTuple):
    """Clouds (n, N, C) float32 with the labels of the clouds (n,) or of their points (n, N), int64."""

    points: Tensor
    targets: Tensor
    categories: Tensor  # (n,) int64, known to the model; zeros where there are none


@dataclass(frozen=True)
class Task:
    """What to train, on what, and how its model answers."""

    name: str  # of the folder with the trainings
    architecture: EncoderConfig  # with its head
    backbone: dict[str, Tensor] | None  # the pre-trained weights, without heads
    train: Examples
    test: Examples
    logits: Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, points, categories -> (B, [N,] classes)
    augment: Callable[[Tensor, torch.Generator], Tensor]


class Outcome(NamedTuple):
    """One training: its predictions on the test split, and what it reported after each epoch."""

    seed: int
    predictions: np.ndarray  # as the targets of the test split
    history: list[dict[str, float]]
    seconds: float


class FinetunedProtocol(abc.ABC):
    """A protocol that trains on labels: what `evaluate` does with the parts that a subclass gives."""

    name: ClassVar[str]
    """Of the result files and of the folder with the trainings."""
    allowed: ClassVar[tuple[str, ...]]
    """Encoders that it takes."""
    default: ClassVar[EncoderConfig]
    """The encoder without a run."""
    metrics: ClassVar[dict[str, str]]
    """Numbers of `score` for the table, with their titles."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    @abc.abstractmethod
    def task(self, architecture: EncoderConfig) -> Task:
        """Load the data; what to train, from an encoder without heads."""

    @abc.abstractmethod
    def score(self, predicted: np.ndarray) -> dict[str, Any]:
        """What the predictions on the test split are worth."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the results say of the data: names of classes or categories, and sizes."""

    @abc.abstractmethod
    def picture(self, encoders: dict[str, Any], outcomes: dict[str, list[Outcome]]) -> Figure:
        """The picture beside the JSON file; `encoders` as `report` has them."""

    def details(self, encoders: dict[str, Any]) -> list[str]:
        """Lines below the table."""
        return []

    def evaluate(self) -> dict[str, Any]:
        """Train and test; write NAME.json and NAME.png, print the table, return what NAME.json holds.

        Keys: encoders (as `report` has them), those of `facts`, seconds_total, config, versions. Raises as
        `fine_tune` does.
        """
        config = self.config
        for module in ("sklearn", "h5py", "tqdm", "tensorboard") + ("matplotlib",) * config.picture:
            require(module, extra="eval")
        config.validate()
        start, out = time.perf_counter(), output_folder(config)
        architecture = architecture_of(config, allowed=self.allowed, default=self.default)
        outcomes = fine_tune(config, self.task(architecture), out)
        encoders = report(outcomes, self.score)
        results = {
            "encoders": encoders,
            **self.facts(),
            "seconds_total": time.perf_counter() - start,
            "config": config_to_dict(config),
            "versions": versions(),
        }
        figure = self.picture(encoders, outcomes) if config.picture else None
        written = write_results(out, self.name, results, figure)
        print("\n".join(format_scores(encoders, self.metrics) + self.details(encoders)))
        print(f"written: {', '.join(map(str, written))}")
        return results


def architecture_of(
    config: FinetuneConfig, *, allowed: Sequence[str], default: EncoderConfig
) -> EncoderConfig:
    """What the run's encoder is made from, or `default`; without heads, with the `k` that was asked for.

    Raises ValueError for an encoder that is none of `allowed`, and a `k` for one that has no graphs.
    """
    found = default if config.run is None else checkpoints.load_encoder_config(config.run)
    if found.name not in allowed:
        raise ValueError(
            f"{config.run} holds a {found.name} encoder; this protocol takes {' or '.join(allowed)}. "
            f"Pre-train one with `--model.point-encoder {allowed[0]}`"
        )
    heads = ("num_classes", "num_parts", "num_categories")
    options = {key: value for key, value in found.options.items() if key not in heads}
    if config.k is not None:
        options["k"] = config.k
    return EncoderConfig(found.name, {**options, "projection_dim": None})


def load_backbone(config: FinetuneConfig, architecture: EncoderConfig) -> dict[str, Tensor] | None:
    """The weights of the run's encoder without its heads; None without a run."""
    if config.run is None:
        return None
    with torch.random.fork_rng(devices=[]):
        state = checkpoints.load_encoder(config.run).state_dict()
        names = create(architecture.name, **architecture.options).state_dict()
    return {name: state[name] for name in names}


def learning_rate(config: FinetuneConfig, epoch: int) -> float:
    """The rate of an epoch, counted from 0: a cosine from lr that would reach final_lr one epoch after the last."""
    share = 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    return config.final_lr + (config.lr - config.final_lr) * share


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy of logits (n, K) with targets of 1 - smoothing for the right class of targets (n,), and the
    rest in equal shares for the others, as DGCNN has it."""
    classes = logits.shape[1]
    share = smoothing * classes / max(classes - 1, 1)  # PyTorch gives the right class a share, too
    return F.cross_entropy(logits, targets, label_smoothing=min(share, 1.0))


def fine_tune(config: FinetuneConfig, task: Task, out: Path) -> dict[str, list[Outcome]]:
    """Train and test with every seed, from each initialisation; keys as in `protocol.NAMES`.

    Every training has a folder OUT/NAME/<initialisation>_seed<S> with state.pt, weights.safetensors (which
    `models.from_pretrained` loads), log.jsonl and tensorboard/.

    Raises:
        FileExistsError: a training's folder holds a state and `resume` is off.
        ValueError: fewer clouds than a batch, or a training to continue that had other options or data.
        FloatingPointError: the loss is not finite; the last checkpoint is what it was.
        KeyboardInterrupt: SIGINT or SIGTERM came; the state is saved.
    """
    require("tensorboard", extra="train")
    if len(task.train.points) < config.batch_size:
        raise ValueError(
            f"the training split has {len(task.train.points)} clouds, fewer than one batch of {config.batch_size}"
        )
    starts = {"pretrained": task.backbone, "random_init": None}
    if config.run is None:
        del starts["pretrained"]
    if not config.random_init:
        del starts["random_init"]
    folders = {(key, s): out / task.name / f"{key}_seed{s}" for key in starts for s in config.seeds}
    held = [folder for folder in folders.values() if (folder / "state.pt").exists()]
    if held and not config.resume:
        raise FileExistsError(
            f"{held[0]} already holds a training; pass --resume to continue it, or another --out"
        )
    device = resolve_device(config.device)
    fingerprints = {key: _fingerprint(task.train, backbone) for key, backbone in starts.items()}
    outcomes: dict[str, list[Outcome]] = {key: [] for key in starts}
    for (key, seed), folder in folders.items():
        log.info("%s, %s, seed %d", task.name.replace("_", " "), NAMES[key], seed)
        with isolated(device):
            training = _Training(
                replace(config, seeds=(seed,)), task, starts[key], fingerprints[key], folder, device
            )
            outcomes[key].append(training.run())
    return outcomes


def report(
    outcomes: dict[str, list[Outcome]], score: Callable[[np.ndarray], dict[str, Any]]
) -> dict[str, Any]:
    """For each initialisation: runs, one a seed with what `score` says of its predictions, train_loss and
    train_accuracy by epoch, seconds; mean and std (n - 1 in the denominator; None for one seed) of score's numbers.
    """
    return {key: _entry(runs, [score(each.predictions) for each in runs]) for key, runs in outcomes.items()}


def format_scores(encoders: dict[str, Any], metrics: dict[str, str]) -> list[str]:
    """A line for each initialisation under a head: its metrics, given with their titles, over the seeds."""
    lines = [
        f"{'initialisation':<24}" + "".join(f"{title:>20}" for title in metrics.values()) + f"{'seeds':>8}"
    ]
    for key, entry in encoders.items():
        values = ""
        for metric in metrics:
            mean, std = entry["mean"][metric], entry["std"][metric]
            text = f"{100 * mean:.1f} %" + ("" if std is None else f" ± {100 * std:.1f}")
            values += f"{text:>20}"
        lines.append(f"{NAMES[key]:<24}{values}{len(entry['runs']):>8}")
    return lines


def format_by_name(encoders: dict[str, Any], title: str, scores: str, names: Sequence[str]) -> list[str]:
    """A line for each class or category under a head: the mean over the seeds of what is in `scores` by its name."""
    lines = ["", f"{title:<24}" + "".join(f"{NAMES[key]:>24}" for key in encoders)]
    for name in names:
        row = ""
        for entry in encoders.values():
            values = [run[scores][name] for run in entry["runs"] if name in run[scores]]
            row += f"{100 * np.mean(values):>22.1f} %" if values else f"{'absent':>24}"
        lines.append(f"{name:<24}{row}")
    return lines


def _entry(runs: list[Outcome], scores: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {
            "seed": run.seed,
            **score,
            "train_loss": [record["loss"] for record in run.history],
            "train_accuracy": [record["accuracy"] for record in run.history],
            "seconds": run.seconds,
        }
        for run, score in zip(runs, scores, strict=True)
    ]
    values = {
        name: [score[name] for score in scores] for name, v in scores[0].items() if isinstance(v, float)
    }
    return {
        "runs": rows,
        "mean": {name: float(np.mean(each)) for name, each in values.items()},
        "std": {
            name: float(np.std(each, ddof=1)) if len(each) > 1 else None for name, each in values.items()
        },
    }


class _Training:
    """One seed from one initialisation."""

    def __init__(
        self,
        config: FinetuneConfig,
        task: Task,
        backbone: dict[str, Tensor] | None,
        fingerprint: str,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.config, self.task, self.folder, self.device = config, task, folder, device
        self.seed = config.seeds[0]
        self.steps_per_epoch = len(task.train.points) // config.batch_size
        self.total = config.epochs * self.steps_per_epoch
        torch.manual_seed(derive_seed(self.seed, _INIT))
        model = task.architecture.create()
        if backbone is not None:
            model.load_state_dict({**model.state_dict(), **backbone})
        self.model = model.to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.fingerprint = fingerprint
        options = config_to_dict(config)
        self.options = {key: value for key, value in options.items() if key not in _MAY_CHANGE}
        self.step, self.seconds = 0, 0.0
        self.sums = dict.fromkeys(("loss", "accuracy"), 0.0)  # of the epoch so far
        if (folder / "state.pt").exists():
            self._restore(load_state(folder / "state.pt"))

    def run(self) -> Outcome:
        if self.step < self.total:
            self._train()
        history = read_log(self.folder / "log.jsonl")
        return Outcome(self.seed, self._predict(self.task.test), history, self.seconds)

    def _train(self) -> None:
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        run_log = RunLog(self.folder, first=self.step, total=self.total, batch_size=config.batch_size)
        before, started = self.seconds, time.perf_counter()
        with contextlib.closing(run_log), Signals() as signals:
            while self.step < self.total:
                epoch, place = divmod(self.step, self.steps_per_epoch)
                if place == 0:
                    self.sums = dict.fromkeys(self.sums, 0.0)
                loss = self._train_step(self._rows(epoch, place), epoch)
                self.step += 1
                self.seconds = before + time.perf_counter() - started
                run_log.advance(loss, f"{epoch + 1}/{config.epochs}")
                ends_epoch = place + 1 == self.steps_per_epoch
                if ends_epoch:
                    means = {name: value / self.steps_per_epoch for name, value in self.sums.items()}
                    run_log.write(self.step, epoch + 1, {**means, "lr": learning_rate(config, epoch)})
                if ends_epoch or signals.received:
                    self._save()
                if signals.received and self.step < self.total:
                    raise KeyboardInterrupt(
                        f"stopped by {signals.received} after step {self.step} of {self.total}; "
                        "the state is saved: the same command with --resume continues"
                    )

    def _rows(self, epoch: int, place: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _SHUFFLE, epoch))
        order = torch.randperm(len(self.task.train.points), generator=generator)
        size = self.config.batch_size
        return order[place * size : (place + 1) * size]

    def _train_step(self, rows: Tensor, epoch: int) -> float:
        torch.manual_seed(derive_seed(self.seed, _STEP, self.step))
        # On the CPU, so that every device sees the same clouds.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _AUGMENT, self.step))
        points, targets, categories = (each[rows].to(self.device) for each in self.task.train)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, epoch)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.task.logits(self.model, self.task.augment(points, generator), categories).flatten(0, -2)
        loss = smoothed_cross_entropy(logits, targets.flatten(), self.config.label_smoothing)
        loss.backward()
        right = (logits.detach().argmax(-1) == targets.flatten()).float().mean()
        value, accuracy = torch.stack([loss.detach(), right]).tolist()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.folder}: the loss of step {self.step + 1} is {value}; lower --lr, or look for NaN or "
                "infinity in the clouds. The last checkpoint is intact"
            )
        self.optimizer.step()
        self.sums["loss"] += value
        self.sums["accuracy"] += accuracy
        return value

    @torch.inference_mode()
    def _predict(self, examples: Examples) -> np.ndarray:
        tqdm = require("tqdm", extra="eval").tqdm
        self.model.eval()
        batches = [each.split(self.config.batch_size) for each in (examples.points, examples.categories)]
        found = [
            self.task.logits(self.model, points.to(self.device), categories.to(self.device)).argmax(-1).cpu()
            for points, categories in tqdm(
                zip(*batches, strict=True), total=len(batches[0]), desc="test", disable=None
            )
        ]
        return torch.cat(found).numpy()

    def _save(self) -> None:
        # Weights first: a kill in between leaves a state that will write them again.
        checkpoints.save_encoder(self.folder / "weights.safetensors", self.model, self.task.architecture)
        state = TrainState(
            step=self.step,
            config=self.options,
            shapes=self.fingerprint,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            metrics=self.sums,
            seconds=self.seconds,
        )
        save_state(self.folder / "state.pt", state)

    def _restore(self, state: TrainState) -> None:
        check_same_run(state.config, self.options)
        if state.shapes != self.fingerprint:
            raise ValueError(
                f"the training in {self.folder} was started on other clouds or from other weights; "
                "it can only continue on the same ones"
            )
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self.step, self.sums, self.seconds = state.step, state.metrics, state.seconds


def _fingerprint(examples: Examples, backbone: dict[str, Tensor] | None) -> str:
    digest = hashlib.sha256()
    for each in (*examples, *(backbone or {}).values()):
        digest.update(each.contiguous().cpu().numpy())
    return digest.hexdigest()
