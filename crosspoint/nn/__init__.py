"""The operators as modules: edge convolutions and the contrastive losses."""

from crosspoint.nn.edge_conv import DynamicEdgeConv, EdgeConv, EdgeConv2, norm_arguments
from crosspoint.nn.nt_xent import NTXentLoss, SupConLoss
from crosspoint.nn.shared_linear import SharedLinear

__all__ = [
    "DynamicEdgeConv",
    "EdgeConv",
    "EdgeConv2",
    "NTXentLoss",
    "SharedLinear",
    "SupConLoss",
    "norm_arguments",
]
