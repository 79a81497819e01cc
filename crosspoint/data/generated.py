"""Built-in shapes: twelve classes put together from primitives, in random proportions and at random headings.

They stand in for a data set where there is none. Classes share parts on purpose (tables, benches and chairs;
lamps, arrows and rockets), so that telling them apart takes more than a bounding box.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crosspoint._files import replace_file
from crosspoint._optional import require

if TYPE_CHECKING:
    import trimesh

__all__ = ["CLASSES", "make_mesh", "write_meshes"]

Parts = list["trimesh.Trimesh"]


def write_meshes(
    out: str | Path, *, per_class: int, seed: int, classes: Sequence[str] | None = None
) -> list[Path]:
    """Write `per_class` meshes of every class (default: all of CLASSES) as OUT/<class>/<id>.ply, y up.

    A mesh depends on the seed, its class and its number alone. Returns the paths.
    """
    classes = CLASSES if classes is None else tuple(classes)
    unknown = sorted(set(classes) - set(CLASSES))
    if unknown or not classes:
        raise ValueError(f"unknown classes {unknown}; the built-in ones are {', '.join(CLASSES)}")
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    paths = []
    for name in classes:
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            content = make_mesh(name, number, seed).export(file_type="ply")
            paths.append(folder / f"{name}_{number:04d}.ply")
            replace_file(paths[-1], lambda file, content=content: file.write(content))
    return paths


def make_mesh(name: str, number: int, seed: int) -> trimesh.Trimesh:
    """Mesh `number` of class `name`, y up; its longest side measures 0.5 to 2 units."""
    trimesh = require("trimesh", extra="train")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    mesh = trimesh.util.concatenate(_BUILDERS[name](rng))
    stretch = np.diag([*rng.uniform(0.85, 1.18, size=3), 1])
    mesh.apply_transform(stretch)
    mesh.apply_transform(trimesh.transformations.rotation_matrix(rng.uniform(0, 2 * np.pi), [0, 1, 0]))
    mesh.apply_scale(rng.uniform(0.5, 2) / mesh.extents.max())
    return mesh


def _box(size: Sequence[float], at: Sequence[float]) -> trimesh.Trimesh:
    box = require("trimesh.creation", extra="train").box(extents=size)
    return box.apply_translation(at)


def _lathe(profile: Sequence[tuple[float, float]], at: Sequence[float] = (0, 0, 0)) -> trimesh.Trimesh:
    """The surface that (radius, height) pairs sweep out about the y axis."""
    creation = require("trimesh.creation", extra="train")
    return _upright(creation.revolve(np.asarray(profile, dtype=float), sections=24)).apply_translation(at)


def _cylinder(radius: float, low: float, high: float, at: Sequence[float] = (0, 0, 0)) -> trimesh.Trimesh:
    return _lathe([(0, low), (radius, low), (radius, high), (0, high)], at)


def _ball(radius: float, at: Sequence[float]) -> trimesh.Trimesh:
    sphere = require("trimesh.creation", extra="train").icosphere(subdivisions=2, radius=radius)
    return sphere.apply_translation(at)


def _upright(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Turn what stands along z so that it stands along y."""
    return mesh.apply_transform([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])


