"""Linear SVM on frozen features: how much of the classes an encoder has learnt without labels.

The protocol (arXiv 2203.00680, section 4.2): the backbone feature of the first 1,024 points, unscaled, and
`sklearn.svm.SVC(kernel="linear")`. C is chosen on a held-out slice of the training split; the test split is
used once. The same architecture at random initialisation, with a C chosen the same way, stands beside it. It
too runs in evaluation mode, where batch norm, having seen no data, has running means 0 and variances 1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosspoint._optional import require
from crosspoint.evaluate import plots
from crosspoint.evaluate.protocol import (
    NAMES,
    LabelledConfig,
    embed_splits,
    encoders,
    load_splits,
    output_folder,
    per_class_accuracy,
    versions,
    write_results,
)
from crosspoint.train.config import config_to_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from sklearn.svm import SVC

__all__ = [
    "Evaluation",
    "LinearSvm",
    "SvmConfig",
    "SvmResult",
    "choose_c",
    "evaluate_svm",
    "fit_linear_svm",
    "format_table",
    "run_protocol",
    "write_evaluation",
]

log = logging.getLogger(__name__)


@dataclass
class SvmConfig(LabelledConfig):
    """Linear SVM on frozen features, with C chosen on a held-out slice of the training split."""

    c_grid: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    """The values of C to choose from."""
    holdout: float = 0.2
    """Part of the training split, stratified by class, on which C is chosen."""
    repeats: int = 1
    """So many slices are held out in turn and averaged: more than one makes sense for few training shapes."""


@dataclass(frozen=True)
class SvmResult:
    c: float
    grid: dict[float, float]  # C -> accuracy on the held-out slices
    c_at_edge: bool  # the best C is the smallest or largest of the grid
    predictions: np.ndarray  # (n_test,)
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class LinearSvm:
    """`sklearn.svm.SVC(kernel="linear")`, fitted from a Gram matrix that several fits share.

    The linear kernel is computed once, in float64 as libsvm does; then a further C or subset takes seconds.
    """

    gram: np.ndarray  # (n, n)
    labels: np.ndarray  # (n,)

    @classmethod
    def from_features(cls, features: np.ndarray, labels: np.ndarray) -> LinearSvm:
        return cls(linear_kernel(features, features), labels)

    def subset(self, rows: np.ndarray) -> LinearSvm:
        return LinearSvm(self.gram[np.ix_(rows, rows)], self.labels[rows])

    def fit(self, c: float) -> SVC:
        """A classifier whose `predict` takes `linear_kernel(features, those fitted on)`."""
        svm = require("sklearn.svm", extra="eval")
        return svm.SVC(kernel="precomputed", C=c, cache_size=500).fit(self.gram, self.labels)


def linear_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # (m, d), (n, d) -> (m, n) float64
    return a.astype(np.float64) @ b.astype(np.float64).T


def choose_c(
    svm: LinearSvm, c_grid: Sequence[float], *, holdout: float, repeats: int = 1, seed: int = 0
) -> tuple[float, dict[float, float]]:
    """The best C on stratified held-out slices (the smallest among equals), and each C's accuracy there."""
    grid = sorted({float(c) for c in c_grid})
    if not grid or grid[0] <= 0:
        raise ValueError(f"c_grid must hold positive numbers, got {tuple(c_grid)}")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout is a fraction of the training split, between 0 and 1; got {holdout}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    names, counts = np.unique(svm.labels, return_counts=True)
    n, classes = len(svm.labels), len(names)
    if classes < 2:
        raise ValueError(f"an SVM needs at least 2 classes, got {classes}")
    if counts.min() < 2:
        raise ValueError(
            f"label {names[counts.argmin()]} has {counts.min()} training shape: choosing C on held-out "
            "shapes needs at least 2 of every class"
        )
    held = max(round(holdout * n), classes)
    if n - held < classes:
        raise ValueError(
            f"holdout={holdout} of {n} training shapes leaves fewer than one of each of {classes} classes"
        )
    model_selection = require("sklearn.model_selection", extra="eval")
    splitter = model_selection.StratifiedShuffleSplit(repeats, test_size=held, random_state=seed)
    correct = np.zeros(len(grid), dtype=np.int64)
    with ThreadPoolExecutor(min(len(grid), torch.get_num_threads())) as pool:  # libsvm releases the GIL
        for fit_rows, held_rows in splitter.split(svm.labels, svm.labels):
            part, kernel = svm.subset(fit_rows), svm.gram[np.ix_(held_rows, fit_rows)]
            predictions = pool.map(lambda c, part=part, kernel=kernel: part.fit(c).predict(kernel), grid)
            correct += [int((each == svm.labels[held_rows]).sum()) for each in predictions]
    scores = {c: count / (held * repeats) for c, count in zip(grid, correct.tolist(), strict=True)}
    return max(grid, key=scores.__getitem__), scores


