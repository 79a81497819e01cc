"""A pre-training run of seconds: random clouds, a small image encoder. As a script, one that gets killed."""

import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from crosspoint import _files, models
from crosspoint.train import PretrainConfig, pretrain
from crosspoint.train import pretrain as pretrain_function

pretrain_module = sys.modules[pretrain_function.__module__]

SHAPES, BATCH, EPOCHS = 11, 4, 3  # 2 steps an epoch, 3 shapes sit out
STEPS = SHAPES // BATCH * EPOCHS


class TinyImageEncoder(nn.Module):
    """Has a dropout, so that a resumed run must continue PyTorch's own generator too."""

    feature_dim = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, images):
        return self.layers(images).flatten(1)


def build_tiny(config):
    return models.CrossPoint(models.DGCNN(config.k, projection_dim=16), TinyImageEncoder())


def write_pairs(root: Path, shapes: int = SHAPES) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(shapes):
        kind, name = ("chair", "table")[i % 2], f"shape{i:02}"
        cloud = root / "ShapeNet" / kind / f"{name}.ply"
        views = root / "ShapeNetRendering" / kind / name / "rendering"
        cloud.parent.mkdir(parents=True, exist_ok=True)
        views.mkdir(parents=True)
        points = rng.normal(size=(64, 3)).astype("<f4")
        header = "ply\nformat binary_little_endian 1.0\nelement vertex 64\n" + "".join(
            f"property float {axis}\n" for axis in "xyz"
        )
        cloud.write_bytes(f"{header}end_header\n".encode() + points.tobytes())
        for view in range(2):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(views / f"{view:02}.png")
    return root


def tiny_config(data: Path, out: Path, **changes) -> PretrainConfig:
    values = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "points": 48,
        "image_size": 16,
        "workers": 0,
        "device": "cpu",
        "checkpoint_every": 1,
        "log_every": 1,
        "model": models.CrossPointConfig(k=4, image_encoder="resnet18", projection_dim=16),
    }
    return PretrainConfig(data=str(data), out=str(out), **{**values, **changes})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_step(nth: int) -> None:
    """Arrange for a SIGKILL in the `nth` step from now, between the backward pass and the update."""
    original = nn.utils.get_total_norm
    calls = iter(range(10**6))

    def norm(*args, **kwargs):
        if next(calls) == nth:
            die()
        return original(*args, **kwargs)

    nn.utils.get_total_norm = norm


def die_while_writing(name: str, nth: int) -> None:
    """Arrange for a SIGKILL when half of the `nth` file called `name` (from 0) is on its way to the disk."""
    original = _files.replace_file
    calls = iter(range(10**6))

    def replace(path, write):
        if Path(path).name == name and next(calls) == nth:
            content = io.BytesIO()
            write(content)

            def write_half(file):
                file.write(content.getvalue()[: content.tell() // 2])
                file.flush()
                die()

            original(path, write_half)
        original(path, write)

    for module in list(sys.modules.values()):
        if getattr(module, "replace_file", None) is original:
            module.replace_file = replace


if __name__ == "__main__":
    data, out, where, nth = sys.argv[1:]
    torch.set_num_threads(1)
    models.build = build_tiny
    if where == "step":
        die_in_step(int(nth))
    else:
        die_while_writing(where, int(nth))
    pretrain(tiny_config(Path(data), Path(out), checkpoint_every=3, resume=True))
