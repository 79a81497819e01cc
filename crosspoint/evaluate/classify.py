"""Fine-tuned classification: all layers and a classifier, from a pre-trained encoder and from random initialisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from crosspoint.evaluate import plots
from crosspoint.evaluate.finetune import (
    ConfigOfClouds,
    Examples,
    FinetunedProtocol,
    Outcome,
    Task,
    load_backbone,
)
from crosspoint.evaluate.protocol import NAMES, Dataset, load_splits, per_class_accuracy
from crosspoint.models.checkpoints import EncoderConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClassifyConfig", "evaluate_classify"]


@dataclass
class ClassifyConfig(ConfigOfClouds):
    """Fine-tune an encoder with a classifier on labelled clouds, beside the same from random initialisation."""

    dataset: Dataset = "modelnet40"
    """Labelled clouds to train and test on."""
    per_class: int | None = None
    """Train on so few clouds of each class, the first ones of the training split. None: all."""

    def validate(self) -> None:
        super().validate()
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {self.per_class}")


def evaluate_classify(config: ClassifyConfig) -> dict[str, Any]:
    """Train and test; write classify.json and classify.png, print a table, return what classify.json holds.

    Keys: encoders (as `finetune.report` has them, with accuracy, class_accuracy (the mean over classes), per_class and
    confusion), class_names, sizes, seconds_total, config, versions. Raises as `finetune.fine_tune` does.
    """
    return _Classification(config).evaluate()


class _Classification(FinetunedProtocol):
    name = "classify"
    allowed = ("dgcnn", "pointnet")
    default = EncoderConfig("dgcnn", {"k": 20})
    metrics: ClassVar = {"accuracy": "accuracy, test", "class_accuracy": "mean over classes"}
    config: ClassifyConfig

    def task(self, architecture: EncoderConfig) -> Task:
        points, labels, self.class_names = load_splits(self.config)
        rows = {split: np.arange(len(each)) for split, each in labels.items()}
        if self.config.per_class is not None:
            rows["train"] = _first_of_each(labels["train"], self.config.per_class)
        self.labels = {split: each[rows[split]] for split, each in labels.items()}
        train, test = (
            Examples(
                torch.from_numpy(np.ascontiguousarray(points[split][rows[split]])),
                torch.from_numpy(self.labels[split]),
                torch.zeros(len(rows[split]), dtype=torch.int64),
            )
            for split in ("train", "test")
        )
        head = {"num_classes": len(self.class_names)}
        return Task(
            name=self.name,
            architecture=EncoderConfig(architecture.name, {**architecture.options, **head}),
            backbone=load_backbone(self.config, architecture),
            train=train,
            test=test,
            logits=lambda model, points, _: model.classifier(model(points)),
            augment=self.config.augment(),
        )

    def score(self, predicted: np.ndarray) -> dict[str, Any]:
        labels, names = self.labels["test"], self.class_names
        per_class = per_class_accuracy(labels, predicted, names)
        return {
            "accuracy": float((predicted == labels).mean()),
            "class_accuracy": float(np.mean(list(per_class.values()))),
            "per_class": per_class,
            "confusion": plots.confusion_counts(labels, predicted, len(names)).tolist(),
        }

    def facts(self) -> dict[str, Any]:
        sizes = {split: len(each) for split, each in self.labels.items()}
        sizes |= {"points": self.config.points, "classes": len(self.class_names)}
        return {"class_names": self.class_names, "sizes": sizes}

    def picture(self, encoders: dict[str, Any], outcomes: dict[str, list[Outcome]]) -> Figure:
        """Training curves of every seed; the confusion matrix and the classes of the first one."""
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
        shown = outcomes[first][0]
        title = f"Confusion matrix, {NAMES[first]}, seed {shown.seed} (% of true class)"
        plots.draw_confusion(left, self.labels["test"], shown.predictions, self.class_names, title=title)
        per_class = {NAMES[key]: entry["runs"][0]["per_class"] for key, entry in encoders.items()}
        plots.draw_class_accuracies(right, per_class, self.class_names)
        return figure


def _first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """The rows of the first `count` of each label, in order."""
    rows = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))
