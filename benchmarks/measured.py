"""What a folder of result files holds: those of benchmarks.run (by allocator and instruction set), of
benchmarks.train_step, and of scripts/gpu_check.sh."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import WIDEST_FIRST
from benchmarks.peers import COMPILED

__all__ = ["Measured", "best_peer", "flops_limit", "load", "share_of_limit"]


@dataclass
class Measured:
    """`runs` of one machine; in each the rows of a later file stand in for those of the same case before."""

    name: str
    runs: dict[tuple[str, str], dict] = field(default_factory=dict)  # by (allocator, instruction set)
    steps: list[dict] = field(default_factory=list)
    gpu: list[dict] = field(default_factory=list)

    @property
    def main(self) -> dict:
        """The run that the page shows: the widest instructions, the tuned allocator where it was used."""
        return self.runs[min(self.runs, key=_prominence)] if self.runs else {"rows": {}}

    @property
    def default(self) -> dict:
        """The same under the default allocator: no rows if that is the main run, or none was made."""
        run = self.runs.get(("default", self.main.get("instruction_set", "")))
        return {"rows": {}} if run is None or run is self.main else run

    def instruction_sets(self) -> dict[str, dict]:
        """The runs with the main run's allocator, widest first; one where only one was measured."""
        chosen = [key for key in self.runs if key[0] == self.main["malloc"]]
        return {key[1]: self.runs[key] for key in sorted(chosen, key=_prominence)}

    def notes(self) -> Iterator[str]:
        for run in (*self.runs.values(), *self.steps):
            if "note" in run:
                yield run["note"]


def _prominence(key: tuple[str, str]) -> tuple[bool, int]:
    malloc, instructions = key
    place = WIDEST_FIRST.index(instructions) if instructions in WIDEST_FIRST else len(WIDEST_FIRST)
    return malloc != "tuned", place


def load(folder: Path) -> Measured:
    """Every JSON of a folder. ValueError where there is none, or one that nothing here writes."""
    found = Measured(folder.name)
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} holds no result files (*.json)")
    for path in paths:
        content = json.loads(path.read_text())
        if "speeds" in content:
            found.gpu.append(content)
        elif "fused" in content or "plain" in content:
            found.steps.append(content)
        elif content.get("schema") == 2:
            key = (content["malloc"], content["instruction_set"])
            run = found.runs.setdefault(key, {**content, "rows": {}, "scaling": [], "thread_scaling": []})
            shares = [part["others"] for part in (run, content) if part.get("others") is not None]
            run["others"] = max(shares, default=None)
            run["rows"].update({row["case"]: row for row in content.get("rows", ())})
            for part in ("scaling", "thread_scaling"):
                run[part] += content.get(part, [])
        else:
            raise ValueError(f"{path} is none of the result files that this version of benchmarks/ writes")
    return found


def best_peer(row: dict) -> str | None:
    """The fastest that gave the right answer, apart from plain PyTorch and torch.compile of it."""
    others = [name for name in row["ratio"] if name not in ("plain", COMPILED)]
    return min(others, key=lambda name: row["ratio"][name]["median"], default=None)


def share_of_limit(row: dict, limits: dict) -> float | None:
    """The least time that the least work can take on this machine, as a share of the time that we took."""
    if row["ours"] not in row["ms"] or not limits:
        return None
    least = max(
        row["floor"]["flops"] / (1e9 * flops_limit(limits)),
        row["floor"]["bytes"] / (1e9 * limits["read_gb_s"]),
    )
    return 1e3 * least / row["ms"][row["ours"]]["median"]


def flops_limit(limits: dict) -> float:
    """GFLOP/s: on registers, or of matrix products where that could not be measured."""
    return max(limits.get("gflops_registers", 0), limits["gflops"])
