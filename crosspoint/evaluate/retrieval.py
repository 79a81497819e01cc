"""Retrieval by frozen features: the nearest clouds of a cloud, by cosine similarity."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crosspoint._optional import require
from crosspoint.evaluate import plots
from crosspoint.evaluate.protocol import (
    NAMES,
    LabelledConfig,
    embed_splits,
    encoders,
    load_splits,
    output_folder,
    versions,
    write_results,
)
from crosspoint.train.config import config_to_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RetrievalConfig", "average_precision", "evaluate_retrieval", "ranking"]

_SHOWN = 6  # queries on the contact sheet, and results beside each


@dataclass
class RetrievalConfig(LabelledConfig):
    """Every test cloud looks for its class: among the other test clouds, and (k-NN) among the training clouds."""

    k: int = 20
    """Neighbours that vote in the k-NN classification, and the depth of the precision."""


def ranking(queries: np.ndarray, gallery: np.ndarray, *, skip_own: bool = False) -> np.ndarray:
    """Rows of gallery (n, d) by falling cosine similarity to each of queries (m, d), ties by index: (m, n) int64.

    skip_own: gallery is queries, and the last column is each one itself.
    """
    a, b = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for x in map(np.float64, (queries, gallery))
    )
    similarity = a @ b.T
    if skip_own:
        np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")


def average_precision(hits: np.ndarray) -> np.ndarray:
    """Average precision of each row of hits (m, n) bool, in order of rank; 0 where nothing is relevant: (m,)."""
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return (precision * hits).sum(1) / np.maximum(hits.sum(1), 1)


def evaluate_retrieval(config: RetrievalConfig) -> dict[str, Any]:
    """Run the protocol; write retrieval.json and retrieval.png, print a table, return what retrieval.json holds.

    Keys: encoders (for each mean_average_precision over test clouds whose class has another, precision_at_k,
    recall_at_1, knn_accuracy), class_names, sizes, seconds_total, config, versions.
    """
    for module in ("sklearn", "h5py", "tqdm") + ("matplotlib",) * config.picture:
        require(module, extra="eval")
    start, out = time.perf_counter(), output_folder(config)
    found = encoders(config)
    points, labels, class_names = load_splits(config)
    if config.k < 1:
        raise ValueError(f"k must be at least 1, got {config.k}")
    results_of, ranked_by = {}, {}
    for key, encoder in found.items():
        features = embed_splits(config, key, encoder, points).of
        ranked = ranking(features["test"], features["test"], skip_own=True)[:, :-1]
        hits = labels["test"][ranked] == labels["test"][:, None]
        possible = hits.any(1)
        if not possible.any():
            raise ValueError("no class of the test split has two clouds: there is nothing to retrieve")
        nearest = ranking(features["test"], features["train"])[:, : config.k]
        results_of[key] = {
            "mean_average_precision": float(average_precision(hits)[possible].mean()),
            "precision_at_k": float(hits[possible, : config.k].mean()),
            "recall_at_1": float(hits[possible, 0].mean()),
            "knn_accuracy": float(
                (_vote(labels["train"][nearest], len(class_names)) == labels["test"]).mean()
            ),
        }
        ranked_by[key] = ranked
    results = {
        "encoders": results_of,
        "class_names": class_names,
        "sizes": {split: len(labels[split]) for split in labels},
        "seconds_total": time.perf_counter() - start,
        "config": config_to_dict(config),
        "versions": versions(),
    }
    figure = None
    if config.picture:
        first = next(iter(ranked_by))
        figure = _contact_sheet(
            points["test"], labels["test"], ranked_by[first], class_names, NAMES[first], config.seed
        )
    written = write_results(out, "retrieval", results, figure)
    print(format_table(results))
    print(f"written: {', '.join(map(str, written))}")
    return results


def format_table(results: dict[str, Any]) -> str:
    k = results["config"]["k"]
    lines = [f"{'encoder':<24}{'mAP':>10}{f'precision@{k}':>16}{'recall@1':>12}{f'{k}-NN accuracy':>18}"]
    for key, row in results["encoders"].items():
        lines.append(
            f"{NAMES[key]:<24}{100 * row['mean_average_precision']:>8.1f} %{100 * row['precision_at_k']:>14.1f} %"
            f"{100 * row['recall_at_1']:>10.1f} %{100 * row['knn_accuracy']:>16.1f} %"
        )
    return "\n".join(lines)


def _vote(neighbours: np.ndarray, classes: int) -> np.ndarray:
    """The most frequent label of each row of (m, k), the nearest one's among equals: (m,)."""
    rows = np.arange(len(neighbours))[:, None]
    counts = np.zeros((len(neighbours), classes), np.int64)
    np.add.at(counts, (rows, neighbours), 1)
    best = counts[rows, neighbours] == counts.max(1, keepdims=True)
    return neighbours[rows[:, 0], best.argmax(1)]


def _contact_sheet(
    points: np.ndarray,
    labels: np.ndarray,
    ranked: np.ndarray,
    class_names: list[str],
    encoder: str,
    seed: int,
) -> Figure:
    """Some queries of different classes, each with what was found first."""
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.unique(labels))[:_SHOWN]
    rows = [int(generator.choice(np.flatnonzero(labels == c))) for c in classes]
    columns = 1 + min(_SHOWN, ranked.shape[1])
    figure = plots.new_figure(1.7 * columns, 1.9 * len(rows) + 0.5)
    figure.suptitle(f"Query (left) and the nearest test clouds, {encoder}; other classes in red", fontsize=11)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row_axes, query in zip(axes, rows, strict=True):
        for i, (each, shown) in enumerate(zip(row_axes, [query, *ranked[query, : columns - 1]], strict=True)):
            plots.draw_cloud(each, points[shown])
            right = labels[shown] == labels[query]
            each.set(xticks=[], yticks=[])
            each.set_title(
                class_names[labels[shown]].replace("_", " "),
                fontsize=8,
                color="black" if right else "crimson",
            )
            for spine in each.spines.values():
                spine.set(
                    color="0.2" if i == 0 else "0.8" if right else "crimson", linewidth=1.5 if i == 0 else 0.8
                )
    return figure
