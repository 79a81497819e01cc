"""Figures: pairs, loss curves, t-SNE of features, confusion matrices. Drawn without a display."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crosspoint._files import replace_file
from crosspoint._optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "confusion_counts",
    "demo_figure",
    "draw_class_accuracies",
    "draw_cloud",
    "draw_confusion",
    "draw_curves",
    "draw_embedding",
    "draw_losses",
    "draw_pairs",
    "save_figure",
    "svm_figure",
    "tsne",
]

PRETRAINED, RANDOM = "#1f5fa8", "#c8641e"


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that belongs to no window and no pyplot state."""
    return require("matplotlib.figure", extra="eval").Figure((width, height), layout="constrained")


def save_figure(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Write a PNG by rename, so that no reader ever sees half of one."""
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=dpi, facecolor="white"))


def tsne(features: np.ndarray, *, seed: int = 0) -> np.ndarray:  # (n, d) -> (n, 2)
    """t-SNE positions after PCA to at most 50 dimensions; perplexity 30, or a third of a smaller set."""
    if len(features) < 4:
        raise ValueError(f"t-SNE needs at least 4 features, got {len(features)}")
    if (features == features[0]).all():
        raise ValueError("all features are equal: there is nothing to embed. Has the encoder collapsed?")
    decomposition = require("sklearn.decomposition", extra="eval")
    manifold = require("sklearn.manifold", extra="eval")
    size = min(50, len(features) - 1, features.shape[1])
    reduced = decomposition.PCA(size, random_state=seed).fit_transform(features.astype(np.float64))
    reduced /= reduced[:, 0].std()
    perplexity = min(30.0, (len(features) - 1) / 3)
    return manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)


def class_colours(count: int) -> list[tuple[float, float, float]]:
    """Hues spread evenly, lightness alternating, so that neighbours on the colour wheel differ twice."""
    return [colorsys.hls_to_rgb(i / count, (0.38, 0.55, 0.7)[i % 3], 0.75) for i in range(count)]


def draw_embedding(
    axes: Axes, positions: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, title: str
) -> None:
    """Scatter (n, 2) positions by class, each class named where it is densest."""
    effects = require("matplotlib.patheffects", extra="eval")
    size = float(np.clip(20000 / len(positions), 9, 40))
    font = 9 if len(class_names) <= 12 else 7
    for i, (name, colour) in enumerate(zip(class_names, class_colours(len(class_names)), strict=True)):
        members = positions[labels == i]
        if len(members) == 0:
            continue
        axes.scatter(*members.T, s=size, color=[colour], linewidths=0, alpha=0.8)
        distances = np.linalg.norm(members[:, None] - members[None], axis=-1)
        centre = members[np.median(distances, axis=1).argmin()]
        text = axes.text(*centre, name.replace("_", " "), fontsize=font, ha="center", va="center", zorder=3)
        text.set_color([0.6 * channel for channel in colour])
        text.set_path_effects([effects.withStroke(linewidth=2.2, foreground="white", alpha=0.9)])
    axes.set(title=title, xticks=[], yticks=[])


def confusion_counts(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How often true class i (row) was predicted as class j (column): (classes, classes), int64."""
    flat = np.asarray(labels).ravel() * classes + np.asarray(predictions).ravel()
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)


def draw_confusion(
    axes: Axes, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], *, title: str
) -> None:
    """Row-normalised confusion matrix in percent; cells below 5 % carry no number."""
    count = len(class_names)
    matrix = confusion_counts(labels, predictions, count)
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    font = 9 if count <= 12 else 5.5
    for row, column in zip(*np.nonzero(percent >= 5), strict=True):
        value = percent[row, column]
        colour = "white" if value > 55 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=font, color=colour)
    names = [name.replace("_", " ") for name in class_names]
    ticks = range(count)
    axes.set_xticks(ticks, names, rotation=90, fontsize=max(font, 7))
    axes.set_yticks(ticks, names, fontsize=max(font, 7))
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.4)
    axes.tick_params(which="both", length=0)


