"""The built-in shapes."""

import numpy as np
import pytest
import trimesh

from crosspoint.data.generated import CLASSES, make_mesh, write_meshes


def test_layout_and_determinism(tmp_path):
    paths = write_meshes(tmp_path / "a", per_class=2, seed=3)
    assert len(CLASSES) >= 10
    assert sorted(path.relative_to(tmp_path / "a").as_posix() for path in paths) == sorted(
        f"{name}/{name}_{number:04d}.ply" for name in CLASSES for number in range(2)
    )
    assert sorted(paths) == sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    # A mesh depends on nothing else that is written.
    few = write_meshes(tmp_path / "b", per_class=1, seed=3, classes=["table", "mug"])
    assert [path.read_bytes() for path in few] == [
        (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes() for path in few
    ]
    other = write_meshes(tmp_path / "c", per_class=1, seed=4, classes=["mug"])
    assert other[0].read_bytes() != few[1].read_bytes()


@pytest.mark.parametrize("name", CLASSES)
def test_every_instance_is_a_sound_mesh_of_its_own(name):
    meshes = [make_mesh(name, number, 0) for number in range(6)]
    for mesh in meshes:
        assert np.isfinite(mesh.vertices).all() and mesh.area > 0.05
        assert 0.5 <= mesh.extents.max() <= 2
        assert mesh.faces.max() < len(mesh.vertices)
    shapes = {tuple(np.round(mesh.extents / mesh.extents.max(), 3)) for mesh in meshes}
    assert len(shapes) == len(meshes)


@pytest.mark.parametrize(
    ("name", "tall"),
    [("rocket", True), ("arrow", True), ("lamp", True), ("airplane", False), ("bench", False)],
)
def test_y_is_up(name, tall):
    for number in range(4):
        x, y, z = make_mesh(name, number, 0).extents
        assert (y > max(x, z)) if tall else (y < max(x, z))


def test_headings_differ():
    # The heading of a bench is that of its longest horizontal direction.
    headings = []
    for number in range(8):
        points, _ = trimesh.sample.sample_surface(make_mesh("bench", number, 0), 500, seed=0)
        _, _, axes = np.linalg.svd(points[:, [0, 2]] - points[:, [0, 2]].mean(0))
        headings.append(np.arctan2(axes[0, 1], axes[0, 0]) % np.pi)
    assert np.ptp(headings) > 1


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"unknown classes \['sofa'\]; the built-in ones are airplane, "):
        write_meshes(tmp_path, per_class=1, seed=0, classes=["sofa"])
    with pytest.raises(ValueError, match="per_class must be at least 1"):
        write_meshes(tmp_path, per_class=0, seed=0)
