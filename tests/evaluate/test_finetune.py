"""Fine-tuned classification, part and semantic segmentation, on clouds made here."""

import json
import math
import signal
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

from crosspoint.data import LabelledClouds, PartClouds, write_modelnet40
from crosspoint.evaluate import finetune
from crosspoint.evaluate.classify import ClassifyConfig, evaluate_classify
from crosspoint.evaluate.part_segmentation import (
    PartSegmentationConfig,
    evaluate_part_segmentation,
    part_scores,
    shape_iou,
)
from crosspoint.evaluate.plots import confusion_counts
from crosspoint.evaluate.semantic_segmentation import (
    SemanticSegmentationConfig,
    evaluate_semantic_segmentation,
    semantic_scores,
)
from crosspoint.models import CrossPointConfig, build, from_pretrained
from crosspoint.models.checkpoints import EncoderConfig, save_encoder, save_model
from crosspoint.train.checkpoint import load_state

POINTS = 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clouds(seed, each):
    """Clouds of three extents."""
    rng = np.random.default_rng(seed)
    extents = np.array([[1, 1, 1], [1, 0.05, 1], [0.05, 1, 0.05]], np.float32)
    labels = np.repeat(np.arange(3), each)
    points = rng.uniform(-1, 1, (len(labels), POINTS, 3)).astype(np.float32) * extents[labels][:, None]
    return LabelledClouds(torch.from_numpy(points), torch.from_numpy(labels), ("ball", "plate", "rod"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_modelnet40(root, "train", clouds(0, 5))
    write_modelnet40(root, "test", clouds(1, 4))
    return root


def pretrained(folder, encoder, k=4):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = CrossPointConfig(point_encoder=encoder, k=k, image_encoder="resnet18", projection_dim=8)
        save_model(folder, build(config), config)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("run"), "pointnet")


def options(data, out, **more):
    values = {"epochs": 2, "batch_size": 4, "points": POINTS, "seeds": (0,), "device": "cpu"}
    return {"data": data, "out": out, **values, **more}


def written(out, name, results):
    """What the JSON file should hold, and that the picture shows something."""
    assert json.loads((out / f"{name}.json").read_text()) == json.loads(json.dumps(results))
    image = np.asarray(Image.open(out / f"{name}.png").convert("RGB"))
    return (image < 250).any(axis=2).mean() > 0.005


# ---- the recipe


def test_the_rate_falls_along_a_cosine_to_the_final_one():
    config = finetune.FinetuneConfig(epochs=4, lr=1.0, final_lr=0.2)
    rates = [finetune.learning_rate(config, epoch) for epoch in range(5)]
    assert rates == pytest.approx([1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2])


def test_smoothing_spreads_over_the_wrong_classes():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 5, dtype=torch.float64), torch.randint(5, (7,))
    wanted = torch.full((7, 5), 0.2 / 4, dtype=torch.float64).scatter(1, targets[:, None], 0.8)
    expected = -(wanted * F.log_softmax(logits, 1)).sum(1).mean()
    torch.testing.assert_close(finetune.smoothed_cross_entropy(logits, targets, 0.2), expected)
    torch.testing.assert_close(
        finetune.smoothed_cross_entropy(logits, targets, 0.0), F.cross_entropy(logits, targets)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": ()}, "seeds must be different"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"final_lr": 0.5}, "final_lr between 0 and lr"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"random_init": False}, "nothing to train"),
        ({"batch_size": 16}, "has 15 clouds, fewer than one batch of 16"),
        ({"batch_size": 4, "per_class": 1}, "has 3 clouds, fewer than one batch of 4"),
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_work(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_classify(ClassifyConfig(**options(data, tmp_path, **changes)))


# ---- classification


@pytest.fixture(scope="module")
def classified(run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("classified")
    config = ClassifyConfig(run=run, **options(data, out, seeds=(0, 1)))
    return config, evaluate_classify(config)


def test_classification_end_to_end(classified):
    config, results = classified
    assert written(config.out, "classify", results)
    assert set(results["encoders"]) == {"pretrained", "random_init"}
    for key, entry in results["encoders"].items():
        accuracies = [each["accuracy"] for each in entry["runs"]]
        assert [each["seed"] for each in entry["runs"]] == [0, 1]
        assert entry["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
        assert entry["std"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
        for each in entry["runs"]:
            counts = np.array(each["confusion"])
            assert counts.sum() == 12 and counts.trace() / 12 == pytest.approx(each["accuracy"])
            assert len(each["train_loss"]) == len(each["train_accuracy"]) == 2
            model = from_pretrained(config.out / f"classify/{key}_seed{each['seed']}").eval()
            with torch.no_grad():
                predicted = model.classifier(model(clouds(1, 4).points)).argmax(1).numpy()
            assert np.array_equal(
                confusion_counts(np.repeat(np.arange(3), 4), predicted, 3), each["confusion"]
            )


def test_the_first_clouds_of_each_class(data, tmp_path, monkeypatch):
    seen = {}

    def first_rows(config, task, out):
        seen["train"], seen["test"] = task.train, task.test
        return {}

    monkeypatch.setattr(finetune, "fine_tune", first_rows)
    evaluate_classify(ClassifyConfig(**options(data, tmp_path, per_class=2, picture=False)))
    every = clouds(0, 5)
    rows = [0, 1, 5, 6, 10, 11]
    assert torch.equal(seen["train"].points, every.points[rows])
    assert torch.equal(seen["train"].targets, every.labels[rows])
    assert len(seen["test"].points) == 12


def test_finished_trainings_are_only_tested(classified, monkeypatch, capsys):
    config, results = classified
    monkeypatch.setattr(finetune._Training, "_train", None)
    again = evaluate_classify(replace(config, resume=True, picture=False))
    assert again["encoders"] == results["encoders"]
    said = capsys.readouterr().out
    assert "pre-trained" in said and "random initialisation" in said and "±" in said
    with pytest.raises(FileExistsError, match="already holds a training; pass --resume"):
        evaluate_classify(config)
    with pytest.raises(ValueError, match=r"epochs: 2 in the run, 3 now"):
        evaluate_classify(replace(config, resume=True, epochs=3))


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(classified, tmp_path, monkeypatch):
    config, results = classified
    config = replace(config, out=tmp_path, seeds=(1,), picture=False)
    steps = []

    def interrupted(logits, targets, smoothing):
        steps.append(1)
        if len(steps) == 5:  # three steps an epoch: in the middle of the second
            signal.raise_signal(signal.SIGTERM)
        return original(logits, targets, smoothing)

    original = finetune.smoothed_cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "smoothed_cross_entropy", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"SIGTERM after step 5 of 6.*--resume"):
            evaluate_classify(config)
    assert load_state(tmp_path / "classify/pretrained_seed1/state.pt").step == 5
    resumed = evaluate_classify(replace(config, resume=True))
    for key, entry in resumed["encoders"].items():
        full = results["encoders"][key]["runs"][1]
        assert {**entry["runs"][0], "seconds": 0} == {**full, "seconds": 0}
        states = [
            load_state(folder / f"classify/{key}_seed1/state.pt").model
            for folder in (tmp_path, classified[0].out)
        ]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_training_starts_from_the_pretrained_encoder_and_a_head_of_its_own(run, data, tmp_path):
    still = {"lr": 1e-12, "final_lr": 0.0, "picture": False}
    evaluate_classify(ClassifyConfig(run=run, **options(data, tmp_path, **still)))
    first = from_pretrained(run)
    tuned, random = (
        from_pretrained(tmp_path / f"classify/{key}_seed0") for key in ("pretrained", "random_init")
    )
    for name, value in first.layers.named_parameters():
        torch.testing.assert_close(tuned.layers.get_parameter(name), value)
    assert not torch.allclose(random.layers[0].weight, first.layers[0].weight)
    torch.testing.assert_close(tuned.classifier[0].weight, random.classifier[0].weight)
    assert tuned.projection is None


def test_continuing_from_other_weights_is_refused(classified, tmp_path):
    config, _ = classified
    torch.manual_seed(9)
    model = CrossPointConfig(point_encoder="pointnet", image_encoder="resnet18", projection_dim=8)
    save_model(tmp_path, build(model), model)
    with pytest.raises(ValueError, match="started on other clouds or from other weights"):
        evaluate_classify(replace(config, run=tmp_path, resume=True))


@pytest.mark.parametrize("augmentation", ["scale_shift", "none"])
def test_it_learns(run, data, tmp_path, augmentation):
    config = ClassifyConfig(
        run=run,
        augmentation=augmentation,
        **options(data, tmp_path, epochs=15, batch_size=5, lr=0.02, picture=False),
    )
    results = evaluate_classify(replace(config, random_init=False))
    (entry,) = results["encoders"]["pretrained"]["runs"]
    assert entry["train_loss"][-1] < 0.8 * entry["train_loss"][0]
    assert entry["accuracy"] > 0.6  # chance: 1/3


def test_a_loss_that_is_not_finite_stops(data, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "smoothed_cross_entropy", lambda logits, *_: logits.sum() * math.nan)
    save_encoder(tmp_path / "e.safetensors", from_pretrained(pretrained(tmp_path, "pointnet")), POINTNET)
    config = ClassifyConfig(run=tmp_path / "e.safetensors", **options(data, tmp_path / "out"))
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan; lower --lr"):
        evaluate_classify(config)
    assert not list((tmp_path / "out").rglob("state.pt"))


POINTNET = EncoderConfig("pointnet", {"projection_dim": 8})


def test_an_encoder_of_another_kind_is_refused(run, data, tmp_path):
    with pytest.raises(ValueError, match=r"holds a pointnet encoder; this protocol takes dgcnn_part"):
        evaluate_part_segmentation(PartSegmentationConfig(run=run, **options(data, tmp_path)))
    with pytest.raises(ValueError, match=r"pointnet takes .*; got k"):
        evaluate_classify(ClassifyConfig(run=run, **options(data, tmp_path, k=3)))


# ---- parts


def test_shape_iou():
    true, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 7])
    assert shape_iou(predicted, true, (0, 1, 2)) == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert shape_iou(true, true, (0, 1, 2)) == 1


def test_part_scores_average_over_shapes_and_over_categories():
    true = torch.tensor([[0, 1], [0, 0], [2, 3]])
    found = PartClouds(
        torch.zeros(3, 2, 3), torch.tensor([0, 0, 1]), true, ("cup", "hand", "none"), tuple("abcd"),
        ((0, 1), (2, 3), ()),
    )  # fmt: skip
    scores = part_scores(np.array([[0, 1], [1, 1], [2, 2]]), found)
    assert scores["per_category"] == {"cup": 0.5, "hand": 0.25}  # 1 and 0; (1/2 + 0) / 2
    assert scores["instance_miou"] == pytest.approx((1 + 0 + 0.25) / 3)
    assert scores["class_miou"] == pytest.approx(0.375)
    assert scores["accuracy"] == pytest.approx(3 / 6)


def part_files(root):
    """Shapes whose two parts are above and below: cups (parts 0, 1) and hands (2, 3)."""
    rng = np.random.default_rng(0)
    (root / "categories.txt").write_text("cup\nhand\n")
    (root / "parts.txt").write_text("a\nb\nc\nd\n")
    for split, n in (("train", 4), ("test", 4)):
        points = rng.normal(size=(n, POINTS, 3)).astype(np.float32)
        label = np.arange(n) % 2
        with h5py.File(root / f"{split}0.h5", "w") as file:
            file["data"], file["label"] = points, label[:, None]
            file["pid"] = 2 * label[:, None] + (points[:, :, 1] > 0)
    return root


def test_part_segmentation_end_to_end(tmp_path, capsys):
    run = pretrained(tmp_path / "run", "dgcnn_part")
    config = PartSegmentationConfig(
        run=run, **options(part_files(tmp_path), tmp_path / "out", epochs=1, batch_size=2, k=4)
    )
    results = evaluate_part_segmentation(config)
    assert written(tmp_path / "out", "part_segmentation", results)
    assert results["sizes"]["parts"] == 4 and results["sizes"]["categories"] == 2
    for entry in results["encoders"].values():
        (each,) = entry["runs"]
        assert set(each["per_category"]) == {"cup", "hand"} and 0 <= each["instance_miou"] <= 1
    assert entry["std"] == {"instance_miou": None, "class_miou": None, "accuracy": None}
    said = capsys.readouterr().out
    assert "instance mIoU" in said and "hand" in said
    tuned = from_pretrained(tmp_path / "out/part_segmentation/pretrained_seed0")
    assert tuned.num_parts == 4 and tuned.k == 4


# ---- rooms


def test_semantic_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    scores = semantic_scores(confusion_counts(true, predicted, 5), tuple("abcde"))
    each = jaccard_score(true, predicted, average=None, labels=range(4))
    assert scores["per_class"] == pytest.approx(dict(zip("abcd", each, strict=True)))  # e occurs nowhere
    assert scores["miou"] == pytest.approx(each.mean())
    assert scores["overall_accuracy"] == accuracy_score(true, predicted)
    assert scores["class_accuracy"] == pytest.approx(
        np.mean([(predicted[true == c] == c).mean() for c in range(4)])
    )


def rooms(root):
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (6, POINTS, 9)).astype(np.float32)
    with h5py.File(root / "ply_data_all_0.h5", "w") as file:
        file["data"], file["label"] = points, (3 * points[:, :, 2]).astype(int)
    (root / "room_filelist.txt").write_text("Area_1_a\n" * 4 + "Area_5_b\n" * 2)
    return root


@pytest.mark.parametrize("channels", [9, 3])
def test_semantic_segmentation_end_to_end(tmp_path, capsys, channels):
    values = options(rooms(tmp_path), tmp_path / "out", epochs=1, batch_size=2, k=4)
    if channels == 3:
        values["run"] = pretrained(tmp_path / "run", "dgcnn_semantic")
    results = evaluate_semantic_segmentation(SemanticSegmentationConfig(**values))
    assert written(tmp_path / "out", "semantic_segmentation", results)
    assert results["sizes"] == {"train": 4, "test": 2, "points": POINTS, "channels": channels, "classes": 13}
    assert set(results["encoders"]) == {"random_init", *(["pretrained"] if channels == 3 else [])}
    for entry in results["encoders"].values():
        assert np.sum(entry["runs"][0]["confusion"]) == 2 * POINTS
    said = capsys.readouterr().out
    assert "overall accuracy" in said and "sofa" in said
