import dataclasses
import json
import shutil

import numpy as np
import pytest

from crosspoint.data import PairDataset, load_modelnet40
from crosspoint.data.generated import CLASSES
from crosspoint.evaluate import demo as module
from crosspoint.evaluate.demo import DemoConfig, demo

TINY = DemoConfig(
    shapes_per_class=2,
    train_per_class=5,
    test_per_class=2,
    points=48,
    views=1,
    image_size=24,
    k=4,
    epochs=1,
    batch_size=12,
    workers=0,
    device="cpu",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, demo(dataclasses.replace(TINY, out=out))


def test_the_summary_says_what_was_measured(run):
    out, summary = run
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    svm = json.loads((out / "run" / "svm.json").read_text())
    for key in ("svm_accuracy", "svm_accuracy_random_init"):
        assert 0 <= written[key] <= 1
        assert written[key] == svm[key]
    assert written["sizes"] == {
        "classes": 12,
        "pretrain_shapes": 24,
        "pretrain_steps": 2,
        "svm_train": 60,
        "svm_test": 24,
    }
    assert list(written["seconds"]) == ["generate", "render", "pretrain", "evaluate", "report"]
    assert sum(written["seconds"].values()) == pytest.approx(written["seconds_total"], abs=0.5)
    assert written["config"]["points"] == 48
    assert {"crosspoint", "torch"} <= set(written["versions"])


def test_the_report_is_drawn(run):
    from PIL import Image

    out, _ = run
    image = np.asarray(Image.open(out / "report.png").convert("L"))
    height, width = image.shape
    assert width == 2700
    assert height == pytest.approx(150 * (3 * 2.45 + 7), abs=1)
    for part in (image[: height // 2], image[height // 2 :, :900], image[height // 2 :, 1800:]):
        assert (part < 200).mean() > 0.002


def test_labelled_shapes_are_new_ones_like_modelnet40(run):
    out, _ = run
    pairs = PairDataset(out / "pairs", points=48, image_size=24)
    train, test = (load_modelnet40(out / "modelnet40", split, points=48) for split in ("train", "test"))
    assert pairs.classes == sorted(CLASSES)
    assert train.class_names == test.class_names == CLASSES
    assert np.bincount(train.labels).tolist() == [5] * 12
    assert np.bincount(test.labels).tolist() == [2] * 12
    clouds = np.concatenate([train.points, test.points])
    np.testing.assert_allclose(np.linalg.norm(clouds, axis=2).max(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(clouds.mean(axis=1), 0, atol=1e-5)
    assert len(np.unique(clouds.reshape(len(clouds), -1), axis=0)) == len(clouds)


def test_seeds_of_shapes_never_meet():
    streams = [module._seed(DemoConfig(seed=seed), stream) for seed in range(4) for stream in range(3)]
    assert len(set(streams)) == len(streams)


def test_a_rerun_starts_over_with_its_own_settings(run, monkeypatch, tmp_path):
    out, _ = run
    before = {path.name for path in out.iterdir()}
    stopped = RuntimeError("stopped here")

    def stop(_):
        raise stopped

    monkeypatch.setattr(module, "prepare", stop)
    moved = tmp_path / "demo"
    shutil.copytree(out, moved)
    with pytest.raises(RuntimeError, match="stopped here"):
        demo(dataclasses.replace(TINY, out=moved, train_per_class=4, seed=1))
    # No result of the earlier demo may pass for one of this.
    assert {path.name for path in moved.iterdir()} == {"demo.yaml", "meshes", "modelnet40"}
    assert "seed: 1" in (moved / "demo.yaml").read_text()
    assert len(load_modelnet40(moved / "modelnet40", "train", points=48).labels) == 48
    assert {path.name for path in out.iterdir()} == before


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path):
    kept = tmp_path / "run" / "weights.safetensors"
    kept.parent.mkdir()
    kept.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="no demo made it"):
        demo(dataclasses.replace(TINY, out=tmp_path))
    assert kept.read_bytes() == b"precious"


def test_a_device_that_does_not_exist_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="device"):
        demo(dataclasses.replace(TINY, out=tmp_path / "demo", device="nonsense"))
    assert not (tmp_path / "demo").exists()


def test_the_table_shows_both_accuracies(run):
    out, summary = run
    table = module._table(summary, out)
    for key in ("svm_accuracy", "svm_accuracy_random_init"):
        assert f"{100 * summary[key]:.1f} %" in table
    assert str(out / "report.png") in table
