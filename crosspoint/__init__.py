"""Fused kernels for self-supervised learning on point clouds, and CrossPoint training built on them."""

from crosspoint._version import __version__

__all__ = ["__version__", "explain"]


def __getattr__(name: str):
    # Importing crosspoint imports no torch: crosspoint.numpy works in processes that have none.
    if name == "explain":
        from crosspoint.ops import explain

        return explain
    raise AttributeError(f"module 'crosspoint' has no attribute {name!r}")
