"""Encoders, the CrossPoint model over them, and their checkpoints."""

from crosspoint.models import checkpoints
from crosspoint.models.checkpoints import load_encoder as from_pretrained
from crosspoint.models.crosspoint import CrossPoint, CrossPointConfig, CrossPointOutput, build
from crosspoint.models.dgcnn import DGCNN
from crosspoint.models.official import export_official, load_official
from crosspoint.models.pointnet import PointNet
from crosspoint.models.registry import create, list_models
from crosspoint.models.resnet import ResNet, resnet18, resnet50
from crosspoint.models.segmentation import DGCNNPart, DGCNNSemantic

__all__ = [
    "DGCNN",
    "CrossPoint",
    "CrossPointConfig",
    "CrossPointOutput",
    "DGCNNPart",
    "DGCNNSemantic",
    "PointNet",
    "ResNet",
    "build",
    "checkpoints",
    "create",
    "export_official",
    "from_pretrained",
    "list_models",
    "load_official",
    "resnet18",
    "resnet50",
]
