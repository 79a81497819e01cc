"""Fine-tuned part segmentation: which part of its object each point belongs to; mean IoU by shape and by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from crosspoint.data import PartClouds, load_parts
from crosspoint.evaluate import plots
from crosspoint.evaluate.features import turn_upright
from crosspoint.evaluate.finetune import (
    ConfigOfClouds,
    Examples,
    FinetunedProtocol,
    Outcome,
    Task,
    format_by_name,
    load_backbone,
)
from crosspoint.evaluate.protocol import NAMES, up_axis
from crosspoint.models.checkpoints import EncoderConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PartSegmentationConfig", "evaluate_part_segmentation", "part_scores", "shape_iou"]

_SHOWN = 6  # shapes in the picture


@dataclass
class PartSegmentationConfig(ConfigOfClouds):
    """Fine-tune a part segmentation network (on ShapeNetPart, or its layout), beside random initialisation."""

    epochs: int = 300
    """Passes over the training split."""
    batch_size: int = 8
    """Clouds per step. What is left of an epoch's shuffle after the last full batch waits for the next epoch."""
    points: int = 2048
    """The first so many points of each cloud."""
    k: int | None = 40
    """Neighbours in the encoder's graphs; None: as in pre-training."""
    split: Literal["trainval", "train"] = "trainval"
    """What to train on; the validation split, where there is one, is used for nothing else."""


def shape_iou(predicted: np.ndarray, true: np.ndarray, parts: Sequence[int]) -> float:
    """Mean IoU over the parts that a shape's category can have: predicted (N,), true (N,) ints.

    A part that occurs in neither counts as 1. Points predicted as a part of another category are wrong everywhere.
    """
    ious = []
    for part in parts:
        a, b = predicted == part, true == part
        union = int((a | b).sum())
        ious.append(int((a & b).sum()) / union if union else 1.0)
    return float(np.mean(ious))


def part_scores(predicted: np.ndarray, clouds: PartClouds) -> dict[str, Any]:
    """Scores of predicted (n, N): instance_miou (mean over shapes), class_miou (mean over the categories that occur),
    per_category (mean over the category's shapes), accuracy (of points)."""
    true, categories = clouds.parts.numpy(), clouds.categories.numpy()
    ious = np.array(
        [shape_iou(p, t, clouds.parts_of[c]) for p, t, c in zip(predicted, true, categories, strict=True)]
    )
    per_category = {
        name: float(ious[categories == c].mean())
        for c, name in enumerate(clouds.category_names)
        if (categories == c).any()
    }
    return {
        "instance_miou": float(ious.mean()),
        "class_miou": float(np.mean(list(per_category.values()))),
        "accuracy": float((predicted == true).mean()),
        "per_category": per_category,
    }


def evaluate_part_segmentation(config: PartSegmentationConfig) -> dict[str, Any]:
    """Train and test; write part_segmentation.json and .png, print tables, return what the JSON file holds.

    Keys: encoders (as `finetune.report` has them, with what `part_scores` gives), category_names, sizes, seconds_total,
    config, versions. Raises as `finetune.fine_tune` does.
    """
    return _PartSegmentation(config).evaluate()


class _PartSegmentation(FinetunedProtocol):
    name = "part_segmentation"
    allowed = ("dgcnn_part",)
    default = EncoderConfig("dgcnn_part", {"k": 40})
    metrics: ClassVar = {
        "instance_miou": "instance mIoU",
        "class_miou": "class mIoU",
        "accuracy": "point accuracy",
    }
    config: PartSegmentationConfig

    def task(self, architecture: EncoderConfig) -> Task:
        config = self.config
        train, self.test = (
            load_parts(config.data, split, points=config.points) for split in (config.split, "test")
        )
        self.training_shapes = len(train.points)
        heads = {"num_parts": len(self.test.part_names), "num_categories": len(self.test.category_names)}
        return Task(
            name=self.name,
            architecture=EncoderConfig(architecture.name, {**architecture.options, **heads}),
            backbone=load_backbone(config, architecture),
            train=self._examples(train),
            test=self._examples(self.test),
            logits=lambda model, points, categories: model.segment(points, categories),
            augment=config.augment(),
        )

    def _examples(self, clouds: PartClouds) -> Examples:
        points = turn_upright(clouds.points.numpy(), self.config.up, up_axis(self.config.run))
        return Examples(torch.from_numpy(np.ascontiguousarray(points)), clouds.parts, clouds.categories)

    def score(self, predicted: np.ndarray) -> dict[str, Any]:
        return part_scores(predicted, self.test)

    def facts(self) -> dict[str, Any]:
        sizes = {
            "train": self.training_shapes,
            "test": len(self.test.points),
            "points": self.config.points,
            "categories": len(self.test.category_names),
            "parts": len(self.test.part_names),
        }
        return {"category_names": list(self.test.category_names), "sizes": sizes}

    def details(self, encoders: dict[str, Any]) -> list[str]:
        names = next(iter(encoders.values()))["runs"][0]["per_category"]
        return format_by_name(encoders, "category", "per_category", list(names))

    def picture(self, encoders: dict[str, Any], outcomes: dict[str, list[Outcome]]) -> Figure:
        """A shape of each of some categories, its parts in colour: as labelled, and as the first seeds predict.

        Parts of other categories are black.
        """
        test = self.test
        categories, true = test.categories.numpy(), test.parts.numpy()
        rows = [
            int(np.flatnonzero(categories == c)[0])
            for c in np.unique(categories)[np.linspace(0, len(np.unique(categories)) - 1, _SHOWN).astype(int)]
        ]
        rows = list(dict.fromkeys(rows))
        columns = {"labels": true, **{NAMES[key]: runs[0].predictions for key, runs in outcomes.items()}}
        figure = plots.new_figure(2.6 * len(columns) + 0.6, 2.4 * len(rows) + 0.4)
        for row_axes, shape in zip(
            figure.subplots(len(rows), len(columns), squeeze=False), rows, strict=True
        ):
            parts = test.parts_of[categories[shape]]
            palette = np.zeros((len(test.part_names), 3))
            palette[list(parts)] = plots.class_colours(len(parts))
            cloud = turn_upright(test.points[shape].numpy(), self.config.up, "y")
            for axes, (title, labels) in zip(row_axes, columns.items(), strict=True):
                plots.draw_cloud(axes, cloud, palette[labels[shape]])
                iou = (
                    ""
                    if labels is true
                    else f", IoU {100 * shape_iou(labels[shape], true[shape], parts):.0f} %"
                )
                axes.set_title(f"{title}{iou}", fontsize=9)
                axes.set(xticks=[], yticks=[])
            row_axes[0].set_ylabel(test.category_names[categories[shape]].replace("_", " "))
        return figure
