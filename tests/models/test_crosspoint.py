import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crosspoint.models import DGCNN, CrossPoint, CrossPointConfig, ResNet, build

B, N = 4, 24


class Tiny(nn.Module):
    """An image encoder of a user: no projection, (B, 3, H, W) -> (B, 5)."""

    def __init__(self, feature_dim=None, pool=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.pool = pool
        if feature_dim is not None:
            self.feature_dim = feature_dim

    def forward(self, images):
        x = self.conv(images)
        return x.mean(dim=(2, 3)) if self.pool else x


def _model(**options):
    torch.manual_seed(0)
    return CrossPoint(DGCNN(5), Tiny(feature_dim=5), **options).double()


def _batch(seed=1):
    torch.manual_seed(seed)
    view1, view2 = torch.randn(2, B, N, 3, dtype=torch.float64)
    return view1, view2, torch.randn(B, 3, 8, 8, dtype=torch.float64)


def _nt_xent(z1, z2, t):
    """The definition, anchor by anchor."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    s = (z @ z.t() / t).exp()
    losses = [-(s[a, (a + n) % (2 * n)] / (s[a].sum() - s[a, a])).log() for a in range(2 * n)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_losses_and_gradients_are_the_definitions(temperature):
    model = _model(temperature=temperature)
    view1, view2, images = _batch()
    out = model(view1, view2, images)
    gradients = torch.autograd.grad(out.loss, [*model.parameters()])

    twin = _model()
    z = twin.point_encoder.projection(twin.point_encoder(torch.cat([view1, view2])))
    image = twin.image_projection(twin.image_encoder(images))
    intra = _nt_xent(z[:B], z[B:], temperature)
    cross = _nt_xent((z[:B] + z[B:]) / 2, image, temperature)
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(out.intra_modal, intra, **close)
    torch.testing.assert_close(out.cross_modal, cross, **close)
    torch.testing.assert_close(out.loss, intra + cross, **close)
    torch.testing.assert_close((out.view1, out.view2, out.image), (z[:B], z[B:], image), **close)
    for ours, theirs in zip(gradients, torch.autograd.grad(intra + cross, [*twin.parameters()]), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_views_share_batch_statistics():
    model, view = _model(), _batch()
    model(*view)
    assert model.point_encoder.bn5.num_batches_tracked == 1
    joint = model.point_encoder.bn5.running_mean.clone()
    other = _model()
    other.point_encoder(torch.cat(view[:2]))
    torch.testing.assert_close(joint, other.point_encoder.bn5.running_mean)


def test_prototype_is_not_detached():
    model = _model()
    out = model(*_batch())
    grads = torch.autograd.grad(out.cross_modal, [out.view1, out.view2])
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("intra", "cross"), [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_losses_are_weighted_and_left_out(intra, cross):
    model, (view1, view2, images) = _model(intra_weight=intra, cross_weight=cross), _batch()
    out, both = model(view1, view2, images), _model()(view1, view2, images)
    expected = intra * both.intra_modal + cross * both.cross_modal
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    assert (out.intra_modal == 0) == (intra == 0) and (out.cross_modal == 0) == (cross == 0)
    assert (out.image is None) == (cross == 0)
    out.loss.backward()
    assert all((p.grad is None) == (cross == 0) for p in model.image_encoder.parameters())
    assert all(p.grad is not None for p in model.point_encoder.parameters())


def test_several_images_are_averaged_after_the_projection():
    model, (view1, view2, _) = _model(), _batch()
    images = torch.randn(B, 3, 3, 8, 8, dtype=torch.float64)
    out = model(view1, view2, images)
    twin = _model()
    projected = twin.project_images(images.reshape(B * 3, 3, 8, 8))
    torch.testing.assert_close(out.image, projected.reshape(B, 3, -1).mean(1))
    torch.testing.assert_close(out.cross_modal, twin.criterion((out.view1 + out.view2) / 2, out.image))


@pytest.mark.parametrize("image_encoder", [ResNet(18), Tiny(feature_dim=5)])
def test_a_frozen_image_encoder_stays_and_its_projection_learns(image_encoder):
    model = CrossPoint(DGCNN(5), image_encoder, freeze_image_encoder=True).train()
    buffers = {
        name: buffer.clone()
        for name, buffer in image_encoder.named_buffers()
        if not name.startswith("projection")
    }
    model(*torch.randn(2, B, N, 3), torch.randn(B, 3, 32, 32)).loss.backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("image_encoder.") and "projection" not in name
        assert (parameter.grad is None) == frozen, name
    state = dict(image_encoder.named_buffers())
    assert all(torch.equal(value, state[name]) for name, value in buffers.items())
    assert not image_encoder.training and model.point_encoder.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_lengths():
    model = _model()
    view1, view2, images = _batch()
    lengths = torch.tensor([N, 10, 17, 6])
    padding = torch.arange(N) >= lengths[:, None]
    outputs = []
    for garbage in (float("nan"), 1e6):
        views = [v.masked_fill(padding[:, :, None], garbage) for v in (view1, view2)]
        outputs.append(model(*views, images, lengths))
    torch.testing.assert_close(*outputs)
    assert outputs[0].loss.isfinite()
    assert not torch.allclose(outputs[0].loss, model(view1, view2, images).loss)


@pytest.mark.parametrize("image_encoder", ["resnet18", "resnet50"])
def test_every_parameter_gets_a_gradient(image_encoder):
    model = build(CrossPointConfig(k=5, image_encoder=image_encoder))
    out = model(*torch.randn(2, B, N, 3), torch.randn(B, 3, 32, 32))
    out.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert out.image.shape == out.view1.shape == (B, 256)


def test_image_encoder_with_its_own_head_is_left_alone():
    model = CrossPoint(DGCNN(5), ResNet(18))
    assert model.image_projection is None


def test_image_encoders_of_ones_own():
    assert CrossPoint(DGCNN(5, projection_dim=32), Tiny(feature_dim=5)).image_projection[3].out_features == 32
    assert CrossPoint(DGCNN(5), Tiny(), image_feature_dim=5).image_projection[0].in_features == 5
    with pytest.raises(ValueError, match=r"\(Tiny\) has neither .* pass image_feature_dim="):
        CrossPoint(DGCNN(5), Tiny())
    model = CrossPoint(DGCNN(5), Tiny(pool=False), image_feature_dim=5)
    with pytest.raises(ValueError, match=r"\(Tiny\) must return \(B, 5\), got \(4, 5, 6, 6\)"):
        model.project_images(torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must return \(B, 7\), got \(4, 5\)"):
        CrossPoint(DGCNN(5), Tiny(), image_feature_dim=7).project_images(torch.randn(4, 3, 8, 8))


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(DGCNN\) needs a `projection` module"):
        CrossPoint(DGCNN(projection_dim=None), Tiny(5))
    model, (view1, view2, images) = _model(), _batch()
    with pytest.raises(ValueError, match="both views must have one shape"):
        model(view1, view2[:, :5], images)
    with pytest.raises(ValueError, match="4 clouds, 3 images"):
        model(view1, view2, images[:3])


def test_config_survives_json():
    config = CrossPointConfig(k=15, image_encoder="resnet18", projection_dim=64, temperature=0.2)
    assert CrossPointConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert CrossPointConfig() == CrossPointConfig("dgcnn", 20, "resnet50", 256, 0.1)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"point_encoder": "pointnet9"},
            r"point_encoder must be one of \['dgcnn', 'dgcnn_part', 'dgcnn_semantic', 'pointnet'\], got 'pointnet9'",
        ),
        ({"image_encoder": "vgg"}, "image_encoder must be one of"),
        ({"image_encoder": "keras:vgg"}, "image_encoder must be one of"),
        ({"image_weights": "imagenet"}, r"image_weights must be one of \['pretrained', 'random'\]"),
        ({"intra_weight": -1.0}, "intra_weight and cross_weight must be numbers from 0 on"),
        ({"intra_weight": 0.0, "cross_weight": 0.0}, "not both 0; got 0.0 and 0.0"),
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"k": 2.5}, "k must be a positive integer, got 2.5"),
        ({"projection_dim": True}, "projection_dim must be a positive integer"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": "warm"}, "temperature must be a positive number, got 'warm'"),
        ({"neighbours": 3}, r"unknown CrossPointConfig keys \['neighbours'\]; known: \['cross_weight'"),
    ],
)
def test_bad_config(values, text):
    with pytest.raises(ValueError, match=text):
        CrossPointConfig.from_dict(values)


def test_build_follows_the_config_and_the_seed():
    config = CrossPointConfig(k=7, image_encoder="resnet18", projection_dim=32, temperature=0.2)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build(config, impl="reference"))
    model = models[0]
    assert model.point_encoder.k == 7 and model.image_encoder.depth == 18
    assert model.criterion.temperature == 0.2
    assert (
        model.point_encoder.projection[3].out_features == model.image_encoder.projection[3].out_features == 32
    )
    assert {model.point_encoder.impl, model.point_encoder.conv1.impl, model.criterion.impl} == {"reference"}
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), models[1].state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({}, 1),
        ({"cross_weight": 0}, 1),
        ({"intra_weight": 0, "freeze_image_encoder": True}, 2),
        ({"point_encoder": "pointnet"}, 1),
        ({"point_encoder": "dgcnn_part"}, 1),
        ({"point_encoder": "dgcnn_semantic"}, 1),
    ],
    ids=str,
)
def test_compiles_as_one_graph(options, views):
    """With its losses, both passes: the same loss, gradients and running statistics."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        config = CrossPointConfig(k=4, image_encoder="resnet18", projection_dim=16, **options)
        model = build(config).double()
        view1, view2, _ = _batch()
        images = torch.randn(B, *[views] * (views > 1), 3, 32, 32, dtype=torch.float64)
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else model
        torch.manual_seed(2)  # of dropout
        loss = run(view1, view2, images).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append({"loss": loss.detach(), **gradients, **dict(model.named_buffers())})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
