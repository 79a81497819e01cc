"""Imports of packages that the base install does not bring."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise ImportError(
            f"{module!r} could not be imported ({error}); this part of crosspoint needs it. "
            f"Install the extra that brings {missing!r}: pip install 'crosspoint[{extra}]'"
        ) from error
