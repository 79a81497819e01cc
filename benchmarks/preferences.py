"""Which of native and triton is faster on CUDA, op by op, by the committed benchmarks/results/*/gpu_check.json.

python -m benchmarks.preferences      prints the table for crosspoint/ops/_preferences.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from benchmarks.registry import ENTRIES

RESULTS = Path(__file__).parent / "results"


def faster(results: Iterable[dict]) -> dict[str, str]:
    """The backend with the smaller geometric mean over the cases that both ran, for ops that both ran."""
    logs: dict[str, list[float]] = {}
    for result in results:
        for row in result["speeds"]:
            us = row["us"]
            composed = row["op"] in ENTRIES and ENTRIES[row["op"]].backends_of != row["op"]
            if "native" in us and "triton" in us and not composed:
                logs.setdefault(row["op"], []).append(math.log(us["native"] / us["triton"]))
    return {op: "triton" if sum(ratios) > 0 else "native" for op, ratios in sorted(logs.items())}


def committed() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/gpu_check*.json"))]


if __name__ == "__main__":
    print(f"FASTER: dict[str, str] = {json.dumps(faster(committed()))}")
