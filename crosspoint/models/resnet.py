"""ResNet-18 and ResNet-50 (arXiv 1512.03385) under torchvision's parameter names, without the classifier."""

from __future__ import annotations

from torch import Tensor, nn

from crosspoint.models.heads import image_projection_head

__all__ = ["ResNet", "resnet18", "resnet50"]


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class _Block(nn.Module):
    """Residual block: subclasses make the layers, `downsample` (or None) and `residual`."""

    expansion: int

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.residual(x) + shortcut)


class _BasicBlock(_Block):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, width, stride)

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class _Bottleneck(_Block):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        # torchvision's variant: the 3x3 convolution carries the stride
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * 4, 1)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, width * 4, stride)

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


_ARCHITECTURES = {18: (_BasicBlock, (2, 2, 2, 2)), 50: (_Bottleneck, (3, 4, 6, 3))}


class ResNet(nn.Module):
    """Image encoder: (B, 3, H, W) floats -> (B, feature_dim), the average-pooled feature.

    Args:
        depth: 18 (`feature_dim` 512) or 50 (2048).
        projection_dim: width of `projection`, CrossPoint's head for images; None leaves the head out.

    The encoder's state dict has torchvision's names and shapes (without `fc`), and its initialisation.
    """

    def __init__(self, depth: int, *, projection_dim: int | None = 256):
        super().__init__()
        if depth not in _ARCHITECTURES:
            raise ValueError(f"depth must be one of {sorted(_ARCHITECTURES)}, got {depth}")
        block, counts = _ARCHITECTURES[depth]
        self.depth = depth
        self.feature_dim = 512 * block.expansion

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, count in enumerate(counts):
            width = 64 << stage
            blocks = []
            for i in range(count):
                blocks.append(block(channels, width, stride=2 if i == 0 and stage > 0 else 1))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.projection = (
            None if projection_dim is None else image_projection_head(self.feature_dim, projection_dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


def resnet18(*, projection_dim: int | None = 256) -> ResNet:
    """ResNet-18: 11,176,512 parameters in the encoder, a 512-d feature."""
    return ResNet(18, projection_dim=projection_dim)


def resnet50(*, projection_dim: int | None = 256) -> ResNet:
    """ResNet-50: 23,508,032 parameters in the encoder, a 2048-d feature."""
    return ResNet(50, projection_dim=projection_dim)
