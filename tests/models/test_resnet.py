import math

import pytest
import torch
from torch.nn import functional as F

from crosspoint.models import ResNet, resnet18, resnet50

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _torchvision_shapes(depth):
    """Names and shapes of torchvision's state dict, fc left out."""
    shapes = {}

    def conv(name, out_channels, in_channels, size):
        shapes[f"{name}.weight"] = (out_channels, in_channels, size, size)

    def norm(name, channels):
        shapes.update({f"{name}.{key}": (channels,) for key in NORM[:4]})
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    channels = 64
    for stage, count in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        out_channels = width if depth == 18 else 4 * width
        for i in range(count):
            block = f"layer{stage + 1}.{i}"
            if depth == 18:
                layers = [(width, channels, 3), (width, width, 3)]
            else:
                layers = [(width, channels, 1), (width, width, 3), (out_channels, width, 1)]
            for j, layer in enumerate(layers):
                conv(f"{block}.conv{j + 1}", *layer)
                norm(f"{block}.bn{j + 1}", layer[0])
            if i == 0 and (stage > 0 or depth == 50):
                conv(f"{block}.downsample.0", out_channels, channels, 1)
                norm(f"{block}.downsample.1", out_channels)
            channels = out_channels
    return shapes


@pytest.mark.parametrize("depth", [18, 50])
def test_names_and_shapes_are_torchvisions(depth):
    state = ResNet(depth, projection_dim=None).state_dict()
    expected = _torchvision_shapes(depth)
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert [*state] == [*expected]
    assert len(state) == {18: 120, 50: 318}[depth]


def _count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "encoder", "width"), [(resnet18, 11_176_512, 512), (resnet50, 23_508_032, 2048)]
)
def test_parameter_counts(make, encoder, width):
    model = make()
    assert model.feature_dim == width
    assert _count(model) - _count(model.projection) == encoder
    assert _count(model.projection) == width * 512 + 2 * 512 + 512 * 256
    assert [type(layer).__name__ for layer in model.projection] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert _count(make(projection_dim=None)) == encoder


def _functional(state, depth, x):
    """ResNet in evaluation mode, written out over a state dict."""

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    x = F.max_pool2d(norm(conv(x, "conv1", 2), "bn1").relu(), 3, 2, 1)
    last, strided = (2, 1) if depth == 18 else (3, 2)
    for stage, count in enumerate(BLOCKS[depth]):
        for i in range(count):
            block, shortcut = f"layer{stage + 1}.{i}", x
            stride = 2 if i == 0 and stage > 0 else 1
            for j in range(1, last + 1):
                x = norm(conv(x, f"{block}.conv{j}", stride if j == strided else 1), f"{block}.bn{j}")
                x = x.relu() if j < last else x
            if f"{block}.downsample.0.weight" in state:
                shortcut = norm(conv(shortcut, f"{block}.downsample.0", stride), f"{block}.downsample.1")
            x = (x + shortcut).relu()
    return x.mean(dim=(2, 3))


@pytest.mark.parametrize("depth", [18, 50])
def test_forward(depth):
    torch.manual_seed(depth)
    model = ResNet(depth).eval()
    for name, value in model.state_dict().items():
        if "running_mean" in name or name.endswith("bias"):
            value.normal_(std=0.1)
        elif "running_var" in name:
            value.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        feature = model(images)
        expected = _functional(model.state_dict(), depth, images)
    assert feature.shape == (2, model.feature_dim)
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_starts_as_torchvision_does():
    torch.manual_seed(0)
    state = resnet50().state_dict()
    for name, fan_out in (
        ("conv1", 64 * 49),
        ("layer1.0.conv2", 64 * 9),
        ("layer3.0.downsample.0", 1024),
        ("layer4.2.conv3", 2048),
    ):
        weight = state[f"{name}.weight"]
        assert float(weight.std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.03), name
        assert abs(float(weight.mean())) < 0.05 * float(weight.std()), name
    assert (state["layer2.1.bn3.weight"] == 1).all() and not state["layer2.1.bn3.bias"].any()


def test_every_parameter_gets_a_gradient():
    model = resnet18()
    model.projection(model(torch.randn(2, 3, 32, 32))).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_bad_input():
    with pytest.raises(ValueError, match=r"depth must be one of \[18, 50\], got 34"):
        ResNet(34)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(3, 8, 8\)"):
        resnet18()(torch.randn(3, 8, 8))
