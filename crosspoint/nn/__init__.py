"""The operators as modules: edge convolutions and the contrastive loss."""

from crosspoint.nn.edge_conv import DynamicEdgeConv, EdgeConv
from crosspoint.nn.nt_xent import NTXentLoss

__all__ = ["DynamicEdgeConv", "EdgeConv", "NTXentLoss"]
