"""Few-shot classification on frozen features: K classes, N labelled shapes of each, many draws.

The protocol of the literature: for every run K classes, N support and 20 query shapes of each; features scaled to
mean 0 and variance 1 of the support; `sklearn.svm.SVC(kernel="linear", C=1)`. Support shapes come from the training
split and query shapes from the test split; CrossPoint's authors drew both from the training split, which is an option.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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

__all__ = ["Episode", "FewShotConfig", "draw_episode", "evaluate_few_shot", "few_shot_accuracy"]


@dataclass
class FewShotConfig(LabelledConfig):
    """K-way N-shot classification with a linear SVM, over many draws."""

    ways: tuple[int, ...] = (5, 10)
    """Numbers of classes, K."""
    shots: tuple[int, ...] = (10, 20)
    """Numbers of support shapes of each class, N."""
    queries: int = 20
    """Query shapes of each class. A class whose test split has fewer gives all of them."""
    runs: int = 50
    """Draws of classes and shapes for each K and N; the same ones for every encoder."""
    query_split: Literal["test", "train"] = "test"
    """Where query shapes come from; "train" is the authors' way: other shapes of the split the support is from."""


class Episode(NamedTuple):
    """Rows of the support and of the queries, each in its split, and their class as 0..K-1."""

    support: np.ndarray  # (K * N,)
    support_labels: np.ndarray
    query: np.ndarray  # (at most K * queries,)
    query_labels: np.ndarray


def draw_episode(
    train_labels: np.ndarray,
    query_labels: np.ndarray,
    *,
    ways: int,
    shots: int,
    queries: int,
    same_split: bool,
    generator: np.random.Generator,
) -> Episode:
    """One draw. With `same_split`, both label arrays are those of one split, and no shape is drawn twice.

    Raises ValueError where fewer than `ways` classes have enough shapes.
    """
    classes, counts = np.unique(train_labels, return_counts=True)
    enough = classes[counts >= shots + (1 if same_split else 0)]
    usable = np.intersect1d(enough, query_labels)
    if len(usable) < ways:
        raise ValueError(
            f"{ways}-way {shots}-shot needs {ways} classes of at least {shots} training shapes and a query shape; "
            f"there are {len(usable)}"
        )
    support, query = [], []
    for c in generator.choice(usable, ways, replace=False):
        rows = generator.permutation(np.flatnonzero(train_labels == c))
        support.append(rows[:shots])
        query.append(
            rows[shots : shots + queries]
            if same_split
            else generator.permutation(np.flatnonzero(query_labels == c))[:queries]
        )
    numbers = [np.repeat(np.arange(ways), [len(rows) for rows in part]) for part in (support, query)]
    return Episode(np.concatenate(support), numbers[0], np.concatenate(query), numbers[1])


def few_shot_accuracy(train: np.ndarray, test: np.ndarray, episode: Episode) -> float:
    """Accuracy of the SVM on the queries: train (n, d) holds the support, test (m, d) the queries."""
    svm = require("sklearn.svm", extra="eval")
    preprocessing = require("sklearn.preprocessing", extra="eval")
    support = train[episode.support].astype(np.float64)
    scaler = preprocessing.StandardScaler().fit(support)
    fitted = svm.SVC(kernel="linear", C=1.0).fit(scaler.transform(support), episode.support_labels)
    predicted = fitted.predict(scaler.transform(test[episode.query].astype(np.float64)))
    return float((predicted == episode.query_labels).mean())


