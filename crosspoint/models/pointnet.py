"""PointNet (arXiv 1612.00593) as CrossPoint uses it: shared layers and a global maximum, without T-Nets."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from crosspoint.models.heads import classification_head, point_projection_head
from crosspoint.models.inputs import check_points
from crosspoint.nn import SharedLinear

__all__ = ["PointNet"]


class PointNet(nn.Module):
    """Five shared layers (linear map without bias, batch norm, ReLU) and the maximum over the points.

    `forward` returns the 1024-d feature; the heads are applied by whoever needs them:
    `model.projection(model(points))`, `model.classifier(model(points))`.

    Args:
        projection_dim: width of `projection`, CrossPoint's head; None leaves the head out.
        num_classes: classes of `classifier`; None leaves it out.
        impl: backend of the operators.

    150,336 parameters in the encoder, 1,464,384 with the projection head.
    """

    feature_dim = 1024

    def __init__(
        self, *, projection_dim: int | None = 256, num_classes: int | None = None, impl: str = "auto"
    ):
        super().__init__()
        self.projection_dim = projection_dim
        widths = (3, 64, 64, 64, 128, 1024)
        self.layers = nn.ModuleList(
            SharedLinear(c_in, c_out, negative_slope=0.0, impl=impl)
            for c_in, c_out in itertools.pairwise(widths)
        )
        self.projection = None if projection_dim is None else point_projection_head(1024, projection_dim)
        self.classifier = None if num_classes is None else classification_head(1024, num_classes)

    def forward(self, points: Tensor, lengths: Tensor | None = None) -> Tensor:
        """points (B, N, 3) -> (B, 1024); rows from lengths[b] on are padding and may hold anything."""
        check_points(points, lengths)
        x = points
        for layer in self.layers[:-1]:
            x = layer(x, lengths)
        return self.layers[-1].pool(x, lengths)[:, :1024]
