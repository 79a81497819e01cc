"""What the protocols share: which encoders, which labelled clouds, where results go."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from crosspoint._device import resolve_device
from crosspoint._files import replace_file
from crosspoint._optional import require
from crosspoint._version import __version__
from crosspoint.data import load_modelnet40, load_modelnet40_text, load_scanobjectnn
from crosspoint.evaluate import plots
from crosspoint.evaluate.features import embed, turn_upright
from crosspoint.models import CrossPointConfig, checkpoints
from crosspoint.models.checkpoints import EncoderConfig
from crosspoint.train.config import PretrainConfig, load_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from crosspoint.data import LabelledClouds

__all__ = [
    "NAMES",
    "Dataset",
    "Features",
    "LabelledConfig",
    "embed_splits",
    "encoders",
    "load_splits",
    "output_folder",
    "per_class_accuracy",
    "up_axis",
    "versions",
    "write_results",
]

NAMES = {"pretrained": "pre-trained", "random_init": "random initialisation"}

Dataset = Literal[
    "modelnet40",
    "modelnet40_text",
    "scanobjectnn_obj_bg",
    "scanobjectnn_obj_only",
    "scanobjectnn_pb_t50_rs",
]

_LOADERS: dict[str, Callable[..., LabelledClouds]] = {
    "modelnet40": load_modelnet40,
    "modelnet40_text": load_modelnet40_text,
    "scanobjectnn_obj_bg": lambda root, split, points: load_scanobjectnn(root, split, points=points),
    "scanobjectnn_obj_only": lambda root, split, points: load_scanobjectnn(
        root, split, variant="OBJ_ONLY", points=points
    ),
    "scanobjectnn_pb_t50_rs": lambda root, split, points: load_scanobjectnn(
        root, split, variant="PB_T50_RS", points=points
    ),
}


@dataclass
class LabelledConfig:
    """The options of every protocol on labelled clouds."""

    run: Path | None = None
    """Run folder, or weights file. None: random initialisation alone, of the default architecture."""
    data: Path = Path("data")
    """Folder that holds the data set, or the data set's own folder."""
    dataset: Dataset = "modelnet40"
    """Labelled clouds to evaluate on."""
    out: Path | None = None
    """Folder for the results; the run folder by default."""
    points: int = 1024
    """The first so many points of each cloud."""
    up: Literal["y", "z"] = "y"
    """Axis that points up in these clouds; they are turned to the one about which the run was pre-trained."""
    seed: int = 0
    """Of everything random in the protocol, the random initialisation included."""
    random_init: bool = True
    """Evaluate the same encoder at random initialisation too."""
    picture: bool = True
    """Draw the picture beside the JSON file."""
    batch_size: int = 32
    """Clouds per forward pass."""
    device: str = "auto"
    """Where the encoder runs: "auto" (the first GPU, else the CPU) or a torch device."""


class Features(NamedTuple):
    """One encoder's features by split, (n, feature_dim) float32, and the seconds they took."""

    of: dict[str, np.ndarray]
    seconds: float


class _NamesClouds(Protocol):
    run: Path | None
    data: Path
    dataset: Dataset
    points: int
    up: str


def load_splits(config: _NamesClouds) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Points (n, points, 3) and labels (n,) of "train" and "test", upright as the run knows them; class names."""
    load = _LOADERS[config.dataset]
    splits = {split: load(config.data, split, points=config.points) for split in ("train", "test")}
    names = [str(name) for name in splits["test"].class_names]
    if [str(name) for name in splits["train"].class_names] != names:
        raise ValueError(f"the train and test splits under {config.data} name different classes")
    upright = up_axis(config.run)
    points = {
        split: turn_upright(np.asarray(clouds.points), config.up, upright) for split, clouds in splits.items()
    }
    return points, {split: np.asarray(clouds.labels) for split, clouds in splits.items()}, names


def embed_splits(
    config: LabelledConfig, name: str, encoder: nn.Module, points: dict[str, np.ndarray]
) -> Features:
    """The features of every split."""
    begin = time.perf_counter()
    device = resolve_device(config.device)
    features = {
        split: embed(
            encoder, clouds, batch_size=config.batch_size, device=device, description=f"{name}, {split}"
        )
        for split, clouds in points.items()
    }
    return Features(features, time.perf_counter() - begin)


def encoders(config: LabelledConfig) -> dict[str, nn.Module]:
    """The encoders to evaluate, keys as in `NAMES`; the caller's random state stays as it is."""
    if config.run is None and not config.random_init:
        raise ValueError("nothing to evaluate: give a run, or leave random_init on")
    found: dict[str, nn.Module] = {}
    if config.run is None:
        architecture = EncoderConfig("dgcnn", CrossPointConfig().point_options)
    else:
        architecture = checkpoints.load_encoder_config(config.run)
    with torch.random.fork_rng(devices=[]):
        if config.run is not None:
            found["pretrained"] = checkpoints.load_encoder(config.run)
        if config.random_init:
            torch.manual_seed(config.seed)
            found["random_init"] = architecture.create()
    return found


def output_folder(config: Any) -> Path:
    """Where results go (`config.out`, else the folder of `config.run`), made if it does not exist."""
    if config.out is not None:
        out = Path(config.out)
    elif config.run is not None:
        run = Path(config.run)
        out = run.parent if run.is_file() else run
    else:
        raise ValueError(
            "without a run there is no run folder to write to: give out, a folder for the results"
        )
    if config.run is not None and not Path(config.run).exists():
        raise FileNotFoundError(
            f"{config.run} does not exist: expected a run folder with weights.safetensors, or a file"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def per_class_accuracy(
    labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]
) -> dict[str, float]:
    """Accuracy of every class that has test shapes."""
    return {
        name: float((predictions[labels == i] == i).mean())
        for i, name in enumerate(class_names)
        if (labels == i).any()
    }


def up_axis(run: str | Path | None) -> str:
    """The axis about which the run rotated its clouds; y, the default, where no config.yaml tells."""
    if run is None:
        return "y"
    run = Path(run)
    recipe = (run.parent if run.is_file() else run) / "config.yaml"
    return load_config(PretrainConfig, recipe).up if recipe.is_file() else "y"


def write_results(folder: Path, name: str, results: dict[str, Any], figure: Figure | None) -> list[Path]:
    """Write NAME.json and, with a figure, NAME.png, each by rename; returns what was written."""
    written = [folder / f"{name}.json"]
    text = json.dumps(results, indent=2)
    replace_file(written[0], lambda file: file.write(text.encode()))
    if figure is not None:
        written.append(folder / f"{name}.png")
        plots.save_figure(figure, written[1])
    return written


def versions() -> dict[str, str]:
    """What a result depends on besides its config."""
    return {
        "crosspoint": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": require("sklearn", extra="eval").__version__,
    }
