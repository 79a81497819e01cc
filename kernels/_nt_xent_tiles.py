"""How the contrastive kernels cut rows, columns and channels into tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch

from crosspoint.kernels._common import INTERPRETED
from crosspoint.kernels._precision import PRODUCTS

__all__ = ["GRADIENT", "ROW_SUMS", "Tile", "choose"]


class Tile(NamedTuple):
    """A program's rows and the columns that it takes at a time.

    Attributes:
        chunk: channels that are multiplied at a time; narrower rows are held whole.
        slice: channels of the gradient that a program forms; each slice multiplies the similarities anew.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    chunk: int = 256
    slice: int = 256

    def constants(self, width: int) -> dict[str, int]:
        chunk = min(self.chunk, width)
        return {
            "ROWS": self.rows,
            "TILE": self.columns,
            "CHUNK": chunk,
            "CHUNKED": chunk < width,
            "SLICE": min(self.slice, width),
        }

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


_ANY = 1 << 30
# By width, the first entry whose key is no less.
Entries = dict[int, Tile]

# Processor -> product -> entries. "other": those with less shared memory, 99 KB at least. Labels need more registers.
ROW_SUMS: dict[str, dict[str, Entries]] = {
    "sm_90": {
        "half": {128: Tile(128, 128, 8, 3), 256: Tile(128, 128, 8, 2), _ANY: Tile(128, 128, 8, 2, 128)},
        "tf32": {_ANY: Tile(128, 128, 8, 2, 64)},
        "tf32x3": {_ANY: Tile(128, 64, 8, 2, 32)},
        "float64": {_ANY: Tile(32, 32, 8, 2, 16)},
    },
    "sm_100": {
        "half": {256: Tile(128, 64, 8, 3), _ANY: Tile(128, 64, 8, 2, 128)},
        "tf32": {_ANY: Tile(128, 64, 8, 2, 64)},
        "tf32x3": {_ANY: Tile(128, 64, 8, 2, 32)},
        "float64": {_ANY: Tile(32, 32, 8, 2, 16)},
    },
    "other": {
        "half": {128: Tile(128, 64, 4, 2), _ANY: Tile(64, 64, 4, 2, 64)},
        "tf32": {_ANY: Tile(64, 64, 4, 2, 32)},
        "tf32x3": {_ANY: Tile(64, 64, 4, 2, 32)},
        "float64": {_ANY: Tile(32, 32, 8, 2, 16)},
    },
}
GRADIENT: dict[str, dict[str, Entries]] = {
    "sm_90": {
        "half": {256: Tile(128, 64, 8, 2), _ANY: Tile(128, 64, 8, 2, 64, 128)},
        "tf32": {_ANY: Tile(128, 32, 8, 3, 64, 128)},
        "tf32x3": {_ANY: Tile(128, 32, 8, 2, 32, 128)},
        "float64": {_ANY: Tile(32, 32, 8, 2, 16, 64)},
    },
    "sm_100": {
        "half": {256: Tile(128, 64, 8, 2), _ANY: Tile(128, 32, 8, 2, 64)},
        "half, labels": {256: Tile(128, 32, 8, 3), _ANY: Tile(128, 32, 8, 2, 64)},
        "tf32": {_ANY: Tile(128, 64, 8, 2, 64, 128)},
        "tf32x3": {_ANY: Tile(128, 32, 8, 2, 32, 128)},
        "float64": {_ANY: Tile(32, 32, 8, 2, 16, 64)},
    },
    "other": {
        "half": {128: Tile(64, 64, 8, 2), _ANY: Tile(64, 64, 8, 2, 64, 256)},
        "tf32": {_ANY: Tile(64, 32, 4, 2, 32, 128)},
        "tf32x3": {_ANY: Tile(64, 32, 4, 2, 32, 64)},
        "float64": {_ANY: Tile(32, 32, 8, 2, 16, 64)},
    },
}


def choose(
    table: dict[str, dict[str, Entries]], rows: torch.Tensor, product: int, labels: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of a launch on `rows` (V, N, W) as they are multiplied."""
    (_, n, width), tile = rows.shape, Tile(64, 64, 4, 1, 128)
    if INTERPRETED and n >= 500:  # its time goes by operations and not by elements
        tile = Tile(512, 512, 4, 1, 128)
    if not INTERPRETED:
        capability = torch.cuda.get_device_capability(rows.device)
        processor = {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, "other")
        name = "half" if rows.element_size() == 2 else PRODUCTS[product]
        products = table[processor]
        entries = products.get(f"{name}, labels", products[name]) if labels else products[name]
        tile = next(tile for most, tile in entries.items() if width <= most)
    return tile.constants(width), tile.options()
