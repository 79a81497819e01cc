"""Cross-modal retrieval: the cloud of an image's shape, and the image of a cloud's, by their projections."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from crosspoint._device import resolve_device
from crosspoint._optional import require
from crosspoint.data import ImageAugmentation, PairDataset
from crosspoint.data.pack import open_pairs
from crosspoint.evaluate import plots
from crosspoint.evaluate.features import turn_upright
from crosspoint.evaluate.protocol import NAMES, output_folder, up_axis, versions, write_results
from crosspoint.evaluate.retrieval import ranking
from crosspoint.models import CrossPoint, build, checkpoints
from crosspoint.train.config import config_to_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CrossModalConfig", "evaluate_cross_modal", "recall_at"]

_DEPTHS = (1, 5, 10)
_SHOWN = 6


@dataclass
class CrossModalConfig:
    """Recall of the cloud that an image shows, among all clouds of a folder of pairs, and the other way round."""

    run: Path
    """Run folder, or weights file, of a whole CrossPoint: both encoders and their projections."""
    data: Path = Path("data")
    """Folder with ShapeNet/ and ShapeNetRendering/, or a pack of one: shapes that the run was not trained on."""
    out: Path | None = None
    """Folder for cross_modal.json and cross_modal.png; the run folder by default."""
    points: int = 2048
    """Points per cloud."""
    image_size: int = 224
    """Height and width of the images, as in pre-training."""
    up: Literal["y", "z"] = "y"
    """Axis that points up in these clouds."""
    seed: int = 0
    """Decides which view of each shape is taken, and the random initialisation."""
    random_init: bool = True
    """Evaluate the same model at random initialisation too."""
    picture: bool = True
    """Draw cross_modal.png."""
    batch_size: int = 32
    """Pairs per forward pass."""
    device: str = "auto"
    """Where the encoders run: "auto" (the first GPU, else the CPU) or a torch device."""


def recall_at(ranked: np.ndarray, depths: tuple[int, ...] = _DEPTHS) -> dict[str, float]:
    """How often row i of ranked (n, n) holds i among its first entries, by depth; and the median place of i."""
    place = (ranked == np.arange(len(ranked))[:, None]).argmax(1)
    found = {f"recall_at_{depth}": float((place < depth).mean()) for depth in depths}
    return {**found, "median_rank": float(np.median(place) + 1)}


def evaluate_cross_modal(config: CrossModalConfig) -> dict[str, Any]:
    """Run the protocol; write cross_modal.json and cross_modal.png, print a table, return what the JSON file holds.

    Keys: encoders (for each image_to_cloud and cloud_to_image with recall_at_1, _5, _10 and median_rank), shapes,
    seconds_total, config, versions. Chance is recall_at_1 of 1 / shapes.
    """
    for module in ("sklearn", "PIL", "tqdm") + ("matplotlib",) * config.picture:
        require(module, extra="eval")
    start, out = time.perf_counter(), output_folder(config)
    dataset = open_pairs(config.data, points=config.points, image_size=config.image_size, seed=config.seed)
    results_of, ranked_by = {}, {}
    for key, model in _models(config).items():
        clouds, images = _project(config, key, model, dataset)
        ranked_by[key] = ranking(images, clouds)
        results_of[key] = {
            "image_to_cloud": recall_at(ranked_by[key]),
            "cloud_to_image": recall_at(ranking(clouds, images)),
        }
    results = {
        "encoders": results_of,
        "shapes": len(dataset),
        "seconds_total": time.perf_counter() - start,
        "config": config_to_dict(config),
        "versions": versions(),
    }
    figure = _picture(dataset, ranked_by["pretrained"], config.seed) if config.picture else None
    written = write_results(out, "cross_modal", results, figure)
    print(format_table(results))
    print(f"written: {', '.join(map(str, written))}")
    return results


def format_table(results: dict[str, Any]) -> str:
    heads = "".join(f"{f'recall@{depth}':>12}" for depth in _DEPTHS)
    lines = [f"{'model':<24}{'direction':>18}{heads}{'median rank':>14}   of {results['shapes']} shapes"]
    for key, directions in results["encoders"].items():
        for direction, row in directions.items():
            values = "".join(f"{100 * row[f'recall_at_{depth}']:>10.1f} %" for depth in _DEPTHS)
            lines.append(
                f"{NAMES[key]:<24}{direction.replace('_', ' '):>18}{values}{row['median_rank']:>14.1f}"
            )
    return "\n".join(lines)


def _models(config: CrossModalConfig) -> dict[str, CrossPoint]:
    with torch.random.fork_rng(devices=[]):
        found = {"pretrained": checkpoints.load_model(config.run)}
        if config.random_init:
            torch.manual_seed(config.seed)
            found["random_init"] = build(checkpoints.load_config(config.run))
    return found


@torch.inference_mode()
def _project(
    config: CrossModalConfig, name: str, model: CrossPoint, dataset: PairDataset
) -> tuple[np.ndarray, np.ndarray]:
    """The projections of all clouds and of one image of each shape, in evaluation mode."""
    tqdm = require("tqdm", extra="eval").tqdm
    device, upright = resolve_device(config.device), up_axis(config.run)
    model = model.to(device).eval()
    prepare = ImageAugmentation(size=config.image_size, jitter=0, flip=0)  # no randomness is left
    generator = torch.Generator()
    clouds, images = [], []
    for first in tqdm(range(0, len(dataset), config.batch_size), desc=name, disable=None):
        items = [dataset[i] for i in range(first, min(first + config.batch_size, len(dataset)))]
        points = turn_upright(np.stack([item["points"].numpy() for item in items]), config.up, upright)
        feature = model.point_encoder(torch.from_numpy(np.ascontiguousarray(points)).to(device))
        clouds.append(model.point_encoder.projection(feature).float().cpu())
        views = torch.stack([item["image"] for item in items]).to(device)
        images.append(model.project_images(prepare(views, generator)).float().cpu())
    return torch.cat(clouds).numpy(), torch.cat(images).numpy()


def _picture(dataset: PairDataset, ranked: np.ndarray, seed: int) -> Figure:
    """Some images, each with the clouds that were found first; the right one framed."""
    rows = np.random.default_rng(seed).permutation(len(dataset))[:_SHOWN]
    columns = 1 + min(_SHOWN, ranked.shape[1])
    figure = plots.new_figure(1.7 * columns, 1.9 * len(rows) + 0.5)
    figure.suptitle("Image (left) and the nearest clouds; its own shape framed in green", fontsize=11)
    for row_axes, query in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        row_axes[0].imshow(np.moveaxis(dataset[int(query)]["image"].numpy(), 0, -1))
        for axes, shown in zip(row_axes[1:], ranked[query], strict=False):
            plots.draw_cloud(axes, dataset[int(shown)]["points"].numpy())
            for spine in axes.spines.values():
                spine.set(color="green" if shown == query else "0.8", linewidth=2 if shown == query else 0.8)
        for axes, shown in zip(row_axes, [query, *ranked[query]], strict=False):
            axes.set(xticks=[], yticks=[])
            axes.set_title(dataset.names[int(shown)].split("/")[0].replace("_", " "), fontsize=8)
    return figure
