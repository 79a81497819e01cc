import pytest
import torch
from torch import nn

from crosspoint.models import PointNet


def _count(module):
    return sum(p.numel() for p in module.parameters())


def _plain(model):
    """The layers of PyTorch that the encoder is made of, with its weights."""
    layers = []
    for layer in model.layers:
        conv = nn.Conv1d(*layer.weight.shape[::-1], 1, bias=False).double()
        conv.weight.data = layer.weight.data[:, :, None].clone()
        bn = nn.BatchNorm1d(len(layer.weight)).double()
        bn.load_state_dict(layer.bn.state_dict())
        layers += [conv, bn, nn.ReLU()]
    return nn.Sequential(*layers)


def _model():
    torch.manual_seed(0)
    model = PointNet(num_classes=4).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.bn.weight.uniform_(-1.5, 1.5)
            layer.bn.bias.normal_()
            layer.bn.running_mean.normal_()
    return model


def test_parameter_counts():
    assert _count(PointNet(projection_dim=None)) == 150_336
    assert _count(PointNet()) == 1_464_384


@pytest.mark.parametrize("training", [True, False])
def test_equals_plain_layers(training):
    model = _model().train(training)
    plain = _plain(model).train(training)
    x = torch.randn(3, 17, 3, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    feature, expected = model(x), plain(y.transpose(1, 2)).amax(2)
    torch.testing.assert_close(feature, expected, rtol=1e-9, atol=1e-12)
    g = torch.randn_like(feature)
    (feature * g).sum().backward()
    (expected * g).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-11)
    for layer, bn in zip(model.layers, plain[1::3], strict=True):
        torch.testing.assert_close(layer.bn.running_var, bn.running_var, rtol=1e-9, atol=1e-12)
        assert layer.bn.num_batches_tracked == bn.num_batches_tracked


@pytest.mark.parametrize("training", [True, False])
def test_padding_reaches_nothing(training):
    model, alone = _model().train(training), _model().train(training)
    clouds = torch.randn(2, 9, 3).double()
    padded = torch.full((2, 12, 3), float("nan")).double()
    padded[:, :9] = clouds
    padded.requires_grad_()
    clouds.requires_grad_()
    a, b = model(padded, torch.tensor([9, 9])), alone(clouds)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(padded.grad[:, :9], clouds.grad, rtol=1e-8, atol=1e-10)
    assert not padded.grad[:, 9:].any()


def test_heads_and_errors():
    model = PointNet(num_classes=4)
    feature = model(torch.randn(2, 8, 3))
    assert feature.shape == (2, model.feature_dim)
    assert model.projection(feature).shape == (2, 256) and model.classifier(feature).shape == (2, 4)
    with pytest.raises(ValueError, match=r"points must be \(B, N, 3\)"):
        model(torch.randn(2, 3, 8))
