"""Fine-tuned classification: all layers and a classifier, from a pre-trained encoder and from random initialisation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from crosspoint._optional import require
from crosspoint.data import CloudAugmentation, ScaleShift
from crosspoint.evaluate import plots
from crosspoint.evaluate.finetune import (
    Examples,
    FinetuneConfig,
    Outcome,
    Task,
    architecture_of,
    fine_tune,
    format_scores,
    load_backbone,
    report,
)
from crosspoint.evaluate.protocol import (
    NAMES,
    Dataset,
    load_splits,
    output_folder,
    per_class_accuracy,
    up_axis,
    versions,
    write_results,
)
from crosspoint.models.checkpoints import EncoderConfig
from crosspoint.train.config import config_to_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClassifyConfig", "evaluate_classify"]


@dataclass
class ClassifyConfig(FinetuneConfig):
    """Fine-tune an encoder with a classifier on labelled clouds, beside the same from random initialisation."""

    dataset: Dataset = "modelnet40"
    """Labelled clouds to train and test on."""
    up: Literal["y", "z"] = "y"
    """Axis that points up in these clouds; they are turned to the one about which the run was pre-trained."""
    augmentation: Literal["scale_shift", "views", "none"] = "scale_shift"
    """Of the training clouds: DGCNN's (every axis scaled, the cloud moved), pre-training's views, or none."""


def evaluate_classify(config: ClassifyConfig) -> dict[str, Any]:
    """Train and test; write classify.json and classify.png, print a table, return what classify.json holds.

    Keys: encoders (as `finetune.report` has them, with accuracy, class_accuracy (the mean over classes), per_class and
    confusion), class_names, sizes, seconds_total, config, versions. Raises as `finetune.fine_tune` does.
    """
    for module in ("sklearn", "h5py", "tqdm", "tensorboard") + ("matplotlib",) * config.picture:
        require(module, extra="eval")
    config.validate()
    start, out = time.perf_counter(), output_folder(config)
    architecture = architecture_of(
        config, allowed=("dgcnn", "pointnet"), default=EncoderConfig("dgcnn", {"k": 20})
    )
    points, labels, class_names = load_splits(config)
    train, test = (
        Examples(
            torch.from_numpy(np.ascontiguousarray(points[split])),
            torch.from_numpy(labels[split]),
            torch.zeros(len(labels[split]), dtype=torch.int64),
        )
        for split in ("train", "test")
    )
    task = Task(
        name="classify",
        architecture=EncoderConfig(
            architecture.name, {**architecture.options, "num_classes": len(class_names)}
        ),
        backbone=load_backbone(config, architecture),
        train=train,
        test=test,
        logits=lambda model, points, _: model.classifier(model(points)),
        augment=augmentation(config.augmentation, up_axis(config.run)),
    )
    outcomes = fine_tune(config, task, out)
    results = {
        "encoders": report(outcomes, lambda found: _score(found, labels["test"], class_names)),
        "class_names": class_names,
        "sizes": {
            **{split: len(labels[split]) for split in labels},
            "points": config.points,
            "classes": len(class_names),
        },
        "seconds_total": time.perf_counter() - start,
        "config": config_to_dict(config),
        "versions": versions(),
    }
    figure = _picture(results, labels["test"], outcomes) if config.picture else None
    written = write_results(out, "classify", results, figure)
    print(format_table(results))
    print(f"written: {', '.join(map(str, written))}")
    return results


def augmentation(name: str, up: str) -> Any:
    """A callable (points, generator) -> points: "scale_shift", "views" (turned about `up`) or "none"."""
    return {
        "scale_shift": ScaleShift(),
        "views": CloudAugmentation(up=up),
        "none": lambda points, _: points,
    }[name]


def format_table(results: dict[str, Any]) -> str:
    """The accuracies of classify.json as a table for the terminal."""
    metrics = {"accuracy": "accuracy, test", "class_accuracy": "mean over classes"}
    return "\n".join(format_scores(results, metrics))


def _score(predicted: np.ndarray, labels: np.ndarray, class_names: list[str]) -> dict[str, Any]:
    per_class = per_class_accuracy(labels, predicted, class_names)
    return {
        "accuracy": float((predicted == labels).mean()),
        "class_accuracy": float(np.mean(list(per_class.values()))),
        "per_class": per_class,
        "confusion": plots.confusion_counts(labels, predicted, len(class_names)).tolist(),
    }


def _picture(results: dict[str, Any], labels: np.ndarray, outcomes: dict[str, list[Outcome]]) -> Figure:
    """Training curves of every seed; the confusion matrix and the classes of the first one."""
    encoders, names = results["encoders"], results["class_names"]
    figure = plots.new_figure(18, 16)
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, 11))
    for axes, key, title in zip(
        top.subplots(1, 2),
        ("train_loss", "train_accuracy"),
        ("Training loss", "Training accuracy"),
        strict=True,
    ):
        curves = {NAMES[each]: [run[key] for run in entry["runs"]] for each, entry in encoders.items()}
        plots.draw_curves(axes, curves, ylabel=key.split("_")[1], title=f"{title}, every seed")
    left, right = bottom.subplots(1, 2, width_ratios=(2, 1))
    first = next(iter(outcomes))
    title = f"Confusion matrix, {NAMES[first]}, seed {outcomes[first][0].seed} (% of true class)"
    plots.draw_confusion(left, labels, outcomes[first][0].predictions, names, title=title)
    plots.draw_class_accuracies(
        right, {NAMES[key]: entry["runs"][0]["per_class"] for key, entry in encoders.items()}, names
    )
    return figure
