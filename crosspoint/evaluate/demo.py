"""The whole path on built-in shapes, in minutes: generate, render, pre-train, evaluate, report."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosspoint._device import resolve_device
from crosspoint._files import replace_file
from crosspoint._optional import require
from crosspoint.data import LabelledClouds, PairDataset, write_modelnet40
from crosspoint.data.generated import CLASSES, make_mesh, write_meshes
from crosspoint.data.prepare import PrepareConfig, prepare
from crosspoint.evaluate import plots
from crosspoint.evaluate.protocol import NAMES, versions
from crosspoint.evaluate.svm import Evaluation, SvmConfig, run_protocol, write_evaluation
from crosspoint.models import CrossPointConfig
from crosspoint.train import PretrainConfig, pretrain
from crosspoint.train.config import config_to_dict, save_config
from crosspoint.train.log import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DemoConfig", "demo"]

log = logging.getLogger(__name__)

_RECIPE = "demo.yaml"
_FOLDERS = ("meshes", "pairs", "modelnet40", "run")
_REPORTS = ("summary.json", "report.png")


@dataclass
class DemoConfig:
    """Generate shapes, render them, pre-train an encoder on them, score it beside random initialisation.

    Sized for a few minutes on two CPU cores. A rerun replaces what an earlier demo left in OUT.
    """

    out: Path = Path("runs/demo")
    """Folder for everything that is made; summary.json and report.png come last."""
    seed: int = 0
    """Of the shapes, the initial weights and every random choice after them."""
    shapes_per_class: int = 60
    """Unlabelled shapes of each class for pre-training."""
    train_per_class: int = 8
    """Labelled shapes of each class for the SVM, none of which pre-training has seen."""
    test_per_class: int = 40
    """Shapes of each class to test it on, seen neither in pre-training nor by the SVM."""
    points: int = 256
    """Points per cloud."""
    views: int = 6
    """Rendered views per shape."""
    image_size: int = 48
    """Height and width of the views, in pixels."""
    k: int = 10
    """Neighbours in the encoder's graphs."""
    epochs: int = 15
    """Passes of pre-training over the unlabelled shapes."""
    batch_size: int = 16
    """Shapes per step."""
    lr: float = 1e-3
    """Learning rate of Adam in the first epoch."""
    workers: int = 2
    """Processes that render."""
    device: str = "auto"
    """Where the models run: "auto" (the first GPU, else the CPU) or a torch device."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo; write summary.json and report.png, print a table, return what summary.json holds.

    Keys: svm_accuracy, svm_accuracy_random_init, svm_c, seconds_total, seconds (by stage), sizes, loss_last,
    cpu_threads, config, versions.

    Raises FileExistsError if the folder holds anything that no demo made.
    """
    resolve_device(config.device)
    for module in ("sklearn", "matplotlib"):
        require(module, extra="eval")  # now, not after minutes of training
    out = Path(config.out)
    _clear(out)
    save_config(out / _RECIPE, config)
    clock = _Clock()
    with clock("generate"):
        write_meshes(out / "meshes", per_class=config.shapes_per_class, seed=_seed(config, 0))
        for stream, split in enumerate(("train", "test"), start=1):
            write_modelnet40(out / "modelnet40", split, _labelled_clouds(config, split, stream))
    with clock("render"):
        prepare(
            PrepareConfig(
                meshes=str(out / "meshes"),
                out=str(out / "pairs"),
                points=config.points,
                views=config.views,
                image_size=config.image_size,
                workers=config.workers,
            )
        )
    with clock("pretrain"):
        training = pretrain(_pretrain_config(config, out))
    with clock("evaluate"):
        evaluation = run_protocol(_svm_config(config, out))
    with clock("report"):
        write_evaluation(evaluation, out / "run", picture=False)
        plots.save_figure(_report(config, out, evaluation), out / "report.png")
    summary = _summary(config, clock, training, evaluation)
    text = json.dumps(summary, indent=2)
    replace_file(out / "summary.json", lambda file: file.write(text.encode()))
    print(_table(summary, out))
    return summary


class _Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        log.info("[%s]", stage)
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 2)

    def total(self) -> float:
        return round(time.perf_counter() - self.start, 2)


