"""CrossPoint's augmentations as batched tensor code, on the device of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CloudAugmentation", "ImageAugmentation", "ScaleShift"]

_AXES = {"x": 0, "y": 1, "z": 2}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class _Draws:
    """Random numbers from one generator, made where the generator lives and moved to the batch.

    A CPU generator thus gives the same draws whatever the device of the batch; a generator on the batch's
    device saves the copy.
    """

    def __init__(self, generator: torch.Generator, device: torch.device):
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        self.generator = generator
        self.device = device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        draw = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return (low + (high - low) * draw).to(self.device, non_blocking=True)

    def normal(self, *shape: int, std: float) -> Tensor:
        draw = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return (std * draw).to(self.device, non_blocking=True)

    def permutations(self, count: int, size: int) -> Tensor:
        """(count, size): uniformly random orders of 0 .. size - 1."""
        draw = torch.rand((count, size), generator=self.generator, device=self.generator.device)
        return draw.argsort(dim=1).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class CloudAugmentation:
    """One random view of each cloud. In this order, always all of it, every draw independent per cloud:

    1. unit sphere: subtract the centroid, divide by the largest radius;
    2. isotropic scale, uniform in `scale`;
    3. rotation about the `up` axis, uniform in [0, 2 pi);
    4. translation, per axis uniform in [-translation, translation] times the cloud's extent on that axis;
    5. jitter: every coordinate + N(0, jitter_std), the noise clipped to [-jitter_clip, jitter_clip];
    6. input dropout: a ratio r uniform in [0, max_dropout], then each point is, with probability r,
       overwritten by the first point. The number of points stays.

    `augmentation(points, generator)`: points (B, N, 3) in a float dtype -> the same shape, dtype and device,
    new memory. Every draw comes from `generator`, which may be on the CPU (the same draws on every device) or
    on the batch's device (no copy); the global random state is neither read nor changed.
    """

    up: str = "y"
    scale: tuple[float, float] = (0.5, 2.0)
    translation: float = 0.5
    jitter_std: float = 0.01
    jitter_clip: float = 0.05
    max_dropout: float = 0.875

    def __post_init__(self):
        if self.up not in _AXES:
            raise ValueError(f"up must be one of {sorted(_AXES)}, got {self.up!r}")
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {self.scale}")
        for name in ("translation", "jitter_std", "jitter_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.max_dropout <= 1:
            raise ValueError(f"max_dropout must be in [0, 1], got {self.max_dropout}")

    def __call__(self, points: Tensor, generator: torch.Generator) -> Tensor:
        _check_clouds(points)
        draws = _Draws(generator, points.device)
        dtype = points.dtype
        b, n, _ = points.shape

        scale = draws.uniform(b, 1, 1, low=self.scale[0], high=self.scale[1])
        angle = draws.uniform(b, 1, high=2 * torch.pi)
        shift = draws.uniform(b, 1, 3, low=-self.translation, high=self.translation)
        noise = draws.normal(b, n, 3, std=self.jitter_std).clamp_(-self.jitter_clip, self.jitter_clip)
        ratio = draws.uniform(b, 1, high=self.max_dropout)
        dropped = draws.uniform(b, n) < ratio

        x = _unit_sphere(points) * scale.to(dtype)
        x = _rotate(x, angle.to(dtype), _AXES[self.up])
        extent = x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)
        x = x + shift.to(dtype) * extent + noise.to(dtype)
        return torch.where(dropped.unsqueeze(2), x[:, :1], x)


@dataclass(frozen=True)
class ScaleShift:
    """DGCNN's augmentation when it trains on labels (arXiv 1801.07829): each axis of each cloud times a factor
    uniform in `scale`, plus an offset uniform in [-shift, shift], in the clouds' own unit.

    `augmentation(points, generator)`: as `CloudAugmentation`, to which it is the milder alternative.
    """

    scale: tuple[float, float] = (2 / 3, 3 / 2)
    shift: float = 0.2

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {self.scale}")
        if not self.shift >= 0:
            raise ValueError(f"shift must be >= 0, got {self.shift}")

    def __call__(self, points: Tensor, generator: torch.Generator) -> Tensor:
        _check_clouds(points)
        draws = _Draws(generator, points.device)
        scale = draws.uniform(len(points), 1, 3, low=self.scale[0], high=self.scale[1])
        shift = draws.uniform(len(points), 1, 3, low=-self.shift, high=self.shift)
        return points * scale.to(points.dtype) + shift.to(points.dtype)


def _check_clouds(points: Tensor) -> None:
    if points.dim() != 3 or points.shape[2] != 3 or points.shape[1] == 0:
        raise ValueError(f"points must be (B, N, 3) with N >= 1, got {tuple(points.shape)}")
    if not points.is_floating_point():
        raise TypeError(f"points must be floating point, got {points.dtype}")


def _unit_sphere(points: Tensor) -> Tensor:
    x = points - points.mean(dim=1, keepdim=True)
    radius = x.norm(dim=2).amax(dim=1).view(-1, 1, 1)
    # a cloud that is one point has radius 0 and stays at the origin
    return x / radius.where(radius > 0, 1.0)


def _rotate(x: Tensor, angle: Tensor, axis: int) -> Tensor:
    """(B, N, 3), (B, 1) angles: right-handed about a coordinate axis, whose coordinate stays as it is."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    cos, sin = angle.cos(), angle.sin()
    rotated = x.clone()
    rotated[:, :, i] = cos * x[:, :, i] - sin * x[:, :, j]
    rotated[:, :, j] = sin * x[:, :, i] + cos * x[:, :, j]
    return rotated