def fit_linear_svm(
    train_features: np.ndarray,  # (n, d)
    train_labels: np.ndarray,  # (n,)
    test_features: np.ndarray,  # (m, d)
    test_labels: np.ndarray,  # (m,)
    *,
    c_grid: Sequence[float],
    holdout: float = 0.2,
    repeats: int = 1,
    seed: int = 0,
) -> SvmResult:
    """Choose C on held-out slices of train, refit on all of train, and report the test split once.

    Raises ValueError for features that are not finite, test labels that train does not have, and classes too
    small to hold a shape out. Peak memory: two float64 Gram matrices, 16 n^2 bytes (1.6 GB for ModelNet40).
    """
    start = time.perf_counter()
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(features) == 0:
            raise ValueError(
                f"expected {name} features (n, d) and labels (n,) with n >= 1, "
                f"got {features.shape} and {labels.shape}"
            )
        if not np.isfinite(features).all():
            raise ValueError(f"{name} features hold NaN or infinity: has pre-training diverged?")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train features have {train_features.shape[1]} columns, test features {test_features.shape[1]}"
        )
    unknown = np.setdiff1d(test_labels, train_labels)
    if len(unknown):
        raise ValueError(
            f"the test split holds labels that train lacks: {unknown.tolist()}. Are these splits of one set?"
        )

    svm = LinearSvm.from_features(train_features, train_labels)
    c, grid = choose_c(svm, c_grid, holdout=holdout, repeats=repeats, seed=seed)
    fitted = svm.fit(c)
    predictions = fitted.predict(linear_kernel(test_features, train_features))
    at_edge = len(set(grid.values())) > 1 and c in (min(grid), max(grid))
    if at_edge:
        log.warning("the best C, %g, is at the edge of the grid: a wider c_grid may do better", c)
    return SvmResult(
        c=c,
        grid=grid,
        c_at_edge=at_edge,
        predictions=predictions,
        accuracy=float((predictions == test_labels).mean()),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class Evaluation:
    results: dict[str, Any]  # what svm.json holds
    test_features: dict[str, np.ndarray]  # by encoder, (n_test, feature_dim)
    test_predictions: dict[str, np.ndarray]  # by encoder, (n_test,)
    test_labels: np.ndarray  # (n_test,)


def evaluate_svm(config: SvmConfig) -> dict[str, Any]:
    """Run the protocol; write svm.json and svm.png, print a table, return what svm.json holds.

    Keys: svm_accuracy and svm_accuracy_random_init (None where not evaluated), encoders (for each its
    accuracy, c, grid, per_class, confusion, seconds), class_names, sizes, seconds_total, config, versions.
    """
    for module in ("sklearn", "h5py", "tqdm") + ("matplotlib",) * config.picture:
        require(module, extra="eval")  # now, not after minutes of embedding
    out = output_folder(config)
    evaluation = run_protocol(config)
    written = write_evaluation(evaluation, out, picture=config.picture)
    print(format_table(evaluation.results))
    print(f"written: {', '.join(map(str, written))}")
    return evaluation.results


def run_protocol(config: SvmConfig) -> Evaluation:
    """Embed the clouds with every encoder and fit its SVM; writes nothing."""
    start = time.perf_counter()
    found = encoders(config)
    points, labels, class_names = load_splits(config)
    results_of: dict[str, Any] = {}
    test_features, test_predictions = {}, {}
    for key, encoder in found.items():
        features = embed_splits(config, key, encoder, points)
        result = fit_linear_svm(
            features.of["train"],
            labels["train"],
            features.of["test"],
            labels["test"],
            c_grid=config.c_grid,
            holdout=config.holdout,
            repeats=config.repeats,
            seed=config.seed,
        )
        test_features[key], test_predictions[key] = features.of["test"], result.predictions
        results_of[key] = {
            "accuracy": result.accuracy,
            "c": result.c,
            "c_at_edge": result.c_at_edge,
            "grid": [{"c": c, "holdout_accuracy": accuracy} for c, accuracy in result.grid.items()],
            "per_class": per_class_accuracy(labels["test"], result.predictions, class_names),
            "confusion": plots.confusion_counts(
                labels["test"], result.predictions, len(class_names)
            ).tolist(),
            "seconds_embed": features.seconds,
            "seconds_svm": result.seconds,
        }
    results = {
        "svm_accuracy": results_of.get("pretrained", {}).get("accuracy"),
        "svm_accuracy_random_init": results_of.get("random_init", {}).get("accuracy"),
        "encoders": results_of,
        "class_names": class_names,
        "sizes": {
            "train": len(labels["train"]),
            "test": len(labels["test"]),
            "classes": len(class_names),
            "points": points["test"].shape[1],
            "feature_dim": next(iter(test_features.values())).shape[1],
        },
        "seconds_total": time.perf_counter() - start,
        "config": config_to_dict(config),
        "versions": versions(),
    }
    return Evaluation(results, test_features, test_predictions, labels["test"])


def write_evaluation(evaluation: Evaluation, folder: Path, *, picture: bool = True) -> list[Path]:
    """Write svm.json and svm.png, each by rename; returns what was written."""
    return write_results(folder, "svm", evaluation.results, _picture(evaluation) if picture else None)


def format_table(results: dict[str, Any]) -> str:
    """The accuracies of svm.json as a table for the terminal."""
    lines = [f"{'encoder':<24}{'linear SVM, test':>18}{'C':>10}{'held-out':>12}"]
    for key, entry in results["encoders"].items():
        best = max(row["holdout_accuracy"] for row in entry["grid"])
        lines.append(
            f"{NAMES[key]:<24}{100 * entry['accuracy']:>16.1f} %{entry['c']:>10g}{100 * best:>10.1f} %"
        )
    return "\n".join(lines)


def _picture(evaluation: Evaluation) -> Figure:
    encoders, seed = evaluation.results["encoders"], evaluation.results["config"]["seed"]
    return plots.svm_figure(
        {NAMES[key]: plots.tsne(each, seed=seed) for key, each in evaluation.test_features.items()},
        {NAMES[key]: entry["accuracy"] for key, entry in encoders.items()},
        {NAMES[key]: entry["per_class"] for key, entry in encoders.items()},
        evaluation.test_labels,
        next(iter(evaluation.test_predictions.values())),
        evaluation.results["class_names"],
    )
