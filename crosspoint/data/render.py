"""Shaded views of a mesh, ray-cast on the CPU: no display, no GPU, no textures.

The surface is grey, lit by a lamp above the camera's left shoulder and a weaker one at the camera. Normals
are turned to the camera, because faces of meshes from the web point either way. The background is white.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from crosspoint._optional import require

if TYPE_CHECKING:
    import trimesh

__all__ = ["cameras", "render_views"]

_FIELD_OF_VIEW = np.deg2rad(30.0)
_MARGIN = 1.06  # room around the shape
_ELEVATION = (5.0, 35.0)  # degrees above the horizon
_LAMP = np.array([-0.45, 0.75, 0.6])  # direction to it in camera coordinates: x right, y up, z backwards
_AMBIENT, _HEADLIGHT, _KEY = 0.18, 0.34, 0.40
_BACKGROUND = 1.0
_EDGE = 0.04  # difference between neighbouring pixels above which one is cast again with more rays
_SUBPIXELS = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]])  # rotated grid


def cameras(views: int, rng: np.random.Generator) -> np.ndarray:
    """Rotations (views, 3, 3), camera to world, that look at the origin with y up.

    The azimuths go round the up axis in equal steps from a random start; elevations are drawn from 5 to 35
    degrees. Columns are the camera's right, up and backward directions.
    """
    azimuth = 2 * np.pi * (rng.random() + np.arange(views) / views)
    elevation = np.deg2rad(rng.uniform(*_ELEVATION, size=views))
    zero = np.zeros(views)
    sin_a, cos_a, sin_e, cos_e = np.sin(azimuth), np.cos(azimuth), np.sin(elevation), np.cos(elevation)
    right = np.stack([cos_a, zero, -sin_a], axis=1)
    up = np.stack([-sin_e * sin_a, cos_e, -sin_e * cos_a], axis=1)
    backward = np.stack([cos_e * sin_a, sin_e, cos_e * cos_a], axis=1)
    return np.stack([right, up, backward], axis=2)


def render_views(mesh: trimesh.Trimesh, rotations: np.ndarray, size: int) -> np.ndarray:
    """Views uint8 (V, size, size, 3) of a mesh that lies inside the unit sphere, in perspective.

    `rotations` (V, 3, 3) turn camera directions into world directions; the cameras look at the origin from
    where the unit sphere just fits into the picture. Pixels at edges are the mean of four other rays.
    """
    ray = require("trimesh.ray.ray_pyembree", extra="train")
    caster = ray.RayMeshIntersector(mesh)
    normals = _unit_normals(mesh)
    return np.stack([_render(caster, normals, rotation, size) for rotation in rotations])


def _render(caster: object, normals: np.ndarray, rotation: np.ndarray, size: int) -> np.ndarray:
    rows, columns = np.divmod(np.arange(size * size), size)
    pixels = np.stack([columns, rows], axis=1).astype(np.float64)
    shade = _shade(caster, normals, rotation, pixels, size).reshape(size, size)
    edges = np.flatnonzero(_at_edge(shade))
    if len(edges):
        samples = (pixels[edges, None, :] + _SUBPIXELS).reshape(-1, 2)
        refined = _shade(caster, normals, rotation, samples, size).reshape(-1, len(_SUBPIXELS)).mean(axis=1)
        shade.reshape(-1)[edges] = refined
    grey = np.rint(255 * shade).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _shade(
    caster: object, normals: np.ndarray, rotation: np.ndarray, pixels: np.ndarray, size: int
) -> np.ndarray:
    """Brightness in [0, 1] of rays through `pixels` (n, 2): column and row, whole at pixel centres."""
    plane = (2 * (pixels + 0.5) / size - 1) * np.tan(_FIELD_OF_VIEW / 2)
    rays = np.column_stack([plane[:, 0], -plane[:, 1], np.full(len(plane), -1.0)])
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    eye = rotation[:, 2] * (_MARGIN / np.sin(_FIELD_OF_VIEW / 2))
    hit = caster.intersects_first(np.broadcast_to(eye, rays.shape), rays @ rotation.T)
    shade = np.full(len(pixels), _BACKGROUND)
    seen = np.flatnonzero(hit >= 0)
    facing = (normals @ rotation)[hit[seen]]
    towards = -np.einsum("ij,ij->i", facing, rays[seen])
    key = np.sign(towards) * (facing @ (_LAMP / np.linalg.norm(_LAMP)))
    shade[seen] = _AMBIENT + _HEADLIGHT * np.abs(towards) + _KEY * np.clip(key, 0, 1)
    return shade


def _at_edge(shade: np.ndarray) -> np.ndarray:
    """Pixels that differ from a neighbour on either side."""
    edge = np.zeros(shade.shape, dtype=bool)
    across = np.abs(np.diff(shade, axis=1)) > _EDGE
    down = np.abs(np.diff(shade, axis=0)) > _EDGE
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _unit_normals(mesh: trimesh.Trimesh) -> np.ndarray:
    corners = np.asarray(mesh.vertices)[np.asarray(mesh.faces)]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return normals / np.where(length > 0, length, 1)