def draw_class_accuracies(
    axes: Axes, accuracies: Mapping[str, Mapping[str, float]], class_names: Sequence[str]
) -> None:
    """One row per class, one dot per encoder: {encoder: {class: accuracy}}, joined to show the gain."""
    rows = np.arange(len(class_names))
    for (encoder, values), colour in zip(accuracies.items(), (PRETRAINED, RANDOM), strict=False):
        percent = [100 * values.get(name, np.nan) for name in class_names]
        # the random one larger and below: equal values show as a ring
        random = colour == RANDOM
        axes.scatter(
            percent, rows, s=60 if random else 26, color=colour, label=encoder, zorder=3 - random / 2
        )
    if len(accuracies) == 2:
        first, second = accuracies.values()
        for row, name in enumerate(class_names):
            if name in first and name in second:
                axes.plot([100 * first[name], 100 * second[name]], [row, row], color="0.75", linewidth=1.5)
    names = [name.replace("_", " ") for name in class_names]
    axes.set_yticks(rows, names, fontsize=7 if len(rows) > 12 else 9)
    axes.set(xlim=(-3, 103), ylim=(len(rows) - 0.4, -0.6), xlabel="test accuracy (%)")
    axes.set_title("Accuracy by class")
    axes.grid(axis="x", color="0.9")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.06), ncols=2, fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_losses(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """The curves of a run's log.jsonl against its steps."""
    curves = {
        "loss": ("total", "0.15"),
        "intra_modal": ("intra-modal", PRETRAINED),
        "cross_modal": ("cross-modal", RANDOM),
    }
    drawn = False
    for key, (name, colour) in curves.items():
        points = [(record["step"], record[key]) for record in records if key in record and "step" in record]
        if not points:
            continue
        steps, values = np.array(points, dtype=float).T
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, _smooth(values), color=colour, linewidth=1.8, marker=marker, label=name)
        drawn = True
    if not drawn:
        raise ValueError(f"no record holds a step and one of {', '.join(curves)}: nothing to draw")
    axes.set(xlabel="step", ylabel="NT-Xent", title="Pre-training loss")
    axes.set_ylim(bottom=0)
    axes.grid(color="0.92")
    axes.legend(fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(
    axes: Axes, curves: Mapping[str, Sequence[Sequence[float]]], *, ylabel: str, title: str
) -> None:
    """One line a training, epochs from 1, all of an encoder in its colour: {encoder: [values of a training, ...]}."""
    for (encoder, runs), colour in zip(curves.items(), (PRETRAINED, RANDOM), strict=False):
        for i, values in enumerate(runs):
            marker = "o" if len(values) == 1 else None
            axes.plot(
                range(1, len(values) + 1), values, color=colour, marker=marker, label=None if i else encoder
            )
    axes.set(xlabel="epoch", ylabel=ylabel, title=title)
    axes.grid(color="0.92")
    axes.legend(fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a thirtieth of the run, shorter windows at the ends."""
    half = max(1, len(values) // 60)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def draw_pairs(
    figure: Figure | SubFigure,
    images: Sequence[np.ndarray],  # (3, H, W) uint8
    clouds: Sequence[np.ndarray],  # (N, 3), y up
    names: Sequence[str],
    *,
    columns: int = 4,
) -> None:
    """A sheet of training pairs: the rendered view beside the cloud, shaded by depth."""
    rows = -(-len(images) // columns)
    grid = figure.add_gridspec(rows, columns)
    axes = np.array([cell.subgridspec(1, 2, wspace=0).subplots() for cell in grid])  # (cells, 2)
    for empty in axes[len(images) :].flat:
        empty.axis("off")
    pairs = axes[: len(images)]
    for (view, cloud_axes), image, cloud, name in zip(pairs, images, clouds, names, strict=True):
        view.imshow(np.moveaxis(image, 0, -1))
        view.set_title(name.replace("_", " "), fontsize=9, loc="left")
        draw_cloud(cloud_axes, cloud)
        for each in (view, cloud_axes):
            each.set(xticks=[], yticks=[])
            for spine in each.spines.values():
                spine.set_color("0.8")


def draw_cloud(axes: Axes, cloud: np.ndarray, colours: np.ndarray | None = None) -> None:
    """Orthographic view from the front right, a little above; near points dark, or by colours (N, 3)."""
    heading, elevation = np.deg2rad(35), np.deg2rad(20)
    x, y, z = (cloud - (cloud.min(0) + cloud.max(0)) / 2).T
    right = np.cos(heading) * x - np.sin(heading) * z
    ahead = np.sin(heading) * x + np.cos(heading) * z
    above = np.cos(elevation) * y - np.sin(elevation) * ahead
    depth = np.sin(elevation) * y + np.cos(elevation) * ahead
    order = np.argsort(depth)
    shade = {"c": depth[order], "cmap": "viridis_r"} if colours is None else {"c": colours[order]}
    axes.scatter(right[order], above[order], s=4, linewidths=0, **shade)
    half = 1.1 * max(np.abs(right).max(), np.abs(above).max(), 1e-6)
    axes.set(xlim=(-half, half), ylim=(-half, half))
    axes.set_aspect("equal")


def svm_figure(
    positions: Mapping[str, np.ndarray],  # encoder -> (n, 2)
    accuracies: Mapping[str, float],
    per_class: Mapping[str, Mapping[str, float]],
    labels: np.ndarray,
    predictions: np.ndarray,
    class_names: Sequence[str],
) -> Figure:
    """t-SNE of each encoder's test features; the first one's confusion matrix; accuracy by class."""
    figure = new_figure(18, 19)
    top, bottom = figure.subfigures(2, 1, height_ratios=(9, 10))
    for axes, (encoder, xy) in zip(
        top.subplots(1, len(positions), squeeze=False)[0], positions.items(), strict=True
    ):
        title = f"{encoder}: linear SVM {100 * accuracies[encoder]:.1f} %"
        draw_embedding(axes, xy, labels, class_names, title=title)
    left, right = bottom.subplots(1, 2, width_ratios=(2, 1))
    first = next(iter(positions))
    draw_confusion(
        left, labels, predictions, class_names, title=f"Confusion matrix, {first} (% of true class)"
    )
    draw_class_accuracies(right, per_class, class_names)
    return figure


def demo_figure(
    images: Sequence[np.ndarray],
    clouds: Sequence[np.ndarray],
    names: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    positions: Mapping[str, np.ndarray],
    accuracies: Mapping[str, float],
    labels: np.ndarray,
    class_names: Sequence[str],
) -> Figure:
    """Training pairs above; below, loss curves and the t-SNE of both encoders."""
    sheet = 2.45 * -(-len(images) // 4)  # inches, so that views and clouds are about square
    figure = new_figure(18, sheet + 7)
    top, bottom = figure.subfigures(2, 1, height_ratios=(sheet, 7))
    top.suptitle("Training pairs: rendered view and point cloud", fontsize=12)
    draw_pairs(top, images, clouds, names)
    axes = bottom.subplots(1, 1 + len(positions))
    draw_losses(axes[0], records)
    for each, (encoder, xy) in zip(axes[1:], positions.items(), strict=True):
        title = f"{encoder}: linear SVM {100 * accuracies[encoder]:.1f} %"
        draw_embedding(each, xy, labels, class_names, title=title)
    return figure
