"""Activation checkpointing: the same step on fewer saved bytes."""

import copy

import pytest
import torch
from torch import nn

from crosspoint import models
from crosspoint.models.blocks import _repeated, checkpoint_activations
from crosspoint.models.resnet import _BasicBlock
from crosspoint.train.cached import cached_backward
from tiny_run import TinyImageEncoder

POINTS = {
    "dgcnn": lambda: models.DGCNN(4, projection_dim=6),
    "dgcnn_part": lambda: models.DGCNNPart(4, projection_dim=6),
    "pointnet": lambda: models.PointNet(projection_dim=6),
}


class Residual(nn.Module):
    """Two of ResNet's blocks."""

    feature_dim = 16

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4, stride=4)
        self.layer1 = nn.Sequential(_BasicBlock(8, 8, 1), _BasicBlock(8, 16, 2))

    def forward(self, images):
        return self.layer1(self.first(images)).mean((2, 3))


class Attention(nn.Module):
    """Blocks in a list, with dropout, as vision transformers have them."""

    feature_dim = 12

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 8, stride=8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(12, 2, 24, dropout=0.3, batch_first=True) for _ in range(2)
        )

    def forward(self, images):
        x = self.first(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def model(points: str, images: type[nn.Module], **options) -> models.CrossPoint:
    torch.manual_seed(0)
    return models.CrossPoint(POINTS[points](), images(), **options).double()


def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 20, 3), (4, 20, 3), (4, 3, 16, 16))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def step(model: models.CrossPoint) -> tuple[dict[str, torch.Tensor], int]:
    """Losses, gradients, statistics, the next random number; and the bytes that the forward pass saved, without the
    product of global pooling, of which a GPU keeps a bit of each value."""
    saved = {}

    def note(tensor):
        if tensor.shape != (8, 20, 1024):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(*batch())
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    size = sum(nbytes for place, nbytes in saved.items() if place not in weights)
    output.loss.backward()
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b for n, b in model.named_buffers()}
    return {"loss": output.loss.detach(), "next": torch.rand(3), **found}, size


@pytest.mark.parametrize(
    "points, images, options, most",
    [
        ("dgcnn", Residual, {}, 0.5),
        ("dgcnn_part", Attention, {}, 0.7),
        ("pointnet", TinyImageEncoder, {}, 0.6),  # no blocks, but dropout
        ("pointnet", Residual, {"freeze_image_encoder": True}, 0.6),
        ("pointnet", TinyImageEncoder, {"cross_weight": 0.0}, 0.6),
    ],
)
def test_same_step_on_fewer_bytes(points, images, options, most):
    expected, plain = step(model(points, images, **options))
    found, size = step(checkpoint_activations(model(points, images, **options)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert size < most * plain


def test_in_parts():
    """With embedding caching, of whose two passes only the second keeps anything."""
    results = []
    for change in (lambda m: m, checkpoint_activations):
        m = change(model("pointnet", TinyImageEncoder))
        torch.manual_seed(2)
        loss = cached_backward(m, *batch(), parts=2).loss
        results.append([loss, *(p.grad for p in m.parameters()), *m.buffers(), torch.rand(3)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_copy_is_its_own():
    original = checkpoint_activations(checkpoint_activations(model("dgcnn", Residual)))
    copied = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    step(copied)
    assert all(parameter.grad is None for parameter in original.parameters())
    assert all(parameter.grad is not None for parameter in copied.parameters())
    statistics = zip(original.buffers(), copied.buffers(), strict=True)
    assert not any(torch.equal(*pair) for pair in statistics)


def test_blocks_of_a_resnet():
    with torch.device("meta"):
        encoder = models.resnet50()
    names = {module: name for name, module in encoder.named_modules()}
    found = [names[block] for block in _repeated(encoder)]
    assert len(found) == 16 and found[0] == "layer1.0" and found[-1] == "layer4.2"


def test_blocks_of_stages():
    """As timm has them: a list of modules that have a list of blocks."""

    class TinyStage(nn.Module):
        def __init__(self):
            super().__init__()
            self.downsample = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
            self.blocks = nn.Sequential(_BasicBlock(8, 8, 1), _BasicBlock(8, 8, 1))

    encoder = nn.Sequential(TinyStage(), TinyStage())
    assert [type(block) for block in _repeated(encoder)] == [_BasicBlock] * 4
