"""Fused kernels for self-supervised learning on point clouds, and CrossPoint training built on them."""

from crosspoint._version import __version__

__all__ = ["__version__"]
