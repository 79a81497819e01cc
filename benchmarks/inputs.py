"""Clouds to measure on, each by a name: (batch, N, 3) floats on the CPU, the same for the same arguments.

    normal       standard normal, of any number of channels: what features after a batch norm look like
    uniform      a cube
    surfaces     ellipsoids of random proportions
    clusters     1,000 tight groups
    duplicates   as CrossPoint's input dropout leaves them: 87 % of the points are copies of the first
    meshes       sampled on triangle meshes
    scans        recorded points; a cloud that has too few is laid out beside others, as on a table

Meshes (.off, .obj, .ply, .stl, .glb) and scans (.h5 files with an array `data` (n, points, 3 or more)) come from
the folder that the user names, by `--data` or CROSSPOINT_BENCH_DATA. Where there are none, generated shapes stand
in for them (sampled, and for scans seen from one side, with noise): the second value that `clouds` returns says
where the points are from.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crosspoint.data import generated
from crosspoint.data.meshes import find_meshes, load_mesh

__all__ = ["DATA", "KINDS", "clouds"]

KINDS = ("normal", "uniform", "surfaces", "clusters", "duplicates", "meshes", "scans")
DATA = "CROSSPOINT_BENCH_DATA"
_CLOUDS_AT_MOST = 64  # different ones in a batch: more are repeated


def clouds(kind: str, batch: int, n: int, channels: int = 3, *, seed: int = 0) -> tuple[Tensor, str]:
    """(batch, n, channels) points of a kind, and where they come from."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if channels != 3 and kind != "normal":
        raise ValueError(f"{kind} are points in three dimensions, got {channels} channels")
    generator = torch.Generator().manual_seed(seed)
    if kind == "meshes":
        return _meshes(batch, n)
    if kind == "scans":
        return _scans(batch, n)
    return _RANDOM[kind](batch, n, channels, generator), "random"


def _normal(batch: int, n: int, channels: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, n, channels, generator=generator)


def _uniform(batch: int, n: int, channels: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, n, channels, generator=generator)


def _surfaces(batch: int, n: int, channels: int, generator: torch.Generator) -> Tensor:
    direction = torch.randn(batch, n, channels, generator=generator)
    radii = torch.rand(batch, 1, channels, generator=generator) * 0.8 + 0.2
    return torch.nn.functional.normalize(direction, dim=2) * radii


def _clusters(batch: int, n: int, channels: int, generator: torch.Generator) -> Tensor:
    centres = torch.rand(batch, 1000, channels, generator=generator)
    chosen = torch.randint(0, 1000, (batch, n, 1), generator=generator).expand(-1, -1, channels)
    return centres.gather(1, chosen) + 0.003 * torch.randn(batch, n, channels, generator=generator)


def _duplicates(batch: int, n: int, channels: int, generator: torch.Generator) -> Tensor:
    points = _surfaces(batch, n, channels, generator)
    dropped = torch.rand(batch, n, 1, generator=generator) < 0.87
    return torch.where(dropped, points[:, :1], points)


_RANDOM = {
    "normal": _normal,
    "uniform": _uniform,
    "surfaces": _surfaces,
    "clusters": _clusters,
    "duplicates": _duplicates,
}


def _folder() -> Path | None:
    named = os.environ.get(DATA)
    if not named:
        return None
    if not Path(named).is_dir():
        raise FileNotFoundError(f"{DATA} (or --data) names {named}, which is not a folder")
    return Path(named)


def _stand_in(folder: Path | None, what: str) -> str:
    return f"generated shapes, for want of {what}" + (f" under {folder.name}" if folder else "")


def _meshes(batch: int, n: int) -> tuple[Tensor, str]:
    folder, count = _folder(), min(batch, _CLOUDS_AT_MOST)
    try:
        files = find_meshes(folder) if folder else []
    except FileNotFoundError:
        files = []
    shapes, used = [], min(count, len(files))
    for place in range(used):
        shapes.append(load_mesh(files[place * len(files) // used].path))
    source = f"{folder.name}, meshes: {used}" if used else _stand_in(folder, "meshes")
    if not used:
        names = generated.CLASSES
        shapes = [generated.make_mesh(names[i % len(names)], i, 0) for i in range(count)]
    return _batch([_sampled(shape, n, i)[0] for i, shape in enumerate(shapes)], batch), source


def _sampled(mesh: object, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n points on a mesh, and the faces that they lie on."""
    from trimesh.sample import sample_surface

    points, faces = sample_surface(mesh, n, seed=np.random.default_rng(seed))
    return np.asarray(points, dtype=np.float32), faces


def _scans(batch: int, n: int) -> tuple[Tensor, str]:
    folder, count = _folder(), min(batch, _CLOUDS_AT_MOST)
    stored = _recorded(folder) if folder else []
    if not stored:
        names = generated.CLASSES
        made = [_one_sided(names[i % len(names)], i, n) for i in range(count)]
        return _batch(made, batch), _stand_in(folder, ".h5 files of points")
    file, data = stored[0]
    per_cloud = math.ceil(n / data.shape[1])
    made = []
    for i in range(count):
        rows = [(i * per_cloud + j) % len(data) for j in range(per_cloud)]
        made.append(_side_by_side([data[row, :, :3] for row in rows])[:n])
    beside = f", {per_cloud} side by side" if per_cloud > 1 else ""
    return _batch(made, batch), f"{file.relative_to(folder)}{beside}"


def _recorded(folder: Path) -> list[tuple[Path, np.ndarray]]:
    """The .h5 files that hold clouds, with their clouds, the longest clouds first."""
    import h5py

    found = []
    for path in sorted(folder.rglob("*.h5")):
        with h5py.File(path, "r") as h5:
            if "data" in h5 and h5["data"].ndim == 3 and h5["data"].shape[2] >= 3 and len(h5["data"]):
                found.append((path, np.asarray(h5["data"][:4096, :, :3], dtype=np.float32)))
    return sorted(found, key=lambda item: -item[1].shape[1])


def _side_by_side(parts: list[np.ndarray]) -> np.ndarray:
    across = math.ceil(math.sqrt(len(parts)))
    step = 1.1 * max(float(np.ptp(part, axis=0).max()) for part in parts)
    moved = [
        part + np.float32([step * (i % across), 0, step * (i // across)]) for i, part in enumerate(parts)
    ]
    order = np.random.default_rng(0).permutation(sum(map(len, moved)))
    return np.concatenate(moved)[order]


def _one_sided(name: str, number: int, n: int) -> np.ndarray:
    """What one look at a generated mesh records: the points whose faces look that way, with noise."""
    mesh = generated.make_mesh(name, number, 0)
    rng = np.random.default_rng(number)
    view = rng.standard_normal(3)
    points, faces = _sampled(mesh, 4 * n, number)
    seen = points[mesh.face_normals[faces] @ view > 0]
    seen = np.resize(seen if len(seen) else points, (n, 3))
    return (seen + 0.002 * rng.standard_normal((n, 3))).astype(np.float32)


def _batch(different: list[np.ndarray], batch: int) -> Tensor:
    return torch.from_numpy(np.stack([different[i % len(different)] for i in range(batch)]))
