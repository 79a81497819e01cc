"""Fine-tuned part segmentation: which part of its object each point belongs to; mean IoU by shape and by category."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from crosspoint._optional import require
from crosspoint.data import PartClouds, load_parts
from crosspoint.evaluate import plots
from crosspoint.evaluate.classify import augmentation
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
from crosspoint.evaluate.protocol import NAMES, output_folder, up_axis, versions, write_results
from crosspoint.models.checkpoints import EncoderConfig
from crosspoint.train.config import config_to_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PartSegmentationConfig", "evaluate_part_segmentation", "part_scores", "shape_iou"]

_SHOWN = 6  # shapes in the picture


@dataclass
class PartSegmentationConfig(FinetuneConfig):
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
    up: Literal["y", "z"] = "y"
    """Axis that points up in these clouds; they are turned to the one about which the run was pre-trained."""
    augmentation: Literal["scale_shift", "views", "none"] = "scale_shift"
    """Of the training clouds: DGCNN's (every axis scaled, the cloud moved), pre-training's views, or none."""


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
    for module in ("sklearn", "h5py", "tqdm", "tensorboard") + ("matplotlib",) * config.picture:
        require(module, extra="eval")
    config.validate()
    start, out = time.perf_counter(), output_folder(config)
    architecture = architecture_of(
        config, allowed=("dgcnn_part",), default=EncoderConfig("dgcnn_part", {"k": 40})
    )
    train, test = (load_parts(config.data, split, points=config.points) for split in (config.split, "test"))
    heads = {"num_parts": len(test.part_names), "num_categories": len(test.category_names)}
    upright = up_axis(config.run)
    task = Task(
        name="part_segmentation",
        architecture=EncoderConfig(architecture.name, {**architecture.options, **heads}),
        backbone=load_backbone(config, architecture),
        train=_examples(train, config.up, upright),
        test=_examples(test, config.up, upright),
        logits=lambda model, points, categories: model.segment(points, categories),
        augment=augmentation(config.augmentation, upright),
    )
    outcomes = fine_tune(config, task, out)
    results = {
        "encoders": report(outcomes, lambda found: part_scores(found, test)),
        "category_names": list(test.category_names),
        "sizes": {
            "train": len(train.points),
            "test": len(test.points),
            "points": config.points,
            "categories": heads["num_categories"],
            "parts": heads["num_parts"],
        },
        "seconds_total": time.perf_counter() - start,
        "config": config_to_dict(config),
        "versions": versions(),
    }
    figure = _picture(test, outcomes, config.up) if config.picture else None
    written = write_results(out, "part_segmentation", results, figure)
    print(format_table(results))
    print(f"written: {', '.join(map(str, written))}")
    return results


def format_table(results: dict[str, Any]) -> str:
    """The scores of part_segmentation.json, then every category's IoU (mean over the seeds), for the terminal."""
    encoders = results["encoders"]
    metrics = {"instance_miou": "instance mIoU", "class_miou": "class mIoU", "accuracy": "point accuracy"}
    lines = format_scores(results, metrics)
    lines += ["", f"{'category':<24}" + "".join(f"{NAMES[key]:>24}" for key in encoders)]
    for name in next(iter(encoders.values()))["runs"][0]["per_category"]:
        means = [np.mean([run["per_category"][name] for run in entry["runs"]]) for entry in encoders.values()]
        lines.append(f"{name:<24}" + "".join(f"{100 * mean:>22.1f} %" for mean in means))
    return "\n".join(lines)


def _examples(clouds: PartClouds, up: str, upright: str) -> Examples:
    points = torch.from_numpy(np.ascontiguousarray(turn_upright(clouds.points.numpy(), up, upright)))
    return Examples(points, clouds.parts, clouds.categories)


def _picture(test: PartClouds, outcomes: dict[str, list[Outcome]], up: str) -> Figure:
    """A shape of each of some categories, its parts in colour: as labelled, and as the first seeds predict.

    Parts of other categories are black.
    """
    categories, true = test.categories.numpy(), test.parts.numpy()
    rows = [
        int(np.flatnonzero(categories == c)[0])
        for c in np.unique(categories)[np.linspace(0, len(np.unique(categories)) - 1, _SHOWN).astype(int)]
    ]
    rows = list(dict.fromkeys(rows))
    columns = {"labels": true, **{NAMES[key]: runs[0].predictions for key, runs in outcomes.items()}}
    figure = plots.new_figure(2.6 * len(columns) + 0.6, 2.4 * len(rows) + 0.4)
    for row_axes, shape in zip(figure.subplots(len(rows), len(columns), squeeze=False), rows, strict=True):
        parts = test.parts_of[categories[shape]]
        palette = np.zeros((len(test.part_names), 3))
        palette[list(parts)] = plots.class_colours(len(parts))
        cloud = turn_upright(test.points[shape].numpy(), up, "y")
        for axes, (title, labels) in zip(row_axes, columns.items(), strict=True):
            plots.draw_cloud(axes, cloud, palette[labels[shape]])
            iou = (
                "" if labels is true else f", IoU {100 * shape_iou(labels[shape], true[shape], parts):.0f} %"
            )
            axes.set_title(f"{title}{iou}", fontsize=9)
            axes.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(test.category_names[categories[shape]].replace("_", " "))
    return figure
