import json
import logging

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedShuffleSplit, train_test_split
from sklearn.svm import SVC

from crosspoint.data import LabelledClouds, write_modelnet40
from crosspoint.evaluate import protocol as module
from crosspoint.evaluate.svm import (
    LinearSvm,
    SvmConfig,
    choose_c,
    evaluate_svm,
    fit_linear_svm,
    linear_kernel,
)
from crosspoint.models import CrossPointConfig, build
from crosspoint.models.checkpoints import save_model

GRID = (0.001, 0.1, 10.0)


def features_of_classes(seed, n, *, classes=5, width=12, noise=1.0):
    """Gaussian clusters in float32, away from the origin, as an encoder's features are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, width))
    labels = np.arange(n) % classes
    features = centres[labels] + noise * rng.standard_normal((n, width))
    return (0.3 * features + 2).astype(np.float32), labels


@pytest.fixture
def splits():
    return *features_of_classes(0, 120), *features_of_classes(1, 65)


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_gram_svm_is_the_linear_svm(splits, c):
    x, y, x_test, _ = splits
    svm = LinearSvm.from_features(x, y)
    rows = np.arange(0, 120, 2)
    for part, index in ((svm, np.arange(120)), (svm.subset(rows), rows)):
        expected = SVC(kernel="linear", C=c).fit(x[index], y[index])
        fitted, kernel = part.fit(c), linear_kernel(x_test, x[index])
        np.testing.assert_array_equal(fitted.support_, expected.support_)
        np.testing.assert_array_equal(fitted.predict(kernel), expected.predict(x_test))
        np.testing.assert_allclose(
            fitted.decision_function(kernel), expected.decision_function(x_test), rtol=1e-3, atol=1e-3
        )


def test_c_is_chosen_on_the_stratified_slice_alone(splits):
    x, y, x_test, y_test = splits
    result = fit_linear_svm(x, y, x_test, y_test, c_grid=GRID, holdout=0.25, seed=3)
    fit, held = train_test_split(np.arange(120), test_size=30, stratify=y, random_state=3)
    expected = {c: SVC(kernel="linear", C=c).fit(x[fit], y[fit]).score(x[held], y[held]) for c in GRID}
    assert result.grid == pytest.approx(expected)
    assert len(set(expected.values())) > 1, "the grid must make a difference for this test to mean something"
    assert result.c == max(expected, key=expected.__getitem__)
    refitted = SVC(kernel="linear", C=result.c).fit(x, y)
    np.testing.assert_array_equal(result.predictions, refitted.predict(x_test))
    assert result.accuracy == refitted.score(x_test, y_test)


def test_repeated_slices_are_averaged(splits):
    x, y, _, _ = splits
    svm = LinearSvm.from_features(x, y)
    _, scores = choose_c(svm, GRID, holdout=0.25, repeats=4, seed=3)
    splitter = StratifiedShuffleSplit(4, test_size=30, random_state=3)
    for c in GRID:
        each = [
            SVC(kernel="linear", C=c).fit(x[fit], y[fit]).score(x[held], y[held])
            for fit, held in splitter.split(x, y)
        ]
        assert scores[c] == pytest.approx(np.mean(each))


def test_the_test_split_is_predicted_once_and_last(splits, monkeypatch):
    predicted = []
    original = SVC.predict

    def spy(self, kernel):
        predicted.append(len(kernel))
        return original(self, kernel)

    monkeypatch.setattr(SVC, "predict", spy)
    fit_linear_svm(*splits, c_grid=GRID, holdout=0.25)
    assert predicted == [30] * len(GRID) + [65]


def test_test_labels_change_no_choice(splits):
    x, y, x_test, y_test = splits
    one = fit_linear_svm(x, y, x_test, y_test, c_grid=GRID)
    other = fit_linear_svm(x, y, x_test, (y_test + 1) % 5, c_grid=GRID)
    assert (one.c, one.grid) == (other.c, other.grid)
    np.testing.assert_array_equal(one.predictions, other.predictions)
    assert other.accuracy < one.accuracy


def test_the_smallest_of_equally_good_c_wins():
    x, y = features_of_classes(0, 100, noise=0.01)
    c, scores = choose_c(LinearSvm.from_features(x, y), (100.0, 1e4, 1e3), holdout=0.2, seed=0)
    assert scores == {100.0: 1.0, 1e3: 1.0, 1e4: 1.0}
    assert c == 100.0


def test_a_best_c_at_the_edge_of_the_grid_is_reported(splits, caplog):
    with caplog.at_level(logging.WARNING):
        edge = fit_linear_svm(*splits, c_grid=(1e-6, 1e-5, 0.1))
        assert edge.c == 0.1
        assert edge.c_at_edge
    assert "edge of the grid" in caplog.text
    assert not fit_linear_svm(*splits, c_grid=(1.0,)).c_at_edge


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c_grid": ()}, "c_grid"),
        ({"c_grid": (0.0, 1.0)}, "c_grid must hold positive"),
        ({"holdout": 0.0}, "holdout"),
        ({"holdout": 1.0}, "holdout"),
        ({"repeats": 0}, "repeats"),
        ({"holdout": 0.99}, "leaves fewer than one"),
    ],
)
def test_options_that_cannot_work_are_refused(splits, change, message):
    with pytest.raises(ValueError, match=message):
        fit_linear_svm(*splits, **{"c_grid": GRID, **change})


def test_data_that_cannot_work_is_refused(splits):
    x, y, x_test, y_test = splits
    with pytest.raises(ValueError, match=r"test split holds labels that train lacks: \[4\]"):
        fit_linear_svm(x[y < 4], y[y < 4], x_test, y_test, c_grid=GRID)
    lonely = np.flatnonzero((y != 2) | (np.arange(len(y)) == 2))
    with pytest.raises(ValueError, match=r"label 2 has 1 training shape.*at least 2"):
        fit_linear_svm(x[lonely], y[lonely], x_test, y_test, c_grid=GRID)
    with pytest.raises(ValueError, match="at least 2 classes"):
        fit_linear_svm(x[y == 0], y[y == 0], x_test[y_test == 0], y_test[y_test == 0], c_grid=GRID)
    with pytest.raises(ValueError, match="12 columns, test features 11"):
        fit_linear_svm(x, y, x_test[:, :-1], y_test, c_grid=GRID)
    with pytest.raises(ValueError, match=r"expected train features \(n, d\)"):
        fit_linear_svm(x, y[:-1], x_test, y_test, c_grid=GRID)
    broken = x.copy()
    broken[3, 4] = np.nan
    with pytest.raises(ValueError, match="train features hold NaN"):
        fit_linear_svm(broken, y, x_test, y_test, c_grid=GRID)


# The command, on shapes small enough for the encoder to be quick.

SMALL = CrossPointConfig(k=4, image_encoder="resnet18", projection_dim=8)
NAMES = ("ball", "stick", "disc")


def labelled(seed, per_class):
    """Ellipsoids of three proportions."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    scale = np.array([[1, 1, 1], [0.2, 0.2, 1], [1, 1, 0.1]])[labels]
    points = rng.standard_normal((len(labels), 40, 3))
    points *= (scale * rng.uniform(0.8, 1.2, scale.shape) / np.linalg.norm(points, axis=2).max())[:, None]
    return LabelledClouds(torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels), NAMES)


