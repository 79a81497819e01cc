"""How EdgeConv's kernels cut nodes and channels into programs."""

from __future__ import annotations

from typing import NamedTuple

import triton

from crosspoint.kernels._common import INTERPRETED

__all__ = ["CENTRE", "GATHER", "MOMENTS", "MOMENTS_DOUBLE", "PASS", "Tile", "choose", "grid_of"]


class Tile(NamedTuple):
    """Nodes and channels that a program works on at a time."""

    rows: int
    channels: int
    warps: int
    product: str | None = None  # input_precision of its products, if it takes any

    def constants(self) -> dict[str, int | str]:
        constants = {"ROWS": self.rows, "CHANNELS": self.channels}
        return {**constants, "PRODUCT": self.product} if self.product else constants


# By channels: the first entry that holds them all, or the last.
GATHER = (Tile(64, 16, 4), Tile(32, 32, 4), Tile(16, 64, 4))
PASS = (Tile(128, 16, 4), Tile(64, 32, 4), Tile(32, 64, 4))
CENTRE = (Tile(256, 16, 8),)  # of a whole cloud, so few channels and many nodes at a time
# Of few channels as they are; of more on tensor cores, in three products of tf32.
MOMENTS = (Tile(32, 16, 4, "ieee"), Tile(16, 64, 8, "tf32x3"))
MOMENTS_DOUBLE = (Tile(32, 16, 4, "ieee"),)


def choose(table: tuple[Tile, ...], channels: int) -> tuple[dict[str, int | str], dict[str, int]]:
    """Constants and options of a launch; interpreted, larger tiles, since time goes by operations there."""
    tile = next((tile for tile in table if channels <= tile.channels), table[-1])
    if INTERPRETED:
        tile = tile._replace(rows=max(tile.rows, 64))
    return tile.constants(), {"num_warps": tile.warps}


def grid_of(clouds: int, nodes: int, channels: int, constants: dict[str, int | str]) -> tuple[int, int]:
    """Programs that each work on nodes of one cloud."""
    return clouds * triton.cdiv(nodes, constants["ROWS"]), triton.cdiv(channels, constants["CHANNELS"])
