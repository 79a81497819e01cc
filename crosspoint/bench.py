"""`crosspoint bench`: the benchmark suite, which is part of a checkout and not of the installed package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BenchConfig", "bench"]


@dataclass
class BenchConfig:
    """Measure this machine, and make one page of it with plots; or a page of results that are there; or compare with
    another commit. Needs a checkout: the suite is its folder benchmarks/."""

    out: Path = Path("runs/bench")  # folder of the results and of the page; its name is the machine's
    quick: bool = False  # DGCNN's layers against plain PyTorch alone, in a few minutes
    minutes: float = 14  # for all that is measured; what takes longer is left out
    data: Path | None = None  # folder of meshes and scans to measure on; generated shapes without it
    results: tuple[Path, ...] = ()  # folders of results to make the page of: then nothing is measured
    compare: str | None = (
        None  # a commit: build it, and measure this checkout against it (exit status 1: slower)
    )

    def __post_init__(self) -> None:
        if self.results and self.compare is not None:
            raise ValueError(
                "results and compare exclude each other: one measures nothing, the other a commit"
            )
        if self.minutes <= 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")


def bench(config: BenchConfig, *, checkout: Path = Path(__file__).parents[1]) -> None:
    """Run the suite of `checkout`; ends with its exit status where that is not 0.

    Raises:
        FileNotFoundError: the package is not that of a checkout, so there is no suite.
    """
    if not (checkout / "benchmarks" / "suite.py").is_file():
        raise FileNotFoundError(
            f"no benchmarks/ in {checkout}: the suite is not installed with the package. Clone the repository, "
            "`make build`, and run this in it"
        )
    status = subprocess.run([sys.executable, "-m", *_command(config)], cwd=checkout).returncode
    if status:
        sys.exit(status)


def _command(config: BenchConfig) -> Sequence[str]:
    out = config.out.resolve()
    if config.compare is not None:
        return ["benchmarks.compare", config.compare, "--out", str(out / "compare" / "compare.json")]
    if config.results:
        folders = [str(folder.resolve()) for folder in config.results]
        return ["benchmarks.report", *folders, "--out", str(out / "report.md")]
    options = ["--quick"] if config.quick else []
    options += ["--data", str(config.data.resolve())] if config.data is not None else []
    return ["benchmarks.suite", "--out", str(out), "--minutes", str(config.minutes), *options]
