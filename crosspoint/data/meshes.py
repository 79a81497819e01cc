"""Meshes on disk: which there are, what they are called, and one of them made ready for sampling."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crosspoint._optional import require

if TYPE_CHECKING:
    import trimesh

__all__ = ["EXTENSIONS", "MeshFile", "find_meshes", "load_mesh"]

EXTENSIONS = (".off", ".obj", ".ply", ".stl", ".glb")
_TO_Y_UP = {"y": np.eye(3), "z": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])}
_NO_AREA = 1e-12  # of a shape of radius 1: what rounding leaves of faces that have none


class MeshFile(NamedTuple):
    """A mesh: its file, and the "<class>/<id>" under which what is made of it is stored."""

    path: Path
    name: str


def find_meshes(root: str | Path, *, class_depth: int | None = None) -> list[MeshFile]:
    """All meshes under `root`, sorted by path.

    The class is the folders between `root` and the file, joined with "-" (all of them, or the first
    `class_depth`); the id is the rest of the folders and the file's name without its suffix, joined likewise.
    Where two files would share a name, the later ones get "-2", "-3", ... A mesh right in `root` has the name
    of that folder as class.
    """
    root = Path(root)
    accepted = f"a folder tree of {', '.join(EXTENSIONS)} files whose folders are the classes"
    if not root.is_dir():
        raise FileNotFoundError(f"no mesh folder {root}; expected {accepted}")
    paths = []
    for folder, _, names in os.walk(root, followlinks=True):
        paths += [Path(folder, name) for name in names if Path(name).suffix.lower() in EXTENSIONS]
    paths = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"no mesh under {root}; expected {accepted}")
    taken: set[str] = set()
    return [MeshFile(path, _unique(_name(path, root, class_depth), taken)) for path in paths]


def _name(path: Path, root: Path, class_depth: int | None) -> str:
    folders = path.relative_to(root).parts[:-1]
    depth = len(folders) if class_depth is None else class_depth
    category = "-".join(folders[:depth]) or root.resolve().name
    return f"{category}/{'-'.join([*folders[depth:], path.stem])}"


def _unique(name: str, taken: set[str]) -> str:
    # Compared without case: some file systems do not tell "A" from "a".
    unique, count = name, 1
    while unique.lower() in taken:
        count += 1
        unique = f"{name}-{count}"
    taken.add(unique.lower())
    return unique


def load_mesh(path: str | Path, *, up: str = "y") -> trimesh.Trimesh:
    """The triangles of a mesh file as one mesh with y up, centred on its bounding box and scaled to radius 1.

    `up` is the axis that is up in the file. Units do not matter, because of the scaling; a scene's transforms
    are applied; vertices that no face uses are dropped. Colours and textures are not read.

    Raises ValueError, saying why, if the file cannot be read or has no face, no area or a vertex that is not
    finite.
    """
    trimesh = require("trimesh", extra="train")
    path = Path(path)
    try:
        mesh = trimesh.load(path, force="mesh", process=False, skip_materials=True)
        vertices = np.asarray(mesh.vertices, dtype=np.float64).reshape(-1, 3)
        faces = np.asarray(getattr(mesh, "faces", ()), dtype=np.int64).reshape(-1, 3)
    except Exception as error:  # a parser may raise anything on a damaged file
        raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from error
    if not len(faces):
        raise ValueError("has no faces")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"a face names vertex {faces.max()}, there are {len(vertices)}")
    used, faces = np.unique(faces, return_inverse=True)
    vertices = vertices[used]
    if not np.isfinite(vertices).all():
        raise ValueError(f"vertex {used[np.flatnonzero(~np.isfinite(vertices).all(1))[0]]} is not finite")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = (vertices - low / 2 - high / 2) @ _TO_Y_UP[up].T
    largest = np.abs(vertices).max()
    if largest > 0:
        vertices /= largest  # first, so that squares neither overflow nor vanish
        vertices /= np.linalg.norm(vertices, axis=1).max()
    mesh = trimesh.Trimesh(vertices, faces.reshape(-1, 3), process=False)
    if not mesh.area_faces.sum() > _NO_AREA:
        raise ValueError("has no surface area")
    return mesh
