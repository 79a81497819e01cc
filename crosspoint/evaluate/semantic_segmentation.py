"""Fine-tuned semantic segmentation of rooms (S3DIS): the class of every point; mean IoU, overall accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from crosspoint.data import RoomBlocks, load_s3dis
from crosspoint.evaluate import plots
from crosspoint.evaluate.features import turn_upright
from crosspoint.evaluate.finetune import (
    Examples,
    FinetuneConfig,
    FinetunedProtocol,
    Outcome,
    Task,
    format_by_name,
    load_backbone,
)
from crosspoint.evaluate.protocol import NAMES
from crosspoint.models.checkpoints import EncoderConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SemanticSegmentationConfig", "evaluate_semantic_segmentation", "semantic_scores"]

_SHOWN = 4  # blocks in the picture


@dataclass
class SemanticSegmentationConfig(FinetuneConfig):
    """Fine-tune a semantic segmentation network on S3DIS, beside the same from random initialisation.

    The network sees nine channels a point. One that was pre-trained on clouds sees three, the position in the block;
    so does then the network from random initialisation.
    """

    epochs: int = 100
    """Passes over the blocks of the training areas."""
    points: int = 4096
    """The first so many points of each block."""
    test_area: int = 5
    """The area to test on, 1 to 6; the network is trained on the others."""


def semantic_scores(confusion: np.ndarray, class_names: tuple[str, ...]) -> dict[str, Any]:
    """miou, overall_accuracy, class_accuracy, per_class of confusion (classes, classes): points, true by predicted.

    IoU of a class: points of which label and prediction are it, over those of which either is. The mean is over the
    classes that occur in either, class_accuracy over those that are true somewhere.
    """
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = true + predicted - right
    per_class = {name: float(right[c] / union[c]) for c, name in enumerate(class_names) if union[c]}
    return {
        "miou": float(np.mean(list(per_class.values()))),
        "overall_accuracy": float(right.sum() / confusion.sum()),
        "class_accuracy": float((right[true > 0] / true[true > 0]).mean()),
        "per_class": per_class,
    }


def evaluate_semantic_segmentation(config: SemanticSegmentationConfig) -> dict[str, Any]:
    """Train and test; write semantic_segmentation.json and .png, print tables, return what the JSON file holds.

    Keys: encoders (as `finetune.report` has them, with what `semantic_scores` gives, and confusion), class_names,
    sizes, seconds_total, config, versions. Raises as `finetune.fine_tune` does.
    """
    return _SemanticSegmentation(config).evaluate()


class _SemanticSegmentation(FinetunedProtocol):
    name = "semantic_segmentation"
    allowed = ("dgcnn_semantic",)
    default = EncoderConfig("dgcnn_semantic", {"k": 20, "in_channels": 9})
    metrics: ClassVar = {
        "miou": "mIoU",
        "overall_accuracy": "overall accuracy",
        "class_accuracy": "class accuracy",
    }
    config: SemanticSegmentationConfig

    def task(self, architecture: EncoderConfig) -> Task:
        config = self.config
        train, self.test = (
            load_s3dis(config.data, split, test_area=config.test_area, points=config.points)
            for split in ("train", "test")
        )
        self.training_blocks = len(train.points)
        self.channels = architecture.options["in_channels"]
        if self.channels not in (3, 9):
            raise ValueError(
                f"{config.run} holds an encoder of {self.channels} channels; S3DIS has 9, of which 3 are the position"
            )
        head = {"num_classes": len(self.test.class_names)}
        return Task(
            name=self.name,
            architecture=EncoderConfig(architecture.name, {**architecture.options, **head}),
            backbone=load_backbone(config, architecture),
            train=self._examples(train),
            test=self._examples(self.test),
            logits=lambda model, points, _: model.segment(points),
            augment=lambda points, _: points,
        )

    def _examples(self, blocks: RoomBlocks) -> Examples:
        points = blocks.points[:, :, : self.channels].contiguous()
        return Examples(points, blocks.labels, blocks.labels.new_zeros(len(points)))

    def score(self, predicted: np.ndarray) -> dict[str, Any]:
        names = self.test.class_names
        confusion = plots.confusion_counts(self.test.labels.numpy(), predicted, len(names))
        return {**semantic_scores(confusion, names), "confusion": confusion.tolist()}

    def facts(self) -> dict[str, Any]:
        sizes = {
            "train": self.training_blocks,
            "test": len(self.test.points),
            "points": self.config.points,
            "channels": self.channels,
            "classes": len(self.test.class_names),
        }
        return {"class_names": list(self.test.class_names), "sizes": sizes}

    def details(self, encoders: dict[str, Any]) -> list[str]:
        return format_by_name(encoders, "class", "per_class", self.test.class_names)

    def picture(self, encoders: dict[str, Any], outcomes: dict[str, list[Outcome]]) -> Figure:
        """Some blocks in the colours of the classes: as labelled, and as the first seeds predict; IoU by class."""
        test = self.test
        rows = np.unique(np.linspace(0, len(test.points) - 1, _SHOWN).astype(int))
        columns = {
            "labels": test.labels.numpy(),
            **{NAMES[key]: runs[0].predictions for key, runs in outcomes.items()},
        }
        palette = np.array(plots.class_colours(len(test.class_names)))
        figure = plots.new_figure(2.6 * len(columns) + 5, max(2.4 * len(rows), 7))
        left, right = figure.subfigures(1, 2, width_ratios=(2.6 * len(columns), 5))
        for row_axes, block in zip(left.subplots(len(rows), len(columns), squeeze=False), rows, strict=True):
            cloud = turn_upright(test.points[block, :, :3].numpy(), "z", "y")
            for axes, (title, labels) in zip(row_axes, columns.items(), strict=True):
                plots.draw_cloud(axes, cloud, palette[labels[block]])
                axes.set_title(title, fontsize=9)
                axes.set(xticks=[], yticks=[])
        axes = right.subplots()
        plots.draw_class_accuracies(
            axes,
            {NAMES[key]: entry["runs"][0]["per_class"] for key, entry in encoders.items()},
            test.class_names,
        )
        axes.set(title="IoU by class, in its colour on the left", xlabel="test IoU (%)")
        for label, colour in zip(axes.get_yticklabels(), palette, strict=True):
            label.set_color(colour)
        return figure
