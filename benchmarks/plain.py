"""The operators and models as they are usually written in PyTorch: edge tensors in memory, N x N distances, 2N x 2N
logits.

The yardstick: tests hold the fused models to it, benchmarks measure against it. Layers take (B, N, C) points as the
operators do, and compute in DGCNN's (B, C, N) layout. `plain_state` turns a fused model's weights into those of
these models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosspoint.models import ResNet
from crosspoint.models.heads import classification_head, point_projection_head

__all__ = ["PlainCrossPoint", "PlainDGCNN", "plain_state"]


# ---- layers


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
    rows = x.transpose(1, 2).contiguous()
    neighbours = gathered(rows, idx)
    centre = rows.view(b, n, 1, c).expand(b, n, k, c)
    return torch.cat([neighbours - centre, centre], dim=3).permute(0, 3, 1, 2).contiguous()


def gathered(x: Tensor, idx: Tensor) -> Tensor:
    """(B, N, C), (B, M, k) -> (B, M, k, C): the rows of each neighbour."""
    b, n, c = x.shape
    first = torch.arange(b, device=x.device).view(b, 1, 1) * n
    return x.reshape(b * n, c)[(idx + first).view(-1)].view(*idx.shape, c)


def edge_conv(x: Tensor, idx: Tensor, *layers: Tensor) -> Tensor:
    """(weight, gamma, beta) of one layer on the edges, or of several -> (B, N, C_out)."""
    h = edge_features(x.transpose(1, 2), idx)
    for weight, gamma, beta in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
        h = F.batch_norm(F.conv2d(h, weight[:, :, None, None]), None, None, gamma, beta, training=True)
        h = F.leaky_relu(h, 0.2)
    return h.max(dim=3).values.transpose(1, 2)


def conv_bn_act_pool(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    b, n, _ = x.shape
    h = F.batch_norm(F.linear(x.flatten(0, 1), weight), None, None, gamma, beta, training=True)
    h = F.leaky_relu(h, 0.2, inplace=True).view(b, n, -1)
    return torch.cat([h.max(1).values, h.mean(1)], 1)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    own = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    similarity = (z @ z.t() / temperature).masked_fill(own, -torch.inf)
    return F.cross_entropy(similarity, torch.arange(2 * n, device=z.device).roll(n))


def info_nce(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    similarity = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t() / temperature
    positive = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(similarity, positive) + F.cross_entropy(similarity.t(), positive)) / 2


def sup_con(z: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    z = F.normalize(z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~own
    log_softmax = F.log_softmax((z @ z.t() / temperature).masked_fill(own, -torch.inf), dim=1)
    count = positive.sum(1)
    row_losses = -log_softmax.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
    return row_losses.sum() / (count > 0).sum()


# ---- the same layers, with their products taken over nodes: the best that plain PyTorch can do


def edge_conv_by_nodes(x: Tensor, idx: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """weight = [A | B]: A x_j + (B - A) x_i on an edge, so that only the maximum and the sums see edges."""
    c_in = x.shape[2]
    signed = weight * torch.where(gamma < 0, -1, 1)[:, None]  # the maximum of each channel, never the minimum
    a, b = signed[:, :c_in], signed[:, c_in:]
    neighbour = gathered(x @ a.t(), idx)  # (B, N, k, C_out)
    centre = x @ (b - a).t()
    mean = (neighbour.mean(2) + centre).mean((0, 1))
    centre = centre - mean
    square = neighbour.square().mean(2) + centre * (2 * neighbour.mean(2) + centre)
    scale = gamma.abs() * torch.rsqrt(square.mean((0, 1)) + 1e-5)
    return F.leaky_relu((neighbour.max(2).values + centre) * scale + beta, 0.2)


def nt_xent_by_rows(z1: Tensor, z2: Tensor, temperature: float = 0.1, rows: int = 1024) -> Tensor:
    """Blocks of rows, each computed again in the backward pass: memory for one block."""
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    target = torch.arange(2 * n, device=z.device).roll(n)
    own = torch.arange(2 * n, device=z.device)

    def block(z: Tensor, start: int) -> Tensor:
        part = slice(start, start + rows)
        similarity = (z[part] @ z.t() / temperature).masked_fill(own[part, None] == own, -torch.inf)
        return F.cross_entropy(similarity, target[part], reduction="sum")

    blocks = [checkpoint(block, z, start, use_reentrant=False) for start in range(0, 2 * n, rows)]
    return torch.stack(blocks).sum() / (2 * n)


# ---- models


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


class PlainOutput(NamedTuple):
    """As `crosspoint.models.CrossPointOutput`."""

    loss: Tensor
    intra_modal: Tensor
    cross_modal: Tensor


class PlainCrossPoint(nn.Module):
    """`crosspoint.models.CrossPoint` of a DGCNN and a ResNet, without `lengths`. The ResNet is the same in both."""

    def __init__(self, k: int = 20, depth: int = 50, *, projection_dim: int = 256, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature
        self.point_encoder = PlainDGCNN(k, projection_dim=projection_dim)
        self.image_encoder = ResNet(depth, projection_dim=projection_dim)

    def forward(self, view1: Tensor, view2: Tensor, images: Tensor) -> PlainOutput:
        """Both views (B, N, 3) in one batch; their mean, neither normalised nor detached, against (B, 3, H, W)."""
        z1, z2 = self.point_encoder.projection(self.point_encoder(torch.cat([view1, view2]))).chunk(2)
        z_image = self.image_encoder.projection(self.image_encoder(images))
        intra_modal = nt_xent(z1, z2, self.temperature)
        cross_modal = nt_xent((z1 + z2) / 2, z_image, self.temperature)
        return PlainOutput(intra_modal + cross_modal, intra_modal, cross_modal)


def plain_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict (or gradients) of a DGCNN or CrossPoint under the names and shapes of its plain counterpart."""
    plain = {}
    for name, value in state.items():
        if not name.startswith("image_encoder."):
            if re.search(r"\bconv[1-4]\.weight$", name):
                value = value[:, :, None, None]
            elif name.endswith("conv5.weight"):
                value = value[:, :, None]
            name = re.sub(r"\b(conv[1-5])\.weight$", r"\1.0.weight", name)
            name = re.sub(r"\b(conv[1-4])\.bn\.", r"\1.1.", name)
            name = re.sub(r"\bbn5\.", "conv5.1.", name)
        plain[name] = value
    return plain
