"""Reading and writing point clouds as .ply."""

import numpy as np
import pytest

from crosspoint.data.ply import read_points, write_points


def cloud(n=50, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


def header(file_format, vertex_lines, count, before=""):
    return (
        f"ply\nformat {file_format} 1.0\ncomment made by hand\n{before}element vertex {count}\n{vertex_lines}"
        "end_header\n"
    ).encode()


XYZ = "property float x\nproperty float y\nproperty float z\n"


def test_round_trip_is_exact(tmp_path):
    points = cloud()
    write_points(tmp_path / "a.ply", points)
    assert np.array_equal(read_points(tmp_path / "a.ply"), points)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]


def test_written_file_is_read_by_trimesh(tmp_path):
    import trimesh

    points = cloud()
    write_points(tmp_path / "a.ply", points)
    assert np.array_equal(np.asarray(trimesh.load(tmp_path / "a.ply").vertices, np.float32), points)


@pytest.mark.parametrize("order", ["little", "big"])
def test_binary_with_other_properties_and_elements(tmp_path, order):
    points = cloud().astype(np.float64)
    mark = {"little": "<", "big": ">"}[order]
    record = np.dtype([("q", mark + "u1"), ("x", mark + "f8"), ("z", mark + "f8"), ("y", mark + "f8")])
    table = np.zeros(len(points), record)
    table["x"], table["y"], table["z"] = points.T
    lines = "property uchar q\nproperty double x\nproperty double z\nproperty double y\n"
    before = "element camera 3\nproperty float a\nproperty short b\n"
    after = "element face 1\nproperty list uchar int vertex_indices\n"
    content = header(f"binary_{order}_endian", lines + after, len(points), before)
    (tmp_path / "a.ply").write_bytes(content + b"\xff" * 18 + table.tobytes() + b"\x03" + b"\0" * 12)
    assert np.array_equal(read_points(tmp_path / "a.ply"), points.astype(np.float32))


def test_ascii_with_colours_after_another_element(tmp_path):
    points = cloud(4)
    lines = XYZ + "property uchar red\n"
    before = "element camera 2\nproperty list uchar int a\n"
    body = "1 5\n2 6 7\n" + "".join(f"{x!r} {y!r} {z!r} 7\n" for x, y, z in points.tolist())
    (tmp_path / "a.ply").write_bytes(header("ascii", lines, 4, before) + body.encode())
    assert np.array_equal(read_points(tmp_path / "a.ply"), points)


def test_carriage_returns_in_the_header(tmp_path):
    content = header("binary_little_endian", XYZ, 2).replace(b"\n", b"\r\n")
    (tmp_path / "a.ply").write_bytes(content + cloud(2).tobytes())
    assert np.array_equal(read_points(tmp_path / "a.ply"), cloud(2))


LISTED = "element face 1\nproperty list uchar int vertex_indices\n"
BINARY = "binary_little_endian"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no complete .ply header"),
        (b"not a ply", "no complete .ply header"),
        (header(BINARY, XYZ, 4)[:40], "no complete .ply header"),
        (header(BINARY, XYZ, 4) + b"\0" * 47, "cut short: 4 vertices need 48 bytes, 47 are there"),
        (header("ascii", XYZ, 3) + b"0 0 0\n1 1 1\n", "cut short: .* 3 vertices, 2 lines"),
        (header("ascii", XYZ, 2) + b"0 0 0\n1 1\n", "must hold 3 numbers"),
        (header("ascii", XYZ, 1) + b"0 zero 0\n", "must hold 3 numbers"),
        (header(BINARY, "property float x\n", 1) + b"\0" * 4, "plain properties x, y and z"),
        (header(BINARY, XYZ.replace("float z", "list uchar float z"), 1), "plain properties x, y and z"),
        (header(BINARY, XYZ.replace("float z", "quad z"), 1), "not understood: 'property quad z'"),
        (header(BINARY, XYZ + "property float x\n", 1) + b"\0" * 16, "contradictory"),
        (header(BINARY, XYZ, "many"), "not understood"),
        (header(BINARY, XYZ, 1, LISTED) + b"\0" * 99, "with a list stands before"),
        (b"ply\nformat ascii 1.0\nend_header\n", "no 'element vertex'"),
        (header("ascii", XYZ, 2) + b"0 0 0\n0 nan 0\n", "point 1 is not finite"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "broken.ply"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.ply: .*{reason}"):
        read_points(path)


def test_writing_refuses_other_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(N, 3\), got \(3, 4\)"):
        write_points(tmp_path / "a.ply", np.zeros((3, 4)))
