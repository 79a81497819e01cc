"""Few-shot, retrieval, cross-modal retrieval and features of files, on shapes made here."""

import json
import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from crosspoint import cli
from crosspoint.data import LabelledClouds, write_modelnet40
from crosspoint.data.clouds import read_clouds_of, resample
from crosspoint.data.pack import PackConfig, pack
from crosspoint.data.ply import write_points
from crosspoint.evaluate.cross_modal import CrossModalConfig, evaluate_cross_modal, recall_at
from crosspoint.evaluate.embed_files import EmbedConfig, embed_files
from crosspoint.evaluate.few_shot import (
    Episode,
    FewShotConfig,
    draw_episode,
    evaluate_few_shot,
    few_shot_accuracy,
)
from crosspoint.evaluate.retrieval import RetrievalConfig, average_precision, evaluate_retrieval, ranking
from crosspoint.models import CrossPointConfig, build, from_pretrained
from crosspoint.models.checkpoints import save_model

NAMES = ("ball", "plate", "rod")
POINTS = 24


def clouds(seed, each):
    """Clouds of three extents: any encoder tells them apart better than chance."""
    rng = np.random.default_rng(seed)
    extents = np.array([[1, 1, 1], [1, 0.05, 1], [0.05, 1, 0.05]], np.float32)
    labels = np.repeat(np.arange(3), each)
    points = rng.uniform(-1, 1, (len(labels), POINTS, 3)).astype(np.float32) * extents[labels][:, None]
    return LabelledClouds(torch.from_numpy(points), torch.from_numpy(labels), NAMES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_modelnet40(root, "train", clouds(0, 7))
    write_modelnet40(root, "test", clouds(1, 5))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    config = CrossPointConfig(point_encoder="pointnet", image_encoder="resnet18", projection_dim=8)
    save_model(folder, build(config), config)
    return folder


def options(run, data, out, **more):
    return {"run": run, "data": data, "out": out, "points": POINTS, "device": "cpu", **more}


def spots(path):
    """Whether something is drawn."""
    image = np.asarray(Image.open(path).convert("RGB"))
    return (image < 250).any(axis=2).mean() > 0.005


# ---- few-shot


@pytest.mark.parametrize("same_split", [False, True])
def test_an_episode_holds_what_the_protocol_says(same_split):
    train = np.repeat(np.arange(6), 12)
    query = train if same_split else np.repeat(np.arange(6), 4)
    episode = draw_episode(
        train,
        query,
        ways=3,
        shots=5,
        queries=4,
        same_split=same_split,
        generator=np.random.default_rng(0),
    )
    assert len(set(episode.support)) == 15 and len(set(episode.query)) == 12
    for numbers, rows, labels in (
        (episode.support_labels, episode.support, train),
        (episode.query_labels, episode.query, query),
    ):
        classes = [set(labels[rows[numbers == i]]) for i in range(3)]
        assert all(len(each) == 1 for each in classes) and len(set.union(*classes)) == 3
    assert {*train[episode.support]} == {*query[episode.query]}
    if same_split:
        assert not set(episode.support) & set(episode.query)


def test_few_shot_accuracy_is_that_of_the_pipeline():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(30, 6)), rng.normal(size=(20, 6))
    train[:15, 0] += 2
    test[:10, 0] += 2
    episode = Episode(
        np.arange(5, 25), (np.arange(5, 25) >= 15).astype(int), np.arange(20), np.arange(20) // 10
    )
    pipeline = make_pipeline(StandardScaler(), SVC(kernel="linear", C=1.0))
    expected = pipeline.fit(train[episode.support], episode.support_labels).score(test, episode.query_labels)
    assert few_shot_accuracy(train, test, episode) == expected
    assert 0.5 < expected < 1


@pytest.mark.parametrize("query_split", ["test", "train"])
def test_few_shot_end_to_end(run, data, tmp_path, capsys, query_split):
    config = FewShotConfig(
        **options(run, data, tmp_path), ways=(2, 3), shots=(2,), queries=3, runs=4, query_split=query_split
    )
    results = evaluate_few_shot(config)
    assert json.loads((tmp_path / "few_shot.json").read_text()) == json.loads(json.dumps(results))
    for rows in results["encoders"].values():
        assert [(row["ways"], row["shots"]) for row in rows] == [(2, 2), (3, 2)]
        for row in rows:
            assert len(row["accuracies"]) == 4
            assert row["mean"] == pytest.approx(np.mean(row["accuracies"]))
            assert row["std"] == pytest.approx(np.std(row["accuracies"], ddof=1))
            assert row["ci95"] == pytest.approx(1.96 * row["std"] / math.sqrt(4))
    assert evaluate_few_shot(config)["encoders"] == results["encoders"]  # seeded
    assert "2-way 2-shot" in capsys.readouterr().out
    assert spots(tmp_path / "few_shot.png")


