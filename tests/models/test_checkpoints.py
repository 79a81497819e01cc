import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from crosspoint import __version__
from crosspoint.models import DGCNN, CrossPoint, CrossPointConfig, build
from crosspoint.models.checkpoints import load_config, load_model, save_model

CONFIG = CrossPointConfig(k=5, image_encoder="resnet18", projection_dim=16, temperature=0.2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build(CONFIG)
    model(*torch.randn(2, 3, 12, 3), torch.randn(3, 3, 32, 32))  # moves the running statistics
    return model.eval()


@pytest.fixture
def saved(model, tmp_path):
    return save_model(tmp_path / "weights.safetensors", model, CONFIG)


def _rewrite(path, change, **metadata):
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={**header, **metadata})


def test_round_trip(model, saved):
    assert saved.name == "weights.safetensors" and load_config(saved) == CONFIG
    for path in (saved, saved.parent, str(saved)):
        loaded = load_model(path)
        assert loaded.criterion.temperature == 0.2
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    points = torch.randn(2, 12, 3)
    assert torch.equal(loaded.eval().point_encoder(points), model.point_encoder(points))
    assert load_model(saved, impl="reference").point_encoder.impl == "reference"


def test_file_describes_itself(saved):
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["crosspoint"])
    assert header == {"version": __version__, "config": CONFIG.to_dict()}


def test_folder_gets_the_standard_name(model, tmp_path):
    assert save_model(tmp_path, model, CONFIG) == tmp_path / "weights.safetensors"
    assert save_model(tmp_path / "new" / "a.safetensors", model, CONFIG).is_file()


def test_same_weights_give_the_same_bytes(model, saved, tmp_path):
    assert save_model(tmp_path / "again", model, CONFIG).read_bytes() == saved.read_bytes()


def test_failed_write_leaves_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(saved, model, CONFIG)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*weights.safetensors: expected"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere"):
        load_config(tmp_path / "nowhere")


def test_files_of_others(saved):
    content = saved.read_bytes()
    for text in (content[:-100], b"no weights", b""):
        saved.write_bytes(text)
        with pytest.raises(ValueError, match="is not a complete safetensors file"):
            load_model(saved)
    save_file({"a": torch.zeros(1)}, saved)
    with pytest.raises(ValueError, match="carries no crosspoint configuration"):
        load_model(saved)


def test_tensors_that_do_not_fit_are_named(saved):
    def change(tensors):
        del tensors["point_encoder.conv1.weight"]
        del tensors["image_encoder.bn1.bias"]
        tensors["extra"] = torch.zeros(2)
        tensors["point_encoder.bn5.bias"] = torch.zeros(3)
        tensors["point_encoder.bn5.weight"] = torch.zeros(1024, dtype=torch.float64)

    _rewrite(saved, change)
    fresh = build(CONFIG)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit the model") as error:
        load_model(saved, fresh)
    for text in (
        "2 missing: image_encoder.bn1.bias, point_encoder.conv1.weight",
        "1 unexpected: extra",
        "point_encoder.bn5.bias (float32 (3,) in the file, float32 (1024,) in the model)",
        "point_encoder.bn5.weight (float64 (1024,) in the file, float32 (1024,) in the model)",
    ):
        assert text in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_configuration_of_another_version(saved):
    header = {"version": "9.0", "config": {**CONFIG.to_dict(), "novelty": 1}}
    _rewrite(saved, lambda tensors: None, crosspoint=json.dumps(header))
    with pytest.raises(
        ValueError, match=r"written by crosspoint 9.0.* unknown CrossPointConfig keys \['novelty'\]"
    ):
        load_model(saved)


class Own(nn.Module):
    feature_dim = 3

    def forward(self, images):
        return images.mean(dim=(2, 3))


def test_model_with_an_encoder_of_ones_own(tmp_path):
    make = lambda: CrossPoint(DGCNN(5, projection_dim=16), Own())  # noqa: E731
    original, other = make(), make()
    path = save_model(tmp_path, original, CONFIG)
    assert load_model(path, other) is other
    assert torch.equal(other.image_projection[0].weight, original.image_projection[0].weight)
    with pytest.raises(ValueError, match=r"unexpected: image_projection\.0\.weight"):
        load_model(path)