@dataclass(frozen=True)
class ImageAugmentation:
    """One random rendition of each image. In this order, every draw independent per image:

    1. resize to (size, size); with `crop`, from a random box instead of the whole image: its share of the
       area is uniform in [crop, 1], the ratio of its sides log-uniform in [3/4, 4/3] of the image's, its
       place uniform inside the image;
    2. colour jitter: brightness, contrast and saturation in random order, each factor uniform in
       [1 - jitter, 1 + jitter]; results stay in [0, 1];
    3. horizontal flip with probability `flip`;
    4. ImageNet normalisation.

    `augmentation(images, generator)`: images (B, 3, H, W) uint8 -> (B, 3, size, size) float32 on the same
    device. The generator is used as by `CloudAugmentation`.
    """

    size: int = 224
    crop: float | None = None
    jitter: float = 0.4
    flip: float = 0.5

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be positive, got {self.size}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"crop must be the least share of the area, in (0, 1], or None; got {self.crop}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be in [0, 1], got {self.jitter}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        draws = _Draws(generator, images.device)
        b = len(images)

        x = images.float().div_(255)
        if self.crop is not None:
            x = _resample(x, _random_boxes(draws, b, images.shape[2:], self.crop), self.size)
        elif images.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        factors = draws.uniform(b, 3, low=1 - self.jitter, high=1 + self.jitter)
        x = _colour_jitter(x, factors, draws.permutations(b, 3))
        flipped = draws.uniform(b, 1, 1, 1) < self.flip
        x = torch.where(flipped, x.flip(3), x)
        mean = x.new_tensor(_IMAGENET_MEAN).view(3, 1, 1)
        std = x.new_tensor(_IMAGENET_STD).view(3, 1, 1)
        return (x - mean) / std


def _random_boxes(draws: _Draws, count: int, extent: tuple[int, int], least: float) -> Tensor:
    """(count, 4): top, left, height, width in pixels, not rounded."""
    h, w = extent
    area = draws.uniform(count, low=least)
    ratio = draws.uniform(count, low=-1.0) * math.log(4 / 3)
    # shares of the image's sides; a box too long for a side is cut to it
    height = (area / ratio.exp()).sqrt().clamp(max=1)
    width = (area * ratio.exp()).sqrt().clamp(max=1)
    top = draws.uniform(count) * (1 - height)
    left = draws.uniform(count) * (1 - width)
    return torch.stack([top * h, left * w, height * h, width * w], dim=1)


def _resample(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resize of one box per image: a separable resampling, two batched products."""
    rows = _resampling_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size)
    columns = _resampling_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size)
    return rows.unsqueeze(1) @ images @ columns.unsqueeze(1).transpose(2, 3)


def _resampling_weights(start: Tensor, length: Tensor, n: int, size: int) -> Tensor:
    """(B, size, n): row i weighs the n pixels by a triangle about sample i of [start, start + length)."""
    step = (length / size).view(-1, 1, 1)
    place = torch.arange(size, device=start.device).add(0.5).view(1, -1, 1)
    centre = start.view(-1, 1, 1) + place * step
    pixel = torch.arange(n, device=start.device).add(0.5)
    weights = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True)


def _colour_jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness (0), contrast (1) and saturation (2), in each image's own order (B, 3).

    All three blend the image with another, of weight 1 - factor: black, the mean grey, the grey image.
    """
    luma = x.new_tensor(_LUMA).view(3, 1, 1)
    for step in range(3):
        kind = order[:, step]
        factor = factors.gather(1, kind.unsqueeze(1)).view(-1, 1, 1, 1)
        kind = kind.view(-1, 1, 1, 1)
        grey = (x * luma).sum(dim=1, keepdim=True)
        other = torch.where(kind == 1, grey.mean(dim=(2, 3), keepdim=True), grey)
        other = torch.where(kind == 0, torch.zeros_like(grey), other)
        x = torch.lerp(other, x, factor).clamp_(0, 1)
    return x
