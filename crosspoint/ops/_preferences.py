"""Which backend "auto" tries first on CUDA: `python -m benchmarks.preferences` makes the table from results."""

from __future__ import annotations

__all__ = ["FASTER", "order"]

# op -> the faster of native and triton; native where nothing was measured
FASTER: dict[str, str] = {}


def order(op: str, device: str) -> tuple[str, ...]:
    """The backends in the order in which "auto" tries them."""
    if device == "cuda" and FASTER.get(op) == "triton":
        return ("triton", "native", "reference")
    return ("native", "triton", "reference")
