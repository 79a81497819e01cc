"""Encoders, the CrossPoint model over them, and their checkpoints."""

from crosspoint.models import checkpoints
from crosspoint.models.crosspoint import CrossPoint, CrossPointConfig, CrossPointOutput, build
from crosspoint.models.dgcnn import DGCNN
from crosspoint.models.resnet import ResNet, resnet18, resnet50

__all__ = [
    "DGCNN",
    "CrossPoint",
    "CrossPointConfig",
    "CrossPointOutput",
    "ResNet",
    "build",
    "checkpoints",
    "resnet18",
    "resnet50",
]
