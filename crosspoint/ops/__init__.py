"""The operators: graphs, convolutions and sums over them, pooling, contrastive losses."""

from crosspoint.ops._dispatch import BackendRow, describe_backends
from crosspoint.ops._explain import Explanation, explain
from crosspoint.ops.conv_bn_act_pool import conv_bn_act_pool
from crosspoint.ops.edge_conv import edge_conv
from crosspoint.ops.edge_conv2 import edge_conv2
from crosspoint.ops.gather_max import gather_max
from crosspoint.ops.knn import knn, knn_graph
from crosspoint.ops.neighbor_sum import neighbor_sum
from crosspoint.ops.nt_xent import info_nce, nt_xent
from crosspoint.ops.sup_con import sup_con

__all__ = [
    "BackendRow",
    "Explanation",
    "conv_bn_act_pool",
    "describe_backends",
    "edge_conv",
    "edge_conv2",
    "explain",
    "gather_max",
    "info_nce",
    "knn",
    "knn_graph",
    "neighbor_sum",
    "nt_xent",
    "sup_con",
]
