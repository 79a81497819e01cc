"""Fine-tuned semantic segmentation of rooms (S3DIS): the class of every point; mean IoU, overall accuracy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crosspoint._optional import require
from crosspoint.data import RoomBlocks, load_s3dis
from crosspoint.evaluate import plots
from crosspoint.evaluate.features import turn_upright
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
from crosspoint.evaluate.protocol import NAMES, output_folder, versions, write_results
from crosspoint.models.checkpoints import EncoderConfig
from crosspoint.train.config import config_to_dict

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
    for module in ("sklearn", "h5py", "tqdm", "tensorboard") + ("matplotlib",) * config.picture:
        require(module, extra="eval")
    config.validate()
    start, out = time.perf_counter(), output_folder(config)
    architecture = architecture_of(
        config,
        allowed=("dgcnn_semantic",),
        default=EncoderConfig("dgcnn_semantic", {"k": 20, "in_channels": 9}),
    )
    train, test = (
        load_s3dis(config.data, split, test_area=config.test_area, points=config.points)
        for split in ("train", "test")
    )
    channels = architecture.options["in_channels"]
    if channels not in (3, 9):
        raise ValueError(
            f"{config.run} holds an encoder of {channels} channels; S3DIS has 9, of which 3 are the position"
        )
    classes = len(test.class_names)
    task = Task(
        name="semantic_segmentation",
        architecture=EncoderConfig(architecture.name, {**architecture.options, "num_classes": classes}),
        backbone=load_backbone(config, architecture),
        train=_examples(train, channels),
        test=_examples(test, channels),
        logits=lambda model, points, _: model.segment(points),
        augment=lambda points, _: points,
    )
    outcomes = fine_tune(config, task, out)
    results_of = report(outcomes, lambda found: _score(found, test))
    results = {
        "encoders": results_of,
        "class_names": list(test.class_names),
        "sizes": {
            "train": len(train.points),
            "test": len(test.points),
            "points": config.points,
            "channels": channels,
            "classes": classes,
        },
        "seconds_total": time.perf_counter() - start,
        "config": config_to_dict(config),
        "versions": versions(),
    }
    figure = _picture(test, outcomes, results_of) if config.picture else None
    written = write_results(out, "semantic_segmentation", results, figure)
    print(format_table(results))
    print(f"written: {', '.join(map(str, written))}")
    return results


def format_table(results: dict[str, Any]) -> str:
    """The scores of semantic_segmentation.json, then every class's IoU (mean over the seeds), for the terminal."""
    encoders = results["encoders"]
    metrics = {
        "miou": "mIoU",
        "overall_accuracy": "overall accuracy",
        "class_accuracy": "class accuracy",
    }
    lines = format_scores(results, metrics)
    lines += ["", f"{'class':<24}" + "".join(f"{NAMES[key]:>24}" for key in encoders)]
    for name in results["class_names"]:
        row = ""
        for entry in encoders.values():
            values = [run["per_class"][name] for run in entry["runs"] if name in run["per_class"]]
            row += f"{100 * np.mean(values):>22.1f} %" if values else f"{'absent':>24}"
        lines.append(f"{name:<24}{row}")
    return "\n".join(lines)


def _examples(blocks: RoomBlocks, channels: int) -> Examples:
    points = blocks.points[:, :, :channels].contiguous()
    return Examples(points, blocks.labels, blocks.labels.new_zeros(len(points)))


def _score(predicted: np.ndarray, test: RoomBlocks) -> dict[str, Any]:
    confusion = plots.confusion_counts(test.labels.numpy(), predicted, len(test.class_names))
    return {**semantic_scores(confusion, test.class_names), "confusion": confusion.tolist()}


def _picture(test: RoomBlocks, outcomes: dict[str, list[Outcome]], results_of: dict[str, Any]) -> Figure:
    """Some blocks in the colours of the classes: as labelled, and as the first seeds predict; IoU by class."""
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
        {NAMES[key]: entry["runs"][0]["per_class"] for key, entry in results_of.items()},
        test.class_names,
    )
    axes.set(title="IoU by class, in its colour on the left", xlabel="test IoU (%)")
    for label, colour in zip(axes.get_yticklabels(), palette, strict=True):
        label.set_color(colour)
    return figure
