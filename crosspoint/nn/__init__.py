"""The operators as modules: edge convolutions and the contrastive losses."""

from crosspoint.nn.edge_conv import DynamicEdgeConv, EdgeConv, norm_arguments
from crosspoint.nn.nt_xent import NTXentLoss, SupConLoss

__all__ = ["DynamicEdgeConv", "EdgeConv", "NTXentLoss", "SupConLoss", "norm_arguments"]
