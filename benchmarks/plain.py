"""DGCNN as it is usually written in PyTorch: (B, C, N) layout, edge tensors in memory, N x N distances.

The yardstick: tests hold the fused model to it, benchmarks measure against it. `plain_state` turns the fused
model's weights into its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crosspoint.models.heads import classification_head, point_projection_head

__all__ = ["PlainDGCNN", "plain_state"]


class PlainDGCNN(nn.Module):
    """The layers, heads and arguments of `crosspoint.models.DGCNN`, without `lengths`."""

    def __init__(self, k: int = 20, *, projection_dim: int | None = 256, num_classes: int | None = None):
        super().__init__()
        self.k = k
        self.conv1 = _edge_layer(6, 64)
        self.conv2 = _edge_layer(128, 64)
        self.conv3 = _edge_layer(128, 128)
        self.conv4 = _edge_layer(256, 256)
        self.conv5 = nn.Sequential(
            nn.Conv1d(512, 1024, 1, bias=False), nn.BatchNorm1d(1024), nn.LeakyReLU(0.2)
        )
        self.projection = None if projection_dim is None else point_projection_head(2048, projection_dim)
        self.classifier = None if num_classes is None else classification_head(2048, num_classes)

    def forward(self, points: Tensor, *, graphs: Sequence[Tensor] | None = None) -> Tensor:
        """points (B, N, 3), graphs: four (B, N, k) or None -> (B, 2048)."""
        x, stages = points.transpose(1, 2), []
        for i, layer in enumerate((self.conv1, self.conv2, self.conv3, self.conv4)):
            idx = nearest(x, self.k) if graphs is None else graphs[i]
            x = layer(edge_features(x, idx)).max(dim=3).values  # (B, C_i, N)
            stages.append(x)
        x = self.conv5(torch.cat(stages, dim=1))  # (B, 1024, N)
        largest = nn.functional.adaptive_max_pool1d(x, 1).flatten(1)
        mean = nn.functional.adaptive_avg_pool1d(x, 1).flatten(1)
        return torch.cat([largest, mean], dim=1)


def _edge_layer(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2)
    )


@torch.no_grad()
def nearest(x: Tensor, k: int) -> Tensor:
    """(B, C, N) -> (B, N, k), by the expansion |a|^2 - 2ab + |b|^2 that most code uses."""
    norm = x.square().sum(dim=1)
    dist2 = norm.unsqueeze(2) - 2 * x.transpose(1, 2) @ x + norm.unsqueeze(1)
    return dist2.topk(min(k, x.shape[2]), dim=2, largest=False).indices


def edge_features(x: Tensor, idx: Tensor) -> Tensor:
    """(B, C, N), (B, N, k) -> (B, 2C, N, k): cat(x_j - x_i, x_i)."""
    b, c, n = x.shape
    k = idx.shape[2]
    rows = x.transpose(1, 2).reshape(b * n, c)
    first = torch.arange(b, device=x.device).view(b, 1, 1) * n
    neighbours = rows[(idx + first).view(-1)].view(b, n, k, c)
    centre = rows.view(b, n, 1, c).expand(b, n, k, c)
    return torch.cat([neighbours - centre, centre], dim=3).permute(0, 3, 1, 2).contiguous()


def plain_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict (or gradients) of a `crosspoint.models.DGCNN` under PlainDGCNN's names and shapes."""
    plain = {}
    for name, value in state.items():
        if re.fullmatch(r"conv[1-4]\.weight", name):
            value = value[:, :, None, None]
        elif name == "conv5.weight":
            value = value[:, :, None]
        name = re.sub(r"^(conv[1-5])\.weight$", r"\1.0.weight", name)
        name = re.sub(r"^(conv[1-4])\.bn\.", r"\1.1.", name)
        name = re.sub(r"^bn5\.", "conv5.1.", name)
        plain[name] = value
    return plain