def test_few_shot_refuses_what_cannot_be_drawn(run, data, tmp_path):
    config = FewShotConfig(**options(run, data, tmp_path), ways=(4,), shots=(2,))
    with pytest.raises(ValueError, match=r"4-way 2-shot needs 4 classes .*; there are 3"):
        evaluate_few_shot(config)
    config.ways, config.shots, config.query_split = (2,), (7,), "train"
    with pytest.raises(ValueError, match="there are 0"):  # all seven are support
        evaluate_few_shot(config)


# ---- retrieval


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    hits = rng.random((5, 30)) < 0.3
    scores = -np.arange(30.0)
    expected = [average_precision_score(row, scores) for row in hits]
    np.testing.assert_allclose(average_precision(hits), expected)
    assert average_precision(np.zeros((1, 4), bool))[0] == 0


def test_ranking_is_by_cosine_with_the_query_last():
    x = np.array([[1.0, 0], [10, 1], [0, 1], [1, 1]])
    assert ranking(x[:1], x).tolist() == [[0, 1, 3, 2]]
    assert ranking(x, x, skip_own=True)[:, -1].tolist() == [0, 1, 2, 3]
    assert ranking(x, x, skip_own=True)[0].tolist() == [1, 3, 2, 0]


def test_retrieval_end_to_end(run, data, tmp_path, capsys):
    config = RetrievalConfig(**options(run, data, tmp_path), k=3)
    results = evaluate_retrieval(config)
    assert json.loads((tmp_path / "retrieval.json").read_text()) == json.loads(json.dumps(results))
    for row in results["encoders"].values():
        assert set(row) == {"mean_average_precision", "precision_at_k", "recall_at_1", "knn_accuracy"}
        assert 1 / 3 < row["mean_average_precision"] <= 1 and 0 < row["knn_accuracy"] <= 1
    assert "mAP" in capsys.readouterr().out and spots(tmp_path / "retrieval.png")


# ---- cross-modal


def test_recall():
    ranked = np.array([[0, 1, 2], [2, 0, 1], [0, 2, 1]])
    found = recall_at(ranked, (1, 2))
    assert found == {"recall_at_1": 1 / 3, "recall_at_2": 2 / 3, "median_rank": 2.0}


def pairs(root, count=6):
    rng = np.random.default_rng(0)
    for i in range(count):
        (root / "ShapeNet/x").mkdir(parents=True, exist_ok=True)
        write_points(root / f"ShapeNet/x/{i}.ply", rng.normal(size=(POINTS, 3)).astype(np.float32))
        views = root / f"ShapeNetRendering/x/{i}/rendering"
        views.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8).astype(np.uint8)).save(views / "0.png")
    return root


def test_cross_modal_end_to_end(run, tmp_path, capsys):
    config = CrossModalConfig(
        run,
        data=pairs(tmp_path),
        out=tmp_path / "out",
        points=POINTS,
        image_size=32,
        batch_size=4,
        device="cpu",
    )
    results = evaluate_cross_modal(config)
    assert json.loads((tmp_path / "out/cross_modal.json").read_text()) == json.loads(json.dumps(results))
    assert results["shapes"] == 6 and set(results["encoders"]) == {"pretrained", "random_init"}
    for directions in results["encoders"].values():
        for row in directions.values():
            assert row["recall_at_10"] == 1 and row["recall_at_1"] <= row["recall_at_5"]
    assert "image to cloud" in capsys.readouterr().out and spots(tmp_path / "out/cross_modal.png")
    packed = tmp_path / "packed"
    pack(PackConfig(str(config.data), str(packed), points=POINTS, image_size=32))
    of_pack = evaluate_cross_modal(replace(config, data=packed, picture=False))
    assert of_pack["encoders"] == results["encoders"]


# ---- features of files


def pcd(path, points, form):
    extra = np.zeros((len(points), 1), np.float32)
    rows = np.concatenate([extra, points], 1).astype("<f4")
    header = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS intensity x y z\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\n"
        f"WIDTH {len(points)}\nHEIGHT 1\nPOINTS {len(points)}\nDATA {form}\n"
    )
    body = rows.tobytes() if form == "binary" else "\n".join(" ".join(map(str, r)) for r in rows).encode()
    path.write_bytes(header.encode() + body)
    return path


