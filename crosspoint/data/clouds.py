"""One cloud, or many, from a file of any of the usual formats."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from crosspoint._optional import require
from crosspoint.data.ply import read_points

__all__ = ["EXTENSIONS", "read_clouds_of", "resample"]

EXTENSIONS = (".ply", ".pcd", ".npy", ".h5", ".off")


def read_clouds_of(path: str | Path) -> list[tuple[str, np.ndarray]]:
    """(name, points float32 (N, 3)) of every cloud in a file.

    .ply and .pcd (ascii or binary): the points. .off: the vertices. .npy: (N, >= 3), or (n, N, >= 3) for many. .h5:
    `data` (n, N, >= 3). A file of many names them FILE[0], FILE[1], ...; of more than three columns, the first three.

    Raises ValueError that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    suffix = path.suffix.lower()
    if suffix == ".ply":
        values = read_points(path)
    elif suffix == ".pcd":
        values = _read_pcd(path)
    elif suffix == ".npy":
        values = _read_npy(path)
    elif suffix == ".h5":
        values = _read_h5(path)
    elif suffix == ".off":
        values = _read_off(path)
    else:
        raise ValueError(f"{path}: expected one of {', '.join(EXTENSIONS)}")
    if values.ndim not in (2, 3) or values.shape[-1] < 3 or values.dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: expected numbers of shape (N, 3) or (n, N, 3), got {values.shape} {values.dtype}"
        )
    values = values[..., :3].astype(np.float32)
    if values.shape[-2] == 0:
        raise ValueError(f"{path}: holds no points")
    clouds = (
        [(str(path), values)] if values.ndim == 2 else [(f"{path}[{i}]", v) for i, v in enumerate(values)]
    )
    for name, cloud in clouds:
        if not np.isfinite(cloud).all():
            raise ValueError(
                f"{name}: point {int(np.flatnonzero(~np.isfinite(cloud).all(1))[0])} is not finite"
            )
    return clouds


def resample(cloud: np.ndarray, points: int, seed: int = 0) -> np.ndarray:
    """`points` rows of cloud (N, 3): some of them, without repetition, or all of them and repetitions; seeded."""
    generator = np.random.default_rng((seed, len(cloud), points))
    if points <= len(cloud):
        return cloud[np.sort(generator.choice(len(cloud), points, replace=False))]
    return np.concatenate([cloud, cloud[generator.integers(len(cloud), size=points - len(cloud))]])


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file of numbers ({error})") from error


def _read_h5(path: Path) -> np.ndarray:
    h5py = require("h5py", extra="train")
    try:
        with h5py.File(path, "r") as file:
            if "data" not in file:
                raise ValueError(f"{path}: has no 'data'")
            return np.asarray(file["data"])
    except OSError as error:
        raise ValueError(f"{path}: not a readable h5 file ({error})") from error


def _read_off(path: Path) -> np.ndarray:
    trimesh = require("trimesh", extra="train")
    try:
        mesh = trimesh.load(os.fspath(path), process=False)
        return np.asarray(mesh.vertices)
    except Exception as error:  # trimesh's readers raise whatever they stumble over
        raise ValueError(f"{path}: not a readable .off file ({error})") from error


def _read_pcd(path: Path) -> np.ndarray:
    """The x, y, z of a .pcd file, version 0.7; compressed ones are refused."""
    content = path.read_bytes()
    header: dict[str, list[str]] = {}
    place = 0
    while "DATA" not in header:
        end = content.find(b"\n", place)
        if end < 0:
            raise ValueError(f"{path}: no .pcd file: its header has no DATA line")
        words = content[place:end].decode("ascii", "replace").split()
        place = end + 1
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
    try:
        names, count = header["FIELDS"], int(header["POINTS"][0])
        counts = list(map(int, header.get("COUNT", ["1"] * len(names))))
        kinds = [f"<{kind.lower()}{size}" for kind, size in zip(header["TYPE"], header["SIZE"], strict=True)]
        dtype = np.dtype([(f"{i}", k, (c,)) for i, (k, c) in enumerate(zip(kinds, counts, strict=True))])
        columns = [names.index(axis) for axis in "xyz"]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: its header cannot be used ({error}); expected FIELDS x y z ...") from error
    form = header["DATA"][0] if header["DATA"] else ""
    if form == "binary":
        if len(content) - place < count * dtype.itemsize:
            raise ValueError(f"{path}: cut short: {count} points need {count * dtype.itemsize} bytes")
        rows = np.frombuffer(content, dtype, count, place)
        return np.stack([rows[str(c)][:, 0].astype(np.float32) for c in columns], axis=1)
    if form != "ascii":
        raise ValueError(f"{path}: DATA {form or '(nothing)'} is not supported; save it as ascii or binary")
    first = np.cumsum([0, *counts])
    try:
        lines = np.loadtxt(content[place:].decode("ascii").splitlines(), np.float64, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if lines.shape[0] != count or lines.shape[1] != first[-1]:
        raise ValueError(f"{path}: has {lines.shape} numbers, its header says ({count}, {first[-1]})")
    return lines[:, [first[c] for c in columns]]
