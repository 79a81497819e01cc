"""A tiny run, in float64, in which nothing depends on how ranks share a batch.

As a script for torchrun, one where a rank dies in step 4, once; three ranks pass their embeddings on.
"""

import os
import sys
from pathlib import Path

import torch

import tiny_run
from crosspoint import models
from crosspoint.train import pretrain
from tiny_run import pretrain_module, tiny_config


class Scaled:
    """In the place of the cloud augmentation, without draws: two different views of each cloud."""

    def __init__(self, **_):
        self.calls = 0

    def __call__(self, points, generator):
        self.calls += 1
        return points.double() * torch.tensor([1.0, 1.5 if self.calls % 2 else 1.0, 1.0])


class AsFloats(Scaled):
    def __call__(self, images, generator):
        return images.double() / 255 - 0.5


def build(config):
    model = tiny_run.build_tiny(config).double()
    model.image_encoder.layers[3].p = 0.0  # dropout
    return model


def without_draws(patch) -> None:
    """`patch(module, name, value)` replaces what draws."""
    patch(models, "build", build)
    patch(pretrain_module, "CloudAugmentation", Scaled)
    patch(pretrain_module, "ImageAugmentation", AsFloats)


if __name__ == "__main__":
    data, out, failing = sys.argv[1:]
    torch.set_num_threads(1)
    without_draws(setattr)
    if os.environ["RANK"] == failing and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        tiny_run.die_in_step(3)
    options = {"parallel": "fsdp"} if os.environ["WORLD_SIZE"] == "2" else {"exchange": "ring"}
    pretrain(tiny_config(Path(data), Path(out), checkpoint_every=3, **options))
