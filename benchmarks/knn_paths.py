"""Around each number of csrc/cuda/knn_paths.h: k-NN by the searches that it chooses between, for whoever sets it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from crosspoint import ops

__all__ = ["SETTINGS", "Setting", "forced", "measure"]


class Setting(NamedTuple):
    """One number, the two paths that it chooses between, and shapes (B, N, C) below, at and beyond it."""

    name: str
    paths: tuple[str, str]
    k: int
    shapes: tuple[tuple[int, int, int], ...]


SETTINGS = (
    Setting("kFewChannels", ("cloud", "filter"), 20, ((32, 1024, 3), (32, 1024, 6), (32, 1024, 8))),
    Setting("kTreeLeast", ("cloud", "tree"), 20, ((1, 4096, 3), (1, 7168, 3), (1, 8192, 3))),
    Setting("kTreeLeastOfMany", ("cloud", "tree"), 20, ((32, 2048, 3), (32, 4096, 3), (16, 8192, 3))),
    Setting("kManyQueries", ("cloud", "tree"), 20, ((4, 4096, 3), (16, 4096, 3), (64, 4096, 3))),
)


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Makes the CUDA kernels search by `path`; an error where it cannot."""
    before = os.environ.get("CROSSPOINT_KNN_PATH")
    os.environ["CROSSPOINT_KNN_PATH"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["CROSSPOINT_KNN_PATH"]
        else:
            os.environ["CROSSPOINT_KNN_PATH"] = before


def measure(setting: Setting, device: str, clock: Callable[[Callable[[], object]], float]) -> Iterator[dict]:
    """Microseconds of both paths, shape by shape, once they gave the same graph."""
    for shape in setting.shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        us, graphs = {}, []
        for path in setting.paths:
            with forced(path):
                graphs.append(ops.knn_graph(x, setting.k, impl="native"))
                us[path] = clock(lambda x=x: ops.knn_graph(x, setting.k, impl="native"))
        differ = (graphs[0] != graphs[1]).any(-1).double().mean().item()
        yield {
            "shape": list(shape),
            "k": setting.k,
            "us": us,
            "rows_that_differ": differ,
        }
