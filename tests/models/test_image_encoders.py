"""Image encoders of other libraries: stand-ins with the calls that are made of torchvision, timm and transformers."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from crosspoint.models import CrossPointConfig, ResNet, build
from crosspoint.models.checkpoints import load_encoder, load_model, save_model
from crosspoint.models.image_encoders import create_image_encoder

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """A network with a classifier, as torchvision has them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 1000))

    def forward(self, images):
        return self.classifier(self.conv(images).mean((2, 3)))


@pytest.fixture
def torchvision(monkeypatch):
    asked = []
    models = ModuleType("torchvision.models")
    models.list_models = lambda module: ["tiny"] if module is models else []
    models.get_model = lambda name, weights: asked.append((name, weights)) or Classifier()
    resnet = {**ResNet(18, projection_dim=None).state_dict(), "fc.weight": torch.zeros(1000, 512)}
    weights = SimpleNamespace(get_state_dict=lambda **_: resnet)
    models.get_model_weights = lambda name: SimpleNamespace(DEFAULT=weights)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return SimpleNamespace(asked=asked, resnet=resnet)


def test_torchvision_without_the_classifier(torchvision):
    encoder = create_image_encoder("torchvision:tiny", weights="pretrained")
    assert torchvision.asked == [("tiny", "DEFAULT")] and encoder.feature_dim == 6
    torch.testing.assert_close(encoder(IMAGES), encoder.body.conv(IMAGES).mean((2, 3)))
    with pytest.raises(ValueError, match="torchvision has no classification model 'huge'"):
        create_image_encoder("torchvision:huge")


def test_our_resnet_takes_torchvisions_weights(torchvision):
    encoder = create_image_encoder("resnet18", weights="pretrained", projection_dim=4)
    for name, value in torchvision.resnet.items():
        assert name == "fc.weight" or torch.equal(encoder.state_dict()[name], value)
    assert encoder.projection[3].out_features == 4


def test_timm_without_the_classifier(monkeypatch):
    timm, asked = ModuleType("timm"), []

    def create_model(name, pretrained, num_classes):
        asked.append((name, pretrained, num_classes))
        body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        body.num_features, body.head_hidden_size = 5, 6
        return body

    timm.is_model, timm.create_model = lambda name: name == "tiny", create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    encoder = create_image_encoder("timm:tiny")
    assert asked == [("tiny", False, 0)] and encoder(IMAGES).shape == (2, encoder.feature_dim) == (2, 6)
    with pytest.raises(ValueError, match="timm has no model 'huge'"):
        create_image_encoder("timm:huge")


@pytest.mark.parametrize("pooler", [True, False])
def test_transformers_pooled_feature(monkeypatch, pooler):
    class Body(nn.Module):
        def forward(self, images):
            tokens = images.flatten(2).transpose(1, 2)  # (B, 64, 3)
            pooled = tokens[:, 0, :, None, None] if pooler else None
            return SimpleNamespace(last_hidden_state=tokens, pooler_output=pooled)

    def configuration(name):
        if name != "here":
            raise OSError("not cached")
        return SimpleNamespace(hidden_sizes=[5, 3]) if pooler else SimpleNamespace(hidden_size=3)

    transformers = ModuleType("transformers")
    transformers.AutoConfig = SimpleNamespace(from_pretrained=configuration)
    transformers.AutoModel = SimpleNamespace(from_config=lambda _: Body(), from_pretrained=None)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    encoder = create_image_encoder("transformers:here")
    expected = IMAGES[:, :, 0, 0] if pooler else IMAGES.mean((2, 3))
    assert encoder.feature_dim == 3
    torch.testing.assert_close(encoder(IMAGES), expected)
    with pytest.raises(ValueError, match="transformers could not load 'elsewhere': not cached"):
        create_image_encoder("transformers:elsewhere")


@pytest.mark.parametrize(
    ("name", "module"),
    [("torchvision:x", "torchvision.models"), ("timm:x", "timm"), ("transformers:x", "transformers")],
)
def test_a_library_that_is_not_installed_is_named(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)  # importing it is an ImportError
    package = module.partition(".")[0]
    with pytest.raises(ImportError, match=f"'{name}' needs {package}, .*pip install {package}"):
        create_image_encoder(name)


def test_a_checkpoint_carries_the_ablation_and_downloads_nothing(torchvision, tmp_path, monkeypatch):
    config = CrossPointConfig(
        point_encoder="pointnet",
        image_encoder="torchvision:tiny",
        image_weights="pretrained",
        freeze_image_encoder=True,
        intra_weight=0.5,
        projection_dim=4,
    )
    model = build(config)
    save_model(tmp_path, model, config)
    loaded = load_model(tmp_path)
    assert [weights for _, weights in torchvision.asked] == ["DEFAULT", None]
    assert loaded.freeze_image_encoder and loaded.intra_weight == 0.5
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    encoder = load_encoder(tmp_path)  # the clouds' encoder alone needs no torchvision
    assert torch.equal(encoder.layers[0].weight, model.point_encoder.layers[0].weight)