@pytest.fixture(scope="module")
def modelnet(tmp_path_factory):
    root = tmp_path_factory.mktemp("modelnet40")
    write_modelnet40(root, "train", labelled(0, 8))
    write_modelnet40(root, "test", labelled(1, 5))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(7)
    return save_model(tmp_path_factory.mktemp("run"), build(SMALL), SMALL)


@pytest.fixture
def config(modelnet, weights, tmp_path):
    return SvmConfig(
        run=weights,
        data=modelnet,
        out=tmp_path / "results",
        points=32,
        c_grid=GRID,
        picture=False,
        device="cpu",
    )


def test_both_encoders_are_evaluated_and_written(config, capsys):
    results = evaluate_svm(config)
    written = json.loads((config.out / "svm.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert list(written) == [
        "svm_accuracy",
        "svm_accuracy_random_init",
        "encoders",
        "class_names",
        "sizes",
        "seconds_total",
        "config",
        "versions",
    ]
    assert written["sizes"] == {"train": 24, "test": 15, "classes": 3, "points": 32, "feature_dim": 2048}
    assert written["class_names"] == list(NAMES)
    assert set(written["encoders"]) == {"pretrained", "random_init"}
    for entry in written["encoders"].values():
        assert [row["c"] for row in entry["grid"]] == list(GRID)
        assert entry["c"] in GRID
        confusion = np.array(entry["confusion"])
        assert confusion.sum(axis=1).tolist() == [5, 5, 5]
        assert entry["accuracy"] == pytest.approx(np.trace(confusion) / 15)
        assert entry["per_class"] == {name: confusion[i, i] / 5 for i, name in enumerate(NAMES)}
    assert written["svm_accuracy"] == written["encoders"]["pretrained"]["accuracy"]
    assert written["svm_accuracy_random_init"] == written["encoders"]["random_init"]["accuracy"]
    assert written["config"]["c_grid"] == list(GRID)
    assert {"crosspoint", "torch", "scikit-learn"} <= set(written["versions"])
    table = capsys.readouterr().out
    assert f"{100 * results['svm_accuracy']:.1f} %" in table
    assert "random initialisation" in table
    assert sorted(path.name for path in config.out.iterdir()) == ["svm.json"]


def test_the_encoders_are_the_saved_and_a_seeded_fresh_one(config, monkeypatch):
    seen = []
    embed = module.embed

    def spy(encoder, points, **options):
        seen.append((encoder, points))
        return embed(encoder, points, **options)

    monkeypatch.setattr(module, "embed", spy)
    config.seed = 5
    state = torch.get_rng_state()
    evaluate_svm(config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    saved = build(SMALL).point_encoder.state_dict()
    torch.manual_seed(5)
    fresh = build(SMALL).point_encoder.state_dict()
    for (encoder, points), expected in zip(seen, (saved, saved, fresh, fresh), strict=True):
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, expected[name]), name
        assert points.shape[1:] == (32, 3)
    train = labelled(0, 8).points.numpy()
    np.testing.assert_array_equal(seen[0][1], train[:, :32])  # the first points, neither moved nor scaled
    np.testing.assert_array_equal(seen[2][1], train[:, :32])


def test_clouds_are_turned_to_the_axis_of_the_run(config, weights, monkeypatch):
    seen = []
    embed = module.embed

    def spy(encoder, points, **options):
        seen.append(points)
        return embed(encoder, points, **options)

    monkeypatch.setattr(module, "embed", spy)
    config.up = "z"
    evaluate_svm(config)
    x, y, z = np.moveaxis(labelled(0, 8).points.numpy()[:, :32], -1, 0)
    np.testing.assert_array_equal(seen[0], np.stack((x, z, -y), axis=-1))
    seen.clear()
    recipe = weights.parent / "config.yaml"
    recipe.write_text("up: z\n")
    try:
        evaluate_svm(config)
    finally:
        recipe.unlink()
    np.testing.assert_array_equal(seen[0], labelled(0, 8).points.numpy()[:, :32])


def test_without_random_initialisation(config):
    config.random_init = False
    results = evaluate_svm(config)
    assert set(results["encoders"]) == {"pretrained"}
    assert results["svm_accuracy_random_init"] is None


def test_random_initialisation_alone_needs_no_run(config, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "CrossPointConfig", lambda: SMALL)
    config.run = None
    results = evaluate_svm(config)
    assert set(results["encoders"]) == {"random_init"}
    assert results["svm_accuracy"] is None
    config.out = None
    with pytest.raises(ValueError, match=r"without a run.*give out"):
        evaluate_svm(config)
    config.out, config.random_init = tmp_path, False
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_svm(config)


def test_results_go_to_the_run_folder_by_default(config, weights):
    config.out, config.random_init = None, False
    try:
        for run in (weights, weights.parent):
            config.run = run
            evaluate_svm(config)
            (weights.parent / "svm.json").unlink()
    finally:
        (weights.parent / "svm.json").unlink(missing_ok=True)


def test_a_missing_run_or_data_folder_is_named(config, tmp_path):
    config.run = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        evaluate_svm(config)
    assert not (tmp_path / "nowhere").exists()


def test_a_failed_write_leaves_the_former_results(config, monkeypatch):
    evaluate_svm(config)
    before = (config.out / "svm.json").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(module.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluate_svm(config)
    assert (config.out / "svm.json").read_bytes() == before
    assert sorted(path.name for path in config.out.iterdir()) == ["svm.json"]


def test_the_picture_is_drawn(config):
    from PIL import Image

    config.picture = True
    config.out.mkdir()
    evaluate_svm(config)
    image = np.asarray(Image.open(config.out / "svm.png").convert("RGB"))
    assert image.shape == (2850, 2700, 3)
    for half in (image[:1350], image[1350:]):
        assert (half < 250).any(axis=2).mean() > 0.005
    assert len(np.unique(image[::5, ::5].astype(int) @ [65536, 256, 1])) > 50
