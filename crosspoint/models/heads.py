"""Heads that follow an encoder."""

from __future__ import annotations

from torch import nn

__all__ = ["classification_head", "image_projection_head", "point_projection_head"]


def point_projection_head(feature_dim: int, projection_dim: int) -> nn.Sequential:
    """CrossPoint's head after a point encoder: feature -> 1024 -> projection, with biases."""
    return nn.Sequential(
        nn.Linear(feature_dim, 1024),
        nn.BatchNorm1d(1024),
        nn.ReLU(inplace=True),
        nn.Linear(1024, projection_dim),
    )


def image_projection_head(feature_dim: int, projection_dim: int) -> nn.Sequential:
    """CrossPoint's head after an image encoder: feature -> 512 -> projection, without biases."""
    return nn.Sequential(
        nn.Linear(feature_dim, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(inplace=True),
        nn.Linear(512, projection_dim, bias=False),
    )


def classification_head(feature_dim: int, num_classes: int) -> nn.Sequential:
    """DGCNN's classifier: feature -> 512 -> 256 -> classes."""
    return nn.Sequential(
        nn.Linear(feature_dim, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Dropout(0.5),
        nn.Linear(512, 256),
        nn.BatchNorm1d(256),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Dropout(0.5),
        nn.Linear(256, num_classes),
    )
