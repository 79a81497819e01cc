"""DGCNN for part segmentation in plain layers under the names of the published weights, for comparison."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.plain import edge_features, nearest


def _layer(norm: nn.Module, convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, norm, nn.LeakyReLU(0.2))


def _on_edges(norm: nn.Module, c_in: int) -> nn.Sequential:
    return _layer(norm, nn.Conv2d(c_in, norm.num_features, 1, bias=False))


def _on_points(norm: nn.Module, c_in: int) -> nn.Sequential:
    return _layer(norm, nn.Conv1d(c_in, norm.num_features, 1, bias=False))


class PlainTransformNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(64), nn.BatchNorm2d(128)
        self.conv1 = _on_edges(self.bn1, 6)
        self.conv2 = _on_edges(self.bn2, 64)
        self.conv3 = _on_points(nn.BatchNorm1d(1024), 128)
        self.linear1, self.bn3 = nn.Linear(1024, 512, bias=False), nn.BatchNorm1d(512)
        self.linear2, self.bn4 = nn.Linear(512, 256, bias=False), nn.BatchNorm1d(256)
        self.transform = nn.Linear(256, 9)

    def forward(self, edges):  # (B, 6, N, k)
        x = self.conv3(self.conv2(self.conv1(edges)).amax(3)).amax(2)
        for linear, norm in ((self.linear1, self.bn3), (self.linear2, self.bn4)):
            x = nn.functional.leaky_relu(norm(linear(x)), 0.2)
        return self.transform(x).view(-1, 3, 3)


class PlainPartSegmentation(nn.Module):
    """`forward` gives the logits (B, parts, N), `encode` the feature (B, 1024)."""

    def __init__(self, k: int, parts: int | None, categories: int = 16):
        super().__init__()
        self.k, self.categories = k, categories
        self.transform_net = PlainTransformNet()
        for i, (c_in, c_out) in enumerate(((6, 64), (64, 64), (128, 64), (64, 64), (128, 64)), 1):
            setattr(self, f"bn{i}", nn.BatchNorm2d(c_out))
            setattr(self, f"conv{i}", _on_edges(getattr(self, f"bn{i}"), c_in))
        self.bn6 = nn.BatchNorm1d(1024)
        self.conv6 = _on_points(self.bn6, 192)
        widths = {7: (categories, 64), 8: (1280, 256), 9: (256, 256), 10: (256, 128)}
        for i, (c_in, c_out) in widths.items():
            setattr(self, f"bn{i}", nn.BatchNorm1d(c_out))
            if parts is not None:
                setattr(self, f"conv{i}", _on_points(getattr(self, f"bn{i}"), c_in))
        if parts is not None:
            self.conv11 = nn.Conv1d(128, parts, 1, bias=False)
        self.inv_head = nn.Sequential(
            nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 256)
        )

    def _edges(self, x, idx):
        return edge_features(x, nearest(x, self.k) if idx is None else idx)

    def _local(self, points, graphs):
        graphs = iter([None] * 4 if graphs is None else graphs)
        x = points.transpose(1, 2)
        x = (points @ self.transform_net(self._edges(x, next(graphs)))).transpose(1, 2)
        x1 = self.conv2(self.conv1(self._edges(x, next(graphs)))).amax(3)
        x2 = self.conv4(self.conv3(self._edges(x1, next(graphs)))).amax(3)
        x3 = self.conv5(self._edges(x2, next(graphs))).amax(3)
        return torch.cat([x1, x2, x3], 1)

    def encode(self, points, graphs=None):
        return self.conv6(self._local(points, graphs)).amax(2)

    def forward(self, points, categories, graphs=None):
        local = self._local(points, graphs)
        feature = self.conv6(local).amax(2, keepdim=True)
        known = nn.functional.one_hot(categories, self.categories).to(points.dtype)[:, :, None]
        x = torch.cat([feature, self.conv7(known)], 1).expand(-1, -1, points.shape[1])
        return self.conv11(self.conv10(self.conv9(self.conv8(torch.cat([x, local], 1)))))
