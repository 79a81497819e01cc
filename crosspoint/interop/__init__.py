"""Other packages' calls, computed by this package's operators.

| their call | here |
|---|---|
| `torch_geometric.nn.knn_graph`, `knn`, `EdgeConv`, `DynamicEdgeConv` | `crosspoint.interop.pyg` |
| `knn`, `get_graph_feature` and whole models of DGCNN code on (B, C, N) | `crosspoint.interop.dgcnn`, `fuse` |
| `pytorch3d.ops.knn_points`, `knn_gather` | `crosspoint.interop.pytorch3d` |
| `pointops.knn_query` (Pointcept) | `crosspoint.interop.pointcept` |
| `lightly.loss.NTXentLoss` | `crosspoint.interop.lightly` |
| `pytorch_metric_learning.losses.NTXentLoss`, `SelfSupervisedLoss` | `crosspoint.interop.pytorch_metric_learning` |

No module here imports the package it is named after. What a call cannot do exactly as there, it refuses by name.
"""

from crosspoint.interop.dgcnn import CannotFuse, fuse

__all__ = ["CannotFuse", "fuse"]
