"""The operators as modules: edge convolutions and the contrastive losses; batch norm over several processes."""

from crosspoint.nn.batch_norm import SyncBatchNorm, convert_sync_batch_norm, norm_arguments
from crosspoint.nn.edge_conv import DynamicEdgeConv, EdgeConv, EdgeConv2
from crosspoint.nn.nt_xent import NTXentLoss, SupConLoss
from crosspoint.nn.shared_linear import SharedLinear

__all__ = [
    "DynamicEdgeConv",
    "EdgeConv",
    "EdgeConv2",
    "NTXentLoss",
    "SharedLinear",
    "SupConLoss",
    "SyncBatchNorm",
    "convert_sync_batch_norm",
    "norm_arguments",
]