def evaluate_few_shot(config: FewShotConfig) -> dict[str, Any]:
    """Run the protocol; write few_shot.json and few_shot.png, print a table, return what few_shot.json holds.

    Keys: encoders (for each a list of {ways, shots, mean, std, ci95, accuracies}), class_names, sizes, seconds_total,
    config, versions. `std` is over runs (n - 1 in the denominator), `ci95` half the width of the mean's 95 % interval.
    """
    for module in ("sklearn", "h5py", "tqdm") + ("matplotlib",) * config.picture:
        require(module, extra="eval")  # now, not after minutes of embedding
    if config.runs < 2 or config.queries < 1 or min(*config.ways, 2) < 2 or min(*config.shots, 1) < 1:
        raise ValueError("few-shot needs runs >= 2, queries >= 1, ways >= 2 and shots >= 1")
    start, out = time.perf_counter(), output_folder(config)
    found = encoders(config)
    points, labels, class_names = load_splits(config)
    episodes = {
        (ways, shots): _episodes(config, labels, ways, shots)
        for ways in config.ways
        for shots in config.shots
    }
    if config.query_split == "train":
        points = {"train": points["train"]}
    results_of = {}
    for key, encoder in found.items():
        features = embed_splits(config, key, encoder, points).of
        query = features[config.query_split]
        results_of[key] = [
            {
                "ways": ways,
                "shots": shots,
                **_summary([few_shot_accuracy(features["train"], query, e) for e in each]),
            }
            for (ways, shots), each in episodes.items()
        ]
    results = {
        "encoders": results_of,
        "class_names": class_names,
        "sizes": {split: len(labels[split]) for split in labels},
        "seconds_total": time.perf_counter() - start,
        "config": config_to_dict(config),
        "versions": versions(),
    }
    written = write_results(out, "few_shot", results, _picture(results) if config.picture else None)
    print(format_table(results))
    print(f"written: {', '.join(map(str, written))}")
    return results


def format_table(results: dict[str, Any]) -> str:
    """The accuracies of few_shot.json as a table for the terminal."""
    lines = [f"{'encoder':<24}{'task':>18}{'mean':>10}{'std':>8}{'95 % interval of the mean':>28}"]
    for key, rows in results["encoders"].items():
        for row in rows:
            low, high = (100 * (row["mean"] + sign * row["ci95"]) for sign in (-1, 1))
            task = f"{row['ways']}-way {row['shots']}-shot"
            interval = f"{low:.1f} to {high:.1f} %"
            lines.append(
                f"{NAMES[key]:<24}{task:>18}{100 * row['mean']:>8.1f} %{100 * row['std']:>8.1f}{interval:>28}"
            )
    return "\n".join(lines)


def _episodes(config: FewShotConfig, labels: dict[str, np.ndarray], ways: int, shots: int) -> list[Episode]:
    return [
        draw_episode(
            labels["train"],
            labels[config.query_split],
            ways=ways,
            shots=shots,
            queries=config.queries,
            same_split=config.query_split == "train",
            generator=np.random.default_rng((config.seed, ways, shots, run)),
        )
        for run in range(config.runs)
    ]


def _summary(accuracies: Sequence[float]) -> dict[str, Any]:
    std = float(np.std(accuracies, ddof=1))
    return {
        "mean": float(np.mean(accuracies)),
        "std": std,
        "ci95": 1.96 * std / math.sqrt(len(accuracies)),
        "accuracies": list(accuracies),
    }


def _picture(results: dict[str, Any]) -> Figure:
    """Every run's accuracy by task and encoder, with mean and its interval."""
    tasks = [(row["ways"], row["shots"]) for row in next(iter(results["encoders"].values()))]
    figure = plots.new_figure(2.2 + 1.6 * len(tasks), 4.5)
    axes = figure.subplots()
    colours = {"pretrained": plots.PRETRAINED, "random_init": plots.RANDOM}
    for i, (key, rows) in enumerate(results["encoders"].items()):
        offset = (i - (len(results["encoders"]) - 1) / 2) * 0.32
        for place, row in enumerate(rows):
            spread = np.linspace(-0.1, 0.1, len(row["accuracies"]))
            axes.scatter(
                place + offset + spread,
                100 * np.array(row["accuracies"]),
                s=8,
                color=colours[key],
                alpha=0.35,
            )
            axes.errorbar(
                place + offset,
                100 * row["mean"],
                100 * row["ci95"],
                fmt="D",
                color=colours[key],
                markeredgecolor="white",
                capsize=4,
                label=NAMES[key] if place == 0 else None,
            )
    axes.set_xticks(range(len(tasks)), [f"{ways}-way\n{shots}-shot" for ways, shots in tasks])
    axes.set(ylabel="accuracy (%)", title="Few-shot: every run, mean and its 95 % interval")
    axes.grid(axis="y", color="0.92")
    axes.legend(fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
