"""The operators as modules: edge convolutions and the contrastive losses."""

from crosspoint.nn.edge_conv import DynamicEdgeConv, EdgeConv, EdgeConv2, norm_arguments
from crosspoint.nn.nt_xent import NTXentLoss, SupConLoss

__all__ = ["DynamicEdgeConv", "EdgeConv", "EdgeConv2", "NTXentLoss", "SupConLoss", "norm_arguments"]
