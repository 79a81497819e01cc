"""Finding meshes, naming them, and making one ready."""

import numpy as np
import pytest
import trimesh

from crosspoint.data.meshes import EXTENSIONS, find_meshes, load_mesh


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def names(root, **options):
    return [mesh.name for mesh in find_meshes(root, **options)]


def test_names_come_from_folders(tmp_path):
    for path in ("chair/a.off", "vehicle/car/b.OBJ", "c.stl", "chair/.hidden.off", "chair/notes.txt"):
        touch(tmp_path / path)
    assert names(tmp_path) == [f"{tmp_path.name}/c", "chair/a", "vehicle-car/b"]


def test_names_are_unique(tmp_path):
    for path in ("a/b/x.off", "a-b/x.off", "a/b/x.ply", "a/b/X.glb", "a-b/x-2.off"):
        touch(tmp_path / path)
    found = names(tmp_path)
    assert len({name.lower() for name in found}) == 5
    assert {name.split("/")[0] for name in found} == {"a-b"}
    assert found == names(tmp_path)


def test_class_depth_moves_folders_into_the_id(tmp_path):
    for path in ("02691156/10155/models/model_normalized.obj", "chair/train/chair_0001.off", "loose.off"):
        touch(tmp_path / path)
    assert names(tmp_path, class_depth=1) == [
        "02691156/10155-models-model_normalized",
        "chair/train-chair_0001",
        f"{tmp_path.name}/loose",
    ]


def test_a_missing_or_empty_folder_is_named_with_the_extensions(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no mesh folder .*nowhere; expected .*\.off, \.obj, \.ply"):
        find_meshes(tmp_path / "nowhere")
    touch(tmp_path / "chair" / "a.step")
    with pytest.raises(FileNotFoundError, match=r"no mesh under .*; expected .*\.off, \.obj, \.ply"):
        find_meshes(tmp_path)


def offset_box():
    return trimesh.creation.box(extents=(1, 2, 3)).apply_translation((1e5, -2e5, 3e5))


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_every_format_is_centred_and_scaled(tmp_path, suffix):
    offset_box().apply_scale(0.01).export(tmp_path / f"box{suffix}")
    mesh = load_mesh(tmp_path / f"box{suffix}")
    assert np.allclose(mesh.bounds.sum(axis=0), 0, atol=2e-3)
    assert np.isclose(np.linalg.norm(mesh.vertices, axis=1).max(), 1)
    assert np.allclose(mesh.extents / mesh.extents[0], [1, 2, 3], rtol=2e-2)
    assert len(mesh.faces) == 12


def test_quads_in_an_obj_with_missing_materials(tmp_path):
    (tmp_path / "a.obj").write_text(
        "mtllib none.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nusemtl wood\nf 1 2 3 4\n"
    )
    assert np.isclose(load_mesh(tmp_path / "a.obj").area, 2)  # a square with diagonals of length 2


def test_an_off_file_with_counts_in_its_first_line(tmp_path):
    # As in the ModelNet40 release.
    (tmp_path / "a.off").write_text("OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    assert len(load_mesh(tmp_path / "a.off").faces) == 1


def test_the_transforms_of_a_scene_are_applied(tmp_path):
    scene = trimesh.Scene()
    for x in (0, 10):
        matrix = trimesh.transformations.translation_matrix((x, 0, 0))
        scene.add_geometry(trimesh.creation.box(extents=(1, 1, 1)), transform=matrix)
    scene.export(tmp_path / "a.glb")
    mesh = load_mesh(tmp_path / "a.glb")
    assert len(mesh.faces) == 24
    assert np.allclose(mesh.extents / mesh.extents[1], [11, 1, 1])


def test_up(tmp_path):
    cone = trimesh.creation.cone(radius=0.3, height=2)  # stands on z, its tip up
    cone.export(tmp_path / "cone.off")
    mesh = load_mesh(tmp_path / "cone.off", up="z")
    assert np.argmax(mesh.extents) == 1
    assert np.ptp(mesh.vertices[mesh.vertices[:, 1] > 0], axis=0)[0] < 1e-6  # the tip alone is above
    assert mesh.volume > 0  # a rotation, no mirror image
    assert np.argmax(load_mesh(tmp_path / "cone.off", up="y").extents) == 2


def test_unused_vertices_count_for_nothing(tmp_path):
    (tmp_path / "a.off").write_text("OFF\n5 1 0\n0 0 0\n1 0 0\n0 1 0\n900 900 900\nnan 0 0\n3 0 1 2\n")
    mesh = load_mesh(tmp_path / "a.off")
    assert len(mesh.vertices) == 3
    assert np.allclose(mesh.extents[0], mesh.extents[1])


@pytest.mark.parametrize("scale", [1e-170, 1e-30, 1e30, 1e170])
def test_extreme_units(tmp_path, scale):
    vertices = "".join(f"{x * scale!r} {y * scale!r} 0\n" for x, y in ((0, 0), (1, 0), (0, 1)))
    (tmp_path / "a.off").write_text(f"OFF\n3 1 0\n{vertices}3 0 1 2\n")
    assert np.isclose(load_mesh(tmp_path / "a.off").area, 1)


BROKEN = {
    "empty.off": (b"", "cannot be read"),
    "garbage.off": (b"\x00\x01\x02 no mesh", "cannot be read"),
    "truncated.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n", "cannot be read"),
    "beyond.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "cannot be read|names vertex 7"),
    "no_faces.off": (b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "no faces|cannot be read"),
    "points.ply": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
                   b"property float z\nend_header\n1 2 3\n", "no faces|cannot be read"),
    "beyond.ply": (b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
                   b"property float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
                   b"0 0 0\n1 0 0\n0 1 0\n3 0 1 9\n", "cannot be read|names vertex 9"),
    "nan.off": (b"OFF\n3 1 0\n0 0 0\nnan 0 0\n0 1 0\n3 0 1 2\n", "vertex 1 is not finite"),
    "inf.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 inf 0\n3 0 1 2\n", "vertex 2 is not finite"),
    "line.off": (b"OFF\n3 1 0\n0 0 0\n0.1 0.3 0.7\n0.2 0.6 1.4\n3 0 1 2\n", "no surface area"),
    "point.off": (b"OFF\n3 1 0\n2 2 2\n2 2 2\n2 2 2\n3 0 1 2\n", "no surface area"),
    "garbage.glb": (b"glTF not really", "cannot be read"),
    "garbage.stl": (b"solid nothing", "no faces|cannot be read"),
    "garbage.obj": (b"v 0 0\nf 1 2 3\n", "cannot be read|no faces"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_mesh_says_why(tmp_path, name):
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_mesh(tmp_path / name)
