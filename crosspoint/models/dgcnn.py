"""DGCNN, the classification encoder (arXiv 1801.07829), on the fused operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crosspoint.models.heads import classification_head, point_projection_head
from crosspoint.models.inputs import check_points
from crosspoint.nn import EdgeConv, norm_arguments
from crosspoint.ops import conv_bn_act_pool, knn_graph

__all__ = ["DGCNN"]


class DGCNN(nn.Module):
    """Four edge convolutions, each on the k-NN graph of its input, then a shared layer and global pooling.

    Every tensor inside is (B, N, C). The 2048-d feature is the global maximum and the global mean of the last
    layer, side by side. `forward` returns the feature; the heads are applied by whoever needs them:
    `model.projection(model(points))`, `model.classifier(model(points))`.

    Args:
        k: neighbours, the point itself included. A cloud with fewer points uses all of them.
        projection_dim: width of `projection`, CrossPoint's head; None leaves the head out.
        num_classes: classes of `classifier`; None leaves it out.
        impl: backend of the operators.

    617,856 parameters in the encoder, 2,980,480 with the projection head.
    """

    feature_dim = 2048

    def __init__(
        self,
        k: int = 20,
        *,
        projection_dim: int | None = 256,
        num_classes: int | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be positive, got {k}")
        self.k = k
        self.projection_dim = projection_dim
        self.impl = impl
        self.conv1 = EdgeConv(3, 64, impl=impl)
        self.conv2 = EdgeConv(64, 64, impl=impl)
        self.conv3 = EdgeConv(64, 128, impl=impl)
        self.conv4 = EdgeConv(128, 256, impl=impl)
        self.conv5 = nn.Linear(512, 1024, bias=False)
        self.bn5 = nn.BatchNorm1d(1024)
        self.projection = None if projection_dim is None else point_projection_head(2048, projection_dim)
        self.classifier = None if num_classes is None else classification_head(2048, num_classes)

    def forward(
        self,
        points: Tensor,
        lengths: Tensor | None = None,
        *,
        graphs: Sequence[Tensor] | None = None,
        return_graphs: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode clouds.

        Args:
            points: (B, N, 3), floating point.
            lengths: (B,) integers: the rows from lengths[b] on are padding. Padding may hold anything: it
                reaches no neighbourhood, no statistic, no pooling and no gradient. A cloud of no points
                has feature 0.
            graphs: four (B, N, k) int64 neighbour lists to use in place of the k-NN graphs.
            return_graphs: also return the list of the four graphs that were used.

        Returns:
            (B, 2048) features, or (features, graphs).
        """
        check_points(points, lengths)
        convs = (self.conv1, self.conv2, self.conv3, self.conv4)
        if graphs is not None and len(graphs) != len(convs):
            raise ValueError(f"graphs must hold {len(convs)} neighbour lists, got {len(graphs)}")

        x, stages, used = points, [], []
        for i, conv in enumerate(convs):
            idx = knn_graph(x, self.k, lengths=lengths, impl=self.impl) if graphs is None else graphs[i]
            x = conv(x, idx)  # (B, N, C_i)
            stages.append(x)
            used.append(idx)
        feature = self._pool(torch.cat(stages, dim=2), lengths)
        return (feature, used) if return_graphs else feature

    def _pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """conv5 and global pooling: (B, N, 512) -> (B, 2048)."""
        return conv_bn_act_pool(
            x,
            self.conv5.weight,
            **norm_arguments(self.bn5),
            lengths=lengths,
            negative_slope=0.2,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, impl={self.impl!r}"
