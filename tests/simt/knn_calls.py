"""Calls of csrc/cuda/knn.cu and reverse_graph.cu through their entries, for ctypes."""

import ctypes
import re
from pathlib import Path

from simt_harness import ROOT, Device

PATHS = re.findall(
    r"^  (\w+)\b",
    re.search(
        r"enum class KnnPath \{(.*?)\}", (ROOT / "csrc/include/crosspoint/cuda/knn.h").read_text(), re.S
    )[1],
    re.M,
)


class Knn(ctypes.Structure):
    _fields_ = [
        ("is_double", ctypes.c_int64),
        *[(n, ctypes.c_void_p) for n in ("query", "points", "lengths_query", "lengths_points")],
        *[(n, ctypes.c_int64) for n in ("batch", "queries", "candidates", "channels", "k", "self")],
        *[(n, ctypes.c_void_p) for n in ("idx", "dist2", "workspace")],
        ("path", ctypes.c_int64),
    ]


class ReverseGraph(ctypes.Structure):
    _fields_ = [
        ("idx", ctypes.c_void_p),
        *[(n, ctypes.c_int64) for n in ("batch", "nodes", "k", "n")],
        ("start", ctypes.c_void_p),
        ("edges", ctypes.c_void_p),
    ]


def kernels(kind: str, *names: str) -> Device:
    """The kernels of these .cu files, and the entries that there are to them."""
    entries = [Path(__file__).with_name(f"{name}_entry.cpp") for name in ("knn", "reverse_graph")]
    entries = [entry for entry in entries if entry.name.removesuffix("_entry.cpp") in names]
    device = Device([*entries, *(ROOT / "csrc" / "cuda" / f"{name}.cu" for name in names)], kind)
    for entry in entries:
        size = entry.name.replace("_entry.cpp", "_workspace_bytes")
        getattr(device.library, size).restype = ctypes.c_int64
    return device


def knn_workspace(device: Device, call: Knn) -> int | None:
    """Bytes; None where the path does not support the search."""
    size = device.library.knn_workspace_bytes(ctypes.byref(call))
    return None if size < 0 else size
