"""The operators as modules: edge convolutions and the contrastive loss."""

from crosspoint.nn.edge_conv import DynamicEdgeConv, EdgeConv, norm_arguments
from crosspoint.nn.nt_xent import NTXentLoss

__all__ = ["DynamicEdgeConv", "EdgeConv", "NTXentLoss", "norm_arguments"]
