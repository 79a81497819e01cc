"""Features of a frozen encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from crosspoint._optional import require

__all__ = ["embed", "turn_upright"]


def turn_upright(points: np.ndarray, up: str, to: str) -> np.ndarray:
    """Clouds (..., 3) whose axis `up` ("y" or "z") points up, turned so that `to` does.

    Pre-training rotates about one axis: encoders know every heading of an upright shape, and no other pose.
    """
    for name, axis in (("up", up), ("to", to)):
        if axis not in ("y", "z"):
            raise ValueError(f"{name} must be 'y' or 'z', an axis that points up; got {axis!r}")
    if up == to:
        return points
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack((x, z, -y) if up == "z" else (x, -z, y), axis=-1)


def embed(
    encoder: nn.Module,
    points: np.ndarray | Tensor,  # (n, N, 3)
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    description: str = "embed",
) -> np.ndarray:  # (n, feature_dim)
    """Backbone features of clouds, float32, in evaluation mode and without gradients.

    points: (n, N, 3), any float dtype; they go in as they are, neither augmented nor normalised.
    Shows a progress bar on a terminal.
    device: where the encoder lies by default; otherwise the encoder is moved there, and stays there.
    Every module's training flag is what it was before, even after an error.

    Raises ValueError for clouds of another shape, an empty set, coordinates that are not finite, and features
    that are not finite (naming the first such cloud).
    """
    points = torch.as_tensor(points)
    if points.ndim != 3 or points.shape[-1] != 3 or not points.is_floating_point():
        raise ValueError(
            f"expected clouds of shape (n, N, 3) in a float dtype, got {tuple(points.shape)}, {points.dtype}"
        )
    if points.shape[0] == 0 or points.shape[1] == 0:
        raise ValueError(f"no clouds to embed: got shape {tuple(points.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _refuse_non_finite(points, "coordinates of cloud")

    if device is not None:
        encoder.to(device)
    parameter = next(encoder.parameters(), None)
    place = parameter.device if parameter is not None else torch.device(device or "cpu")

    modes = [(module, module.training) for module in encoder.modules()]
    tqdm = require("tqdm", extra="eval").tqdm
    features = []
    encoder.eval()
    try:
        with torch.inference_mode(), tqdm(total=len(points), desc=description, disable=None) as bar:
            for batch in points.split(batch_size):
                feature = encoder(batch.to(place, torch.float32))
                if feature.ndim != 2 or len(feature) != len(batch):
                    raise ValueError(
                        f"the encoder must return ({len(batch)}, feature_dim), got {tuple(feature.shape)}"
                    )
                features.append(feature.float().cpu())
                bar.update(len(batch))
    finally:
        for module, training in modes:
            module.training = training
    result = torch.cat(features)
    _refuse_non_finite(result, "features of cloud")
    return result.numpy()


def _refuse_non_finite(values: Tensor, what: str) -> None:
    bad = ~values.flatten(1).isfinite().all(dim=1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{int(bad.sum())} of {len(values)} are not finite; the first: {what} {first}. "
            "Check the data, and whether pre-training diverged"
        )
