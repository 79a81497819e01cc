"""The views: where things appear, and how they are shaded."""

import numpy as np
import pytest
import trimesh

from crosspoint.data.render import cameras, render_views

SIZE = 48


def box(*extents, at=(0, 0, 0)):
    return trimesh.creation.box(extents=extents).apply_translation(at)


def silhouette(view):
    """Rows and columns (first, last) that the shape covers."""
    covered = (view < 250).any(axis=2)
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


FRONT = np.eye(3)[None]  # the camera on the z axis, x to its right


def test_cameras_are_rotations_around_the_up_axis():
    rotations = cameras(12, np.random.default_rng(0))
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3))
    assert np.allclose(np.linalg.det(rotations), 1)
    eyes = rotations[:, :, 2]
    elevation = np.rad2deg(np.arcsin(eyes[:, 1]))
    assert (elevation >= 5).all() and (elevation <= 35).all() and np.ptp(elevation) > 5
    azimuth = np.sort(np.rad2deg(np.arctan2(eyes[:, 0], eyes[:, 2])) % 360)
    assert np.allclose(np.diff(azimuth), 30)
    assert np.allclose(rotations[:, 1, 0], 0)  # the horizon is level
    assert (rotations[:, 1, 1] > 0).all()  # and up is up


def test_a_tall_box_has_a_tall_silhouette():
    for view in render_views(box(0.3, 1.8, 0.3), cameras(6, np.random.default_rng(1)), SIZE):
        top, bottom, left, right = silhouette(view)
        assert bottom - top > 2 * (right - left)
        assert abs((top + bottom) - (SIZE - 1)) <= 6 and abs((left + right) - (SIZE - 1)) <= 2


def test_sides_are_not_swapped():
    mesh = trimesh.util.concatenate([box(0.1, 0.1, 0.1, at=(0.7, 0.4, 0)), box(0.02, 0.02, 0.02)])
    bright = np.argwhere(render_views(mesh, FRONT, SIZE)[0, :, :, 0] < 250)
    big = bright[bright[:, 1] > SIZE // 2 + 4]
    assert big[:, 0].mean() < SIZE / 2 - 4  # above the centre
    assert len(big) > len(bright) - len(big)  # and to the right


def test_nearer_is_larger():
    far, near = (
        np.subtract(*silhouette(render_views(box(0.4, 0.4, 0.02, at=(0, 0, z)), FRONT, 96)[0])[:2])
        for z in (-0.9, 0.9)
    )
    assert abs(near) > 1.3 * abs(far)


def test_the_unit_sphere_fits():
    view = render_views(trimesh.creation.icosphere(4), FRONT, SIZE)[0]
    top, bottom, left, right = silhouette(view)
    assert 0 < top <= 3 and SIZE - 4 <= bottom < SIZE - 1
    assert 0 < left <= 3 and SIZE - 4 <= right < SIZE - 1


def test_flipped_faces_look_the_same():
    mesh = trimesh.creation.torus(0.7, 0.25)
    flipped = trimesh.Trimesh(mesh.vertices, mesh.faces[:, ::-1], process=False)
    rotations = cameras(2, np.random.default_rng(2))
    assert np.array_equal(render_views(mesh, rotations, SIZE), render_views(flipped, rotations, SIZE))


def test_shading_tells_surfaces_apart_on_white():
    turn = trimesh.transformations.rotation_matrix
    corner_first = (turn(np.pi / 4, [0, 1, 0]) @ turn(-0.5, [1, 0, 0]))[:3, :3]
    view = render_views(box(1, 1, 1), corner_first[None], 96)[0]
    assert view.dtype == np.uint8 and view.shape == (96, 96, 3)
    assert (view[0] == 255).all() and (view[-1] == 255).all()
    top, left, right = (int(view[row, column, 0]) for row, column in ((28, 48), (56, 36), (56, 60)))
    assert 20 < right < left < top < 245
    assert min(left - right, top - left) > 8


def test_edges_are_smooth():
    # A slanted edge takes levels between the surface and the background.
    mesh = box(1, 1, 0.01).apply_transform(trimesh.transformations.rotation_matrix(0.3, [0, 0, 1]))
    view = render_views(mesh, FRONT, 96)[0, :, :, 0].astype(int)
    surface = view[40:56, 40:56]
    assert ((view > surface.max() + 10) & (view < 245)).sum() > 40


def test_faces_without_area_do_no_harm():
    mesh = box(1, 1, 1)
    degenerate = trimesh.Trimesh(mesh.vertices, [*mesh.faces.tolist(), [0, 0, 1], [2, 2, 2]], process=False)
    with np.errstate(all="raise"):
        views = render_views(degenerate, FRONT, SIZE)
    assert np.array_equal(views, render_views(mesh, FRONT, SIZE))


@pytest.mark.parametrize("size", [1, 7])
def test_small_sizes(size):
    assert render_views(box(1, 1, 1), FRONT, size).shape == (1, size, size, 3)