def _clear(out: Path) -> None:
    """An empty folder for the demo: what an earlier demo made is removed, anything else is refused."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / _RECIPE).exists():
        raise FileExistsError(f"{out} is not empty, and no demo made it: give another --out, or empty it")
    for name in _REPORTS:
        (out / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        if (out / name).exists():
            shutil.rmtree(out / name)


def _seed(config: DemoConfig, stream: int) -> int:
    """The seed of the unlabelled shapes (stream 0), or of a labelled split; all differ, between demos too."""
    return 3 * config.seed + stream


def _labelled_clouds(config: DemoConfig, split: str, stream: int) -> LabelledClouds:
    """Fresh shapes, sampled evenly over the surface, scaled to the unit sphere as in ModelNet40."""
    sample = require("trimesh.sample", extra="train")
    per_class = config.train_per_class if split == "train" else config.test_per_class
    seed = _seed(config, stream)
    clouds = []
    for label, name in enumerate(CLASSES):
        for number in range(per_class):
            mesh = make_mesh(name, number, seed)
            rng = np.random.default_rng([seed, label, number])
            cloud, _ = sample.sample_surface(mesh, config.points, seed=rng)
            cloud = cloud - cloud.mean(axis=0)
            clouds.append(cloud / np.linalg.norm(cloud, axis=1).max())
    points = torch.from_numpy(np.stack(clouds).astype(np.float32))
    return LabelledClouds(points, torch.arange(len(CLASSES)).repeat_interleave(per_class), CLASSES)


def _pretrain_config(config: DemoConfig, out: Path) -> PretrainConfig:
    return PretrainConfig(
        data=str(out / "pairs"),
        out=out / "run",
        seed=config.seed,
        epochs=config.epochs,
        batch_size=config.batch_size,
        points=config.points,
        image_size=config.image_size,
        lr=config.lr,
        workers=0,
        device=config.device,
        checkpoint_every=10**9,
        log_every=5,
        model=CrossPointConfig(k=config.k, image_encoder="resnet18"),
    )


def _svm_config(config: DemoConfig, out: Path) -> SvmConfig:
    return SvmConfig(
        run=out / "run",
        data=out / "modelnet40",
        points=config.points,
        holdout=0.25,
        repeats=25,
        seed=config.seed,
        device=config.device,
    )


def _report(config: DemoConfig, out: Path, evaluation: Evaluation) -> Figure:
    pairs = PairDataset(out / "pairs", points=config.points, image_size=config.image_size, seed=config.seed)
    first = {name.split("/")[0]: index for index, name in reversed(list(enumerate(pairs.names)))}
    shown = [pairs[index] for index in first.values()][::-1]
    encoders = evaluation.results["encoders"]
    return plots.demo_figure(
        [item["image"].numpy() for item in shown],
        [item["points"].numpy() for item in shown],
        [pairs.names[item["index"]].split("/")[0] for item in shown],
        read_log(out / "run" / "log.jsonl"),
        {NAMES[key]: plots.tsne(each, seed=config.seed) for key, each in evaluation.test_features.items()},
        {NAMES[key]: entry["accuracy"] for key, entry in encoders.items()},
        evaluation.test_labels,
        evaluation.results["class_names"],
    )


def _summary(
    config: DemoConfig, clock: _Clock, training: dict[str, Any], evaluation: Evaluation
) -> dict[str, Any]:
    results = evaluation.results
    return {
        "svm_accuracy": results["svm_accuracy"],
        "svm_accuracy_random_init": results["svm_accuracy_random_init"],
        "svm_c": {key: entry["c"] for key, entry in results["encoders"].items()},
        "seconds_total": clock.total(),
        "seconds": clock.seconds,
        "sizes": {
            "classes": len(CLASSES),
            "pretrain_shapes": training["shapes"],
            "pretrain_steps": training["steps"],
            "svm_train": results["sizes"]["train"],
            "svm_test": results["sizes"]["test"],
        },
        "loss_last": training["loss"],
        "cpu_threads": torch.get_num_threads(),
        "config": config_to_dict(config),
        "versions": versions(),
    }


def _table(summary: dict[str, Any], out: Path) -> str:
    sizes, seconds = summary["sizes"], summary["seconds"]
    lines = [
        "",
        f"{sizes['pretrain_shapes']} shapes without labels, {sizes['pretrain_steps']} steps of pre-training; "
        f"then a linear SVM on {sizes['svm_train']} other shapes, tested on {sizes['svm_test']}",
        "",
        f"  {'encoder':<26}{'accuracy':>10}{'C':>10}",
    ]
    for key, name, value in (
        ("pretrained", "pre-trained", summary["svm_accuracy"]),
        ("random_init", "random initialisation", summary["svm_accuracy_random_init"]),
    ):
        lines.append(f"  {name:<26}{100 * value:>8.1f} %{summary['svm_c'][key]:>10g}")
    stages = ", ".join(f"{stage} {spent:.0f}" for stage, spent in seconds.items())
    lines += [
        "",
        f"  {summary['seconds_total']:.0f} s: {stages}",
        f"  written: {out / 'summary.json'}, {out / 'report.png'}",
    ]
    return "\n".join(lines)