def files(folder):
    """One file of each format, of the same cloud; and of two clouds where a format has many."""
    points = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    write_points(folder / "a.ply", points)
    np.save(folder / "b.npy", points)
    np.save(folder / "many.npy", np.stack([points, points]))
    with h5py.File(folder / "c.h5", "w") as file:
        file["data"] = points[None]
    off = (
        f"OFF\n{len(points)} 1 0\n"
        + "\n".join(" ".join(map(repr, map(float, p))) for p in points)
        + "\n3 0 1 2\n"
    )
    (folder / "d.off").write_text(off)
    pcd(folder / "e.pcd", points, "ascii")
    pcd(folder / "f.pcd", points, "binary")
    return points


def test_every_format_gives_the_same_cloud(tmp_path):
    points = files(tmp_path)
    for name in ("a.ply", "b.npy", "c.h5", "d.off", "e.pcd", "f.pcd"):
        found = read_clouds_of(tmp_path / name)
        assert len(found) == 1, name
        np.testing.assert_allclose(found[0][1], points, atol=1e-6, err_msg=name)
    assert [name for name, _ in read_clouds_of(tmp_path / "many.npy")] == [
        f"{tmp_path / 'many.npy'}[0]",
        f"{tmp_path / 'many.npy'}[1]",
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.txt", b"1 2 3", "expected one of .ply, .pcd, .npy, .h5, .off"),
        ("x.npy", b"nothing", "not a readable .npy file"),
        ("x.h5", b"nothing", "not a readable h5 file"),
        ("x.pcd", b"nothing\n", "no DATA line"),
        (
            "x.pcd",
            b"FIELDS a b\nSIZE 4 4\nTYPE F F\nPOINTS 1\nDATA ascii\n1 2\n",
            "its header cannot be used",
        ),
        (
            "x.pcd",
            b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 9\nDATA binary\n1",
            "cut short: 9 points need 108",
        ),
        (
            "x.pcd",
            b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 1\nDATA binary_compressed\n1",
            "binary_compressed is not supported",
        ),
        (
            "x.pcd",
            b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 2\nDATA ascii\n1 2 3\n",
            r"its header says \(2, 3\)",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_clouds_of(tmp_path / name)
    assert name in str(error.value)


def test_resampling_keeps_or_repeats():
    points = np.arange(30.0).reshape(10, 3)
    fewer, more = resample(points, 4), resample(points, 14)
    assert len(np.unique(fewer, axis=0)) == 4 and set(map(tuple, fewer)) <= set(map(tuple, points))
    np.testing.assert_array_equal(more[:10], points)
    np.testing.assert_array_equal(resample(points, 10), points)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_embedding_of_files(run, tmp_path, suffix):
    files(tmp_path)
    paths = tuple(tmp_path / name for name in ("a.ply", "many.npy", "f.pcd"))
    out = embed_files(EmbedConfig(run, tmp_path / f"out{suffix}", paths, points=20, device="cpu"))
    if suffix == ".npz":
        with np.load(out) as found:
            features, names = found["features"], found["names"].tolist()
    else:
        with safe_open(out, framework="np") as file:
            features, names = file.get_tensor("features"), json.loads(file.metadata()["names"])
    assert names == [str(paths[0]), f"{paths[1]}[0]", f"{paths[1]}[1]", str(paths[2])]
    cloud = resample(read_clouds_of(paths[0])[0][1], 20)
    cloud = cloud - cloud.mean(0)
    cloud /= np.linalg.norm(cloud, axis=1).max()
    with torch.no_grad():
        expected = from_pretrained(run).eval()(torch.from_numpy(cloud)[None])
    np.testing.assert_allclose(features, expected.numpy().repeat(4, 0), rtol=1e-4, atol=1e-5)


def test_a_bad_file_stops_or_is_skipped(run, tmp_path, capsys):
    files(tmp_path)
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    command = ["embed", str(run), str(tmp_path / "o.npz"), str(tmp_path / "bad.npy"), str(tmp_path / "a.ply")]
    assert cli.main([*command, "--points", "8"]) == 1
    assert "bad.npy: not a readable .npy file" in capsys.readouterr().err
    assert not (tmp_path / "o.npz").exists()
    assert cli.main([*command, "--points", "8", "--on-error", "skip"]) == 0
    assert len(np.load(tmp_path / "o.npz")["features"]) == 1
    with pytest.raises(ValueError, match=r"out must end in \.npz or \.safetensors"):
        embed_files(EmbedConfig(run, tmp_path / "o.txt", (tmp_path / "a.ply",)))
