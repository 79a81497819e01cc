"""Whether a folder holds a data set that can be used, and how much of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crosspoint.data.modelnet import load_modelnet40, load_modelnet40_text
from crosspoint.data.pack import PackedPairs, is_packed, read_index
from crosspoint.data.pairs import PairDataset
from crosspoint.data.parts import load_parts
from crosspoint.data.prepare import was_interrupted
from crosspoint.data.s3dis import load_s3dis
from crosspoint.data.scanobjectnn import load_scanobjectnn

__all__ = ["CheckConfig", "FolderReport", "check", "check_folder"]


@dataclass
class CheckConfig:
    """Read all of a folder's data sets, as training and evaluation would, and say what is there and what is wrong."""

    root: Path
    """Folder to look into."""
    points: int = 1024
    """Points per cloud that will be asked for."""


@dataclass
class FolderReport:
    """What a folder holds: a line a split, and what stands in the way."""

    kind: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Split(NamedTuple):
    name: str
    load: Callable[[Path, int], object]
    published: tuple[int, ...]  # shapes in the releases that are in use


class _Layout(NamedTuple):
    kind: str
    signs: tuple[str, ...]  # any of these patterns in the folder
    splits: tuple[_Split, ...]


def _scan(variant: str, train: int, test: int, *signs: str) -> _Layout:
    def load(split: str) -> Callable[[Path, int], object]:
        return lambda root, points: load_scanobjectnn(root, split, variant=variant, points=points)

    return _Layout(
        f"ScanObjectNN, {variant}",
        signs,
        (_Split("train", load("train"), (train,)), _Split("test", load("test"), (test,))),
    )


_LAYOUTS = (
    _Layout(
        "ModelNet40, h5",
        ("ply_data_train*.h5", "ply_data_test*.h5", "modelnet40_ply_hdf5_2048/*.h5"),
        (
            _Split("train", lambda r, n: load_modelnet40(r, "train", points=n), (9840, 9843)),
            _Split("test", lambda r, n: load_modelnet40(r, "test", points=n), (2468,)),
        ),
    ),
    _Layout(
        "ModelNet40, text",
        ("modelnet40_shape_names.txt",),
        (
            _Split("train", lambda r, n: load_modelnet40_text(r, "train", points=n), (9843,)),
            _Split("test", lambda r, n: load_modelnet40_text(r, "test", points=n), (2468,)),
        ),
    ),
    _scan("OBJ_BG", 2309, 581, "main_split/*_objectdataset.h5", "training_objectdataset.h5"),
    _scan("OBJ_ONLY", 2309, 581, "main_split_nobg/*_objectdataset.h5"),
    _scan("PB_T50_RS", 11416, 2882, "main_split/*_objectdataset_augmentedrot_scale75.h5"),
    _Layout(
        "S3DIS blocks, test area 5",
        ("ply_data_all_*.h5", "indoor3d_sem_seg_hdf5_data/*.h5"),
        (
            _Split("train", lambda r, n: load_s3dis(r, "train", points=n), (16733,)),
            _Split("test", lambda r, n: load_s3dis(r, "test", points=n), (6852,)),
        ),
    ),
)


def check(config: CheckConfig) -> list[FolderReport]:
    """Print a report on every data set in the folder; raises ValueError at the end if anything is wrong.

    Raises FileNotFoundError for a folder that is not there or holds none of the known layouts.
    """
    reports = check_folder(config.root, points=config.points)
    for report in reports:
        print(f"{report.kind} in {config.root}")
        for line in report.lines:
            print(f"  {line}")
        for problem in report.problems:
            print(f"  wrong: {problem}")
    if count := sum(len(report.problems) for report in reports):
        raise ValueError(f"{config.root}: {count} problem{'s' * (count > 1)}, listed above")
    return reports


