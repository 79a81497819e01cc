"""DGCNN for segmentation (arXiv 1801.07829): parts of an object, and classes of a room's points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspoint.models.heads import point_projection_head
from crosspoint.models.inputs import check_points
from crosspoint.nn import EdgeConv, EdgeConv2, SharedLinear
from crosspoint.nn.shared_linear import valid_rows
from crosspoint.ops import knn_graph

__all__ = ["DGCNNPart", "DGCNNSemantic", "TransformNet"]

LOCAL = 192  # channels of the three edge convolutions' outputs, side by side
GLOBAL = 1024


class TransformNet(nn.Module):
    """The T-Net: clouds (B, N, 3) on their k-NN graphs -> one 3 x 3 matrix each, the identity at first."""

    def __init__(self, *, impl: str = "auto"):
        super().__init__()
        self.conv1 = EdgeConv2(3, 64, 128, impl=impl)
        self.conv2 = SharedLinear(128, GLOBAL, impl=impl)
        self.linear1 = nn.Linear(GLOBAL, 512, bias=False)
        self.bn1 = nn.BatchNorm1d(512)
        self.linear2 = nn.Linear(512, 256, bias=False)
        self.bn2 = nn.BatchNorm1d(256)
        self.transform = nn.Linear(256, 9)
        nn.init.zeros_(self.transform.weight)
        with torch.no_grad():
            self.transform.bias.copy_(torch.eye(3).flatten())

    def forward(self, points: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
        """points (B, N, 3), idx (B, N, k) -> (B, 3, 3); transformed clouds are points @ matrix."""
        x = self.conv2.pool(self.conv1(points, idx), lengths)[:, :GLOBAL]  # (B, 1024)
        x = F.leaky_relu(self.bn1(self.linear1(x)), 0.2)
        x = F.leaky_relu(self.bn2(self.linear2(x)), 0.2)
        return self.transform(x).view(-1, 3, 3)


class _SegmentationDGCNN(nn.Module):
    """Three edge convolutions, the first two of two layers, a shared layer over all three, and the maximum."""

    feature_dim = GLOBAL

    def __init__(self, in_channels: int, k: int, projection_dim: int | None, impl: str):
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be positive, got {k}")
        self.k = k
        self.in_channels = in_channels
        self.projection_dim = projection_dim
        self.impl = impl
        self.conv1 = EdgeConv2(in_channels, 64, 64, impl=impl)
        self.conv2 = EdgeConv2(64, 64, 64, impl=impl)
        self.conv3 = EdgeConv(64, 64, impl=impl)
        self.conv4 = SharedLinear(LOCAL, GLOBAL, impl=impl)
        self.projection = None if projection_dim is None else point_projection_head(GLOBAL, projection_dim)

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
            points: (B, N, in_channels), floating point.
            lengths: (B,) integers: the rows from lengths[b] on are padding, which may hold anything.
            graphs: the (B, N, k) int64 neighbour lists to use in place of the k-NN graphs.
            return_graphs: also return those that were used.

        Returns:
            (B, 1024) features, or (features, graphs).
        """
        feature, _, used = self._encode(points, lengths, graphs)
        return (feature, used) if return_graphs else feature

    def _graph(
        self, x: Tensor, lengths: Tensor | None, graphs: Sequence[Tensor] | None, used: list
    ) -> Tensor:
        given = None if graphs is None else graphs[len(used)]
        used.append(knn_graph(x, self.k, lengths=lengths, impl=self.impl) if given is None else given)
        return used[-1]

    def _encode(
        self, points: Tensor, lengths: Tensor | None, graphs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The feature (B, 1024), the points' own features (B, N, 192), and the graphs."""
        check_points(points, lengths, self.in_channels)
        if graphs is not None and len(graphs) != self.graph_count:
            raise ValueError(f"graphs must hold {self.graph_count} neighbour lists, got {len(graphs)}")
        used: list[Tensor] = []
        x, idx = self._first(points, lengths, graphs, used)
        x1 = self.conv1(x, idx)
        x2 = self.conv2(x1, self._graph(x1, lengths, graphs, used))
        x3 = self.conv3(x2, self._graph(x2, lengths, graphs, used))
        local = torch.cat([x1, x2, x3], 2)
        return self.conv4.pool(local, lengths)[:, :GLOBAL], local, used

    def extra_repr(self) -> str:
        return f"k={self.k}, impl={self.impl!r}"


class _SharedHead(nn.Module):
    """A shared layer over [what is the same for all points of a cloud, what is each point's own].

    Equal to the layer on their concatenation, of which nothing is stored: the first part is multiplied once a cloud.
    """

    def __init__(self, shared_channels: int, own_channels: int, out_channels: int):
        super().__init__()
        self.shared_channels = shared_channels
        self.layer = SharedLinear(shared_channels + own_channels, out_channels)

    def forward(self, shared: Tensor, own: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, C_shared), (B, N, C_own) -> (B, N, C_out)."""
        weight = self.layer.weight
        valid = None if lengths is None else valid_rows(own, lengths)
        if valid is not None:
            own = torch.where(valid, own, 0)
        h = F.linear(own, weight[:, self.shared_channels :])
        h = h + F.linear(shared, weight[:, : self.shared_channels])[:, None]
        return self.layer.normalise(h, valid)


class DGCNNPart(_SegmentationDGCNN):
    """DGCNN for part segmentation: a T-Net on the points, then the encoder; per-point parts by `segment`.

    `forward` returns the 1024-d feature; `model.projection(model(points))` is CrossPoint's projection.

    Args:
        k: neighbours, the point itself included (15 in pre-training, 40 in fine-tuning).
        projection_dim: width of `projection`, CrossPoint's head; None leaves it out.
        num_parts: parts over all categories, for `segment`; None leaves the segmentation head out.
        num_categories: object categories that `segment` is told.
        impl: backend of the operators.

    1,025,545 parameters in the encoder, 2,339,593 with the projection head.
    """

    graph_count = 4

    def __init__(
        self,
        k: int = 40,
        *,
        projection_dim: int | None = 256,
        num_parts: int | None = None,
        num_categories: int = 16,
        impl: str = "auto",
    ):
        super().__init__(3, k, projection_dim, impl)
        self.transform_net = TransformNet(impl=impl)
        self.num_parts, self.num_categories = num_parts, num_categories
        if num_parts is not None:
            self.category = SharedLinear(num_categories, 64)
            self.head = _SharedHead(GLOBAL + 64, LOCAL, 256)
            self.layers = nn.ModuleList([SharedLinear(256, 256), SharedLinear(256, 128)])
            self.dropout = nn.Dropout(0.5)
            self.parts = nn.Linear(128, num_parts, bias=False)

    def _first(self, points, lengths, graphs, used):
        if lengths is not None:  # NaN in padding times a zero gradient would be NaN
            points = torch.where(valid_rows(points, lengths), points, 0)
        idx = self._graph(points, lengths, graphs, used)
        x = points @ self.transform_net(points, idx, lengths)
        return x, self._graph(x, lengths, graphs, used)

    def segment(
        self,
        points: Tensor,
        categories: Tensor,
        lengths: Tensor | None = None,
        *,
        graphs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Logits of every point's part.

        Args:
            points: (B, N, 3).
            categories: (B,) int64, each object's category.
            lengths, graphs: as for `forward`.

        Returns:
            (B, N, num_parts); of rows past `lengths`, of no meaning.

        Raises ValueError without a segmentation head, and for categories of another shape.
        """
        if self.num_parts is None:
            raise ValueError("this model has no segmentation head: make it with num_parts=")
        if categories.shape != points.shape[:1] or categories.dtype != torch.int64:
            raise ValueError(
                f"categories must be ({points.shape[0]},) int64, one for each cloud; got "
                f"{tuple(categories.shape)} {categories.dtype}"
            )
        feature, local, _ = self._encode(points, lengths, graphs)
        known = F.one_hot(categories, self.num_categories).to(feature.dtype)
        known = self.category(known[:, None])[:, 0]  # (B, 64)
        first, second = self.layers
        x = self.dropout(self.head(torch.cat([feature, known], 1), local, lengths))
        x = self.dropout(first(x, lengths))
        return self.parts(second(x, lengths))


class DGCNNSemantic(_SegmentationDGCNN):
    """DGCNN for semantic segmentation of rooms: nine channels a point, per-point classes by `segment`.

    The first graph is of the last three channels, the position in the room; the others are of features.

    Args:
        k: neighbours, the point itself included.
        in_channels: 9: position in the block, colour, position in the room (S3DIS).
        projection_dim: width of `projection`, CrossPoint's head; None leaves it out.
        num_classes: classes of the points, for `segment`; None leaves the segmentation head out.
        impl: backend of the operators.
    """

    graph_count = 3

    def __init__(
        self,
        k: int = 20,
        *,
        in_channels: int = 9,
        projection_dim: int | None = 256,
        num_classes: int | None = None,
        impl: str = "auto",
    ):
        if in_channels < 3:
            raise ValueError(f"in_channels must be at least 3 (a position), got {in_channels}")
        super().__init__(in_channels, k, projection_dim, impl)
        self.num_classes = num_classes
        if num_classes is not None:
            self.head = _SharedHead(GLOBAL, LOCAL, 512)
            self.layer = SharedLinear(512, 256)
            self.dropout = nn.Dropout(0.5)
            self.classes = nn.Linear(256, num_classes, bias=False)

    def _first(self, points, lengths, graphs, used):
        return points, self._graph(points[:, :, -3:].contiguous(), lengths, graphs, used)

    def segment(
        self, points: Tensor, lengths: Tensor | None = None, *, graphs: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Logits (B, N, num_classes) of every point of points (B, N, in_channels); arguments as for `forward`."""
        if self.num_classes is None:
            raise ValueError("this model has no segmentation head: make it with num_classes=")
        feature, local, _ = self._encode(points, lengths, graphs)
        x = self.layer(self.head(feature, local, lengths), lengths)
        return self.classes(self.dropout(x))