def _lying(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Turn what stands along y so that it lies along x."""
    return mesh.apply_transform([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def _legs(rng: np.random.Generator, width: float, depth: float, height: float) -> Parts:
    """Four legs, square or round, at the corners of a seat or a top."""
    thick = rng.uniform(0.04, 0.1)
    square = rng.random() < 0.5
    inset = thick / 2 + rng.uniform(0, 0.06)
    legs = []
    for x in (-1, 1):
        for z in (-1, 1):
            at = (x * (width / 2 - inset), 0, z * (depth / 2 - inset))
            if square:
                legs.append(_box((thick, height, thick), (at[0], height / 2, at[2])))
            else:
                legs.append(_cylinder(thick / 2, 0, height, at))
    return legs


def _airplane(rng: np.random.Generator) -> Parts:
    length, radius = 1.0, rng.uniform(0.05, 0.09)
    nose = rng.uniform(0.1, 0.2)
    half = length / 2
    body = [(0, -half), (radius * 0.5, -half + 0.05), (radius, -half + 0.3), (radius, half - nose), (0, half)]
    span, chord, at = rng.uniform(0.7, 1.2), rng.uniform(0.12, 0.24), rng.uniform(-0.05, 0.15)
    tail, fin = rng.uniform(0.25, 0.45), rng.uniform(0.12, 0.25)
    wing_height = rng.uniform(-0.6, 0.6) * radius
    parts = [
        _lying(_lathe(body)),
        _box((chord, 0.02, span), (at, wing_height, 0)),
        _box((0.6 * chord, 0.02, tail), (-half + 0.08, 0.5 * radius, 0)),
        _box((0.6 * chord, fin, 0.02), (-half + 0.08, fin / 2 + 0.5 * radius, 0)),
    ]
    for side in (-1, 1) if rng.random() < 0.6 else ():
        engine = _lying(_cylinder(0.4 * radius, -0.08, 0.08))
        parts.append(engine.apply_translation((at, wing_height - 0.4 * radius, side * 0.28 * span)))
    return parts


def _arrow(rng: np.random.Generator) -> Parts:
    shaft, neck = rng.uniform(0.03, 0.1), rng.uniform(0.45, 0.75)
    head = shaft * rng.uniform(1.8, 3.5)
    parts = [_cylinder(shaft, 0, neck), _lathe([(0, neck), (head, neck), (0, 1)])]
    for turn in range(4) if rng.random() < 0.4 else ():
        size = (0.015, rng.uniform(0.1, 0.2), 2.6 * shaft)
        fin = _box(size, (0, size[1] / 2, shaft))
        rotate = require("trimesh.transformations", extra="train").rotation_matrix
        parts.append(fin.apply_transform(rotate(turn * np.pi / 2, [0, 1, 0])))
    return parts


def _bench(rng: np.random.Generator) -> Parts:
    width, depth, height = rng.uniform(0.9, 1.5), rng.uniform(0.25, 0.45), rng.uniform(0.28, 0.5)
    thick = rng.uniform(0.03, 0.08)
    parts = [_box((width, thick, depth), (0, height, 0))]
    if rng.random() < 0.5:
        for side in (-1, 1):
            at = (side * width * rng.uniform(0.35, 0.45), height / 2, 0)
            parts.append(_box((0.06, height, 0.9 * depth), at))
    else:
        parts += _legs(rng, width, depth, height)
    if rng.random() < 0.5:
        rise = rng.uniform(0.2, 0.45)
        for y in np.linspace(height + 0.4 * rise, height + rise, 2):
            parts.append(_box((width, 0.3 * rise, 0.03), (0, y, -depth / 2)))
        for side in (-1, 1):
            parts.append(_box((0.05, rise, 0.04), (side * 0.45 * width, height + rise / 2, -depth / 2)))
    return parts


def _chair(rng: np.random.Generator) -> Parts:
    width, depth, seat = rng.uniform(0.38, 0.6), rng.uniform(0.38, 0.6), rng.uniform(0.35, 0.55)
    rise, thick = rng.uniform(0.35, 0.7), rng.uniform(0.03, 0.1)
    parts = [_box((width, thick, depth), (0, seat, 0))]
    if rng.random() < 0.6:
        parts.append(_box((width, rise, thick), (0, seat + rise / 2, -depth / 2)))
    else:
        for x in np.linspace(-0.42, 0.42, rng.integers(2, 6)):
            parts.append(_box((0.05, rise, 0.04), (x * width, seat + rise / 2, -depth / 2)))
        parts.append(_box((width, 0.12, 0.05), (0, seat + rise, -depth / 2)))
    if rng.random() < 0.4:
        arm = rng.uniform(0.15, 0.28)
        for side in (-1, 1):
            parts.append(_box((0.05, 0.04, depth), (side * width / 2, seat + arm, 0)))
            parts.append(_box((0.05, arm, 0.05), (side * width / 2, seat + arm / 2, 0.4 * depth)))
    if rng.random() < 0.75:
        parts += _legs(rng, width, depth, seat)
    else:
        parts += [_cylinder(0.04, 0, seat), _cylinder(rng.uniform(0.18, 0.28), 0, 0.04)]
    return parts


def _dumbbell(rng: np.random.Generator) -> Parts:
    length, bar, weight = rng.uniform(0.7, 1.3), rng.uniform(0.02, 0.06), rng.uniform(0.12, 0.32)
    parts = [_lying(_cylinder(bar, -length / 2, length / 2))]
    style, thick, plates = rng.random(), rng.uniform(0.05, 0.15), rng.integers(1, 3)
    for side in (-1, 1):
        if style < 0.4:
            parts.append(_ball(weight, (side * length / 2, 0, 0)))
        for plate in range(plates) if style >= 0.4 else ():
            disc = _lying(_cylinder(weight * (1 - 0.25 * plate), -thick / 2, thick / 2))
            parts.append(disc.apply_translation((side * (length / 2 - plate * thick), 0, 0)))
    return parts


def _hourglass(rng: np.random.Generator) -> Parts:
    radius, neck, bend = rng.uniform(0.18, 0.36), rng.uniform(0.02, 0.08), rng.uniform(0.2, 0.4)
    half = [(neck, 0), (0.5 * (radius + neck), 0.4 * bend), (radius, bend), (radius, 0.46), (0, 0.46)]
    profile = [(r, -y) for r, y in reversed(half)] + half[1:]
    rim = radius * rng.uniform(1.05, 1.35)
    parts = [_lathe(profile), _cylinder(rim, -0.5, -0.45), _cylinder(rim, 0.45, 0.5)]
    posts = rng.integers(3, 5) if rng.random() < 0.6 else 0
    for angle in 2 * np.pi * np.arange(posts) / max(posts, 1):
        parts.append(
            _cylinder(0.02, -0.46, 0.46, (0.92 * rim * np.cos(angle), 0, 0.92 * rim * np.sin(angle)))
        )
    return parts


def _lamp(rng: np.random.Generator) -> Parts:
    stem, height = rng.uniform(0.015, 0.05), rng.uniform(0.5, 0.8)
    low, top, tall = rng.uniform(0.2, 0.4), rng.uniform(0.08, 0.2), rng.uniform(0.2, 0.4)
    shade = _lathe([(low, height), (top, height + tall)])
    foot = rng.uniform(0.12, 0.3)
    if rng.random() < 0.5:
        base = _cylinder(foot, 0, rng.uniform(0.02, 0.08))
    else:
        base = _lathe([(0, 0), (foot, 0), (0.6 * foot, 0.12), (stem, 0.2)])
    return [shade, base, _cylinder(stem, 0, height + 0.6 * tall)]


def _mug(rng: np.random.Generator) -> Parts:
    creation = require("trimesh.creation", extra="train")
    radius, height, wall = rng.uniform(0.25, 0.45), rng.uniform(0.5, 1.0), rng.uniform(0.02, 0.06)
    flare = radius * rng.uniform(0.75, 1.25)
    cup = [(0, 0), (radius, 0), (flare, height), (flare - wall, height), (radius - wall, wall), (0, wall)]
    ring = rng.uniform(0.22, 0.36) * height
    handle = creation.torus(ring, rng.uniform(0.03, 0.06), major_sections=24, minor_sections=8)
    return [_lathe(cup), handle.apply_translation((0.5 * (radius + flare) + 0.4 * ring, height / 2, 0))]


def _rocket(rng: np.random.Generator) -> Parts:
    rotate = require("trimesh.transformations", extra="train").rotation_matrix
    radius, body, fin = rng.uniform(0.08, 0.2), rng.uniform(0.5, 0.75), rng.uniform(0.1, 0.25)
    shoulder = rng.uniform(0.3, 0.8)
    profile = [(0, 0), (radius * rng.uniform(0.7, 1.1), 0), (radius, 0.15), (radius, body)]
    parts = [_lathe([*profile, (shoulder * radius, body + 0.5 * (1 - body)), (0, 1)])]
    fins, height = rng.integers(3, 5), rng.uniform(0.15, 0.35)
    for turn in range(fins):
        part = _box((fin, height, 0.02), (radius + fin / 2 - 0.02, height / 2 - 0.05, 0))
        parts.append(part.apply_transform(rotate(2 * np.pi * turn / fins, [0, 1, 0])))
    return parts


def _snowman(rng: np.random.Generator) -> Parts:
    rotate = require("trimesh.transformations", extra="train").rotation_matrix
    radius, height, parts = rng.uniform(0.28, 0.4), 0.0, []
    for _ in range(rng.integers(2, 4)):
        height += 0.85 * radius
        parts.append(_ball(radius, (0, height, 0)))
        last, height, radius = radius, height + 0.7 * radius, radius * rng.uniform(0.6, 0.8)
    if rng.random() < 0.6:
        brim = last * rng.uniform(0.9, 1.3)
        parts += [
            _cylinder(brim, height, height + 0.03),
            _cylinder(0.6 * brim, height, height + rng.uniform(0.1, 0.3)),
        ]
    if rng.random() < 0.6:
        nose = _lathe([(0, 0), (0.25 * last, 0), (0, last * rng.uniform(0.8, 1.4))])
        nose.apply_transform(rotate(np.pi / 2, [1, 0, 0]))
        parts.append(nose.apply_translation((0, height - 0.7 * last, 0.9 * last)))
    return parts


def _stairs(rng: np.random.Generator) -> Parts:
    steps, width = int(rng.integers(3, 8)), rng.uniform(0.4, 1.0)
    tread, rise, solid = rng.uniform(0.12, 0.22), rng.uniform(0.08, 0.2), rng.random() < 0.6
    parts = []
    for step in range(steps):
        top = (step + 1) * rise
        height = top if solid else 0.3 * rise
        parts.append(_box((tread, height, width), ((step - steps / 2) * tread, top - height / 2, 0)))
    if not solid:
        parts.append(_box((tread, steps * rise, 0.9 * width), (steps / 2 * tread, steps * rise / 2, 0)))
    return parts


def _table(rng: np.random.Generator) -> Parts:
    width, depth, height = rng.uniform(0.6, 1.3), rng.uniform(0.5, 0.9), rng.uniform(0.45, 0.85)
    thick = rng.uniform(0.02, 0.09)
    if rng.random() < 0.35:
        radius, foot = width / 2, rng.uniform(0.2, 0.35)
        return [
            _cylinder(radius, height, height + thick),
            _cylinder(rng.uniform(0.03, 0.08), 0, height),
            _cylinder(foot, 0, 0.04),
        ]
    parts = [_box((width, thick, depth), (0, height, 0)), *_legs(rng, width, depth, height)]
    if rng.random() < 0.4:
        parts.append(_box((0.9 * width, 0.03, 0.9 * depth), (0, height * rng.uniform(0.2, 0.4), 0)))
    return parts


_BUILDERS: dict[str, Callable[[np.random.Generator], Parts]] = {
    "airplane": _airplane,
    "arrow": _arrow,
    "bench": _bench,
    "chair": _chair,
    "dumbbell": _dumbbell,
    "hourglass": _hourglass,
    "lamp": _lamp,
    "mug": _mug,
    "rocket": _rocket,
    "snowman": _snowman,
    "stairs": _stairs,
    "table": _table,
}
CLASSES = tuple(_BUILDERS)
