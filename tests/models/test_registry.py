import pytest
import torch

from crosspoint import models


@pytest.mark.parametrize("name", models.list_models())
def test_creates_every_model(name):
    model = models.create(name, projection_dim=8).eval()
    if name.startswith("resnet"):
        inputs = torch.randn(2, 3, 32, 32)
    else:
        inputs = torch.randn(2, 24, 9 if name == "dgcnn_semantic" else 3)
    feature = model(inputs)
    assert feature.shape == (2, model.feature_dim)
    assert model.projection(feature).shape == (2, 8)


def test_unknown_names_and_options():
    with pytest.raises(
        ValueError, match=r"no model is named 'pointnet2'; did you mean 'pointnet'\?.*dgcnn_part"
    ):
        models.create("pointnet2")
    with pytest.raises(ValueError, match="pointnet takes projection_dim, num_classes, impl; got k"):
        models.create("pointnet", k=3)


@pytest.mark.parametrize("name", ["dgcnn", "dgcnn_part", "pointnet"])
def test_every_point_encoder_trains_in_crosspoint(name):
    torch.manual_seed(0)
    config = models.CrossPointConfig(point_encoder=name, k=4, image_encoder="resnet18", projection_dim=8)
    model = models.build(config)
    output = model(*torch.randn(2, 3, 16, 3), torch.randn(3, 3, 32, 32))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