def check_folder(root: str | Path, *, points: int = 1024) -> list[FolderReport]:
    """A report on every data set found in `root`; raises FileNotFoundError where there is none."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    found = [layout for layout in _LAYOUTS if any(any(root.glob(sign)) for sign in layout.signs)]
    reports = [_check_labelled(root, layout, points) for layout in found]
    if (root / "ShapeNet").is_dir():
        reports.append(_check_pairs(root, points))
    if is_packed(root):
        reports.append(_check_packed(root, points))
    if not found and (any(root.glob("*train*.h5")) or any(root.glob("hdf5_data/*train*.h5"))):
        reports.append(_check_parts(root, points))
    if not reports:
        signs = [sign for layout in _LAYOUTS for sign in layout.signs]
        raise FileNotFoundError(
            f"{root} holds no data set of a known layout: none of ShapeNet/, pack.json, *train*.h5, {', '.join(signs)}"
        )
    return reports


def _check_labelled(root: Path, layout: _Layout, points: int) -> FolderReport:
    report = FolderReport(layout.kind)
    for split in layout.splits:
        try:
            clouds = split.load(root, points)
        except (OSError, ValueError) as error:
            report.problems.append(f"{split.name}: {error}")
            continue
        labels = np.asarray(clouds.labels)
        counts = np.bincount(labels.ravel(), minlength=len(clouds.class_names))
        what, counted = ("blocks", "points") if labels.ndim == 2 else ("clouds", "clouds")
        report.lines.append(
            f"{split.name}: {len(clouds.points)} {what} of {clouds.points.shape[1]} points"
            f"{_published(len(clouds.points), split.published)}, {np.count_nonzero(counts)} of "
            f"{len(counts)} classes, {counts.min()} to {counts.max()} {counted} a class"
        )
        report.lines.append(f"  {_extent(np.asarray(clouds.points)[:, :, :3])}")
    return report


def _check_parts(root: Path, points: int) -> FolderReport:
    report = FolderReport("labelled parts")
    for split in ("train", "val", "test"):
        try:
            clouds = load_parts(root, split, points=points)
        except FileNotFoundError as error:
            if split != "val":
                report.problems.append(f"{split}: {error}")
            continue
        except ValueError as error:
            report.problems.append(f"{split}: {error}")
            continue
        counts = np.bincount(clouds.categories, minlength=len(clouds.category_names))
        report.lines.append(
            f"{split}: {len(clouds.points)} clouds of {clouds.points.shape[1]} points, {np.count_nonzero(counts)} of "
            f"{len(counts)} categories, {len(np.unique(clouds.parts))} of {len(clouds.part_names)} parts"
        )
        report.lines.append(f"  {_extent(clouds.points.numpy())}")
    return report


def _check_pairs(root: Path, points: int) -> FolderReport:
    report = FolderReport("pairs of clouds and images")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says stands in `skipped`
            dataset = PairDataset(root, points=points, on_error="skip")
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return report
    views = dataset.views_per_shape
    report.lines.append(
        f"{len(dataset)} shapes in {len(dataset.classes)} classes, {min(views)} to {max(views)} readable images each"
    )
    report.problems += [f"{path}: {reason}" for path, reason in dataset.skipped]
    if was_interrupted(root):
        report.problems.append("`crosspoint prepare` was interrupted: the same command goes on")
    return report


def _check_packed(root: Path, points: int) -> FolderReport:
    report = FolderReport("packed pairs of clouds and images")
    try:
        image_size = read_index(root)["image_size"]
        dataset = PackedPairs(root, points=points, image_size=image_size)
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return report
    problems: list[str] = []  # a damaged file comes once for each of its shapes
    usable = 0
    for index, views in enumerate(dataset.views_per_shape):
        try:
            for view in range(views):
                dataset.view(index, view)
            if not np.isfinite(dataset.cloud(index)).all():
                raise ValueError(f"{dataset.sources(index)[0]}: {dataset.names[index]} is not finite")
            usable += 1
        except ValueError as error:
            problems.append(str(error))
    views = dataset.views_per_shape
    report.lines.append(
        f"{usable} of {len(dataset)} shapes in {len(dataset.classes)} classes are whole, {min(views)} to {max(views)} "
        f"images of {image_size} pixels each"
    )
    report.problems += dict.fromkeys(problems)
    return report


def _published(count: int, known: Sequence[int]) -> str:
    return "" if count in known else f" (the published set has {' or '.join(map(str, known))})"


def _extent(points: np.ndarray) -> str:
    """Where the clouds lie, which tells another normalisation or axis at a glance."""
    low, high = points.min((0, 1)), points.max((0, 1))
    radius = np.linalg.norm(points - points.mean(1, keepdims=True), axis=2).max(1)
    axes = ", ".join(f"{axis} {a:.3g} to {b:.3g}" for axis, a, b in zip("xyz", low, high, strict=True))
    return f"{axes}; radius about the mean {np.median(radius):.3g} (median)"
