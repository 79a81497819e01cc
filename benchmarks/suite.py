"""The whole suite on this machine: result files, a page of them and plots, in a limited time.

    python -m benchmarks.suite --out runs/bench                       under 15 minutes
    make measured MACHINE=name                                         to commit: benchmarks/results/name, and the page
    python -m benchmarks.suite --quick                                 a look: DGCNN's layers against plain PyTorch

Parts run one after the other, each in processes of its own, the most telling first. One that takes longer than its
share is ended; what it measured until then is kept, since results are written after every case. Nothing else should run
on the machine: the page says how much of the processors others took.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import peers, registry, report
from benchmarks.machine import WIDEST_FIRST, facts

__all__ = ["Part", "parts", "run"]


class Part(NamedTuple):
    """A command, the file that it writes, and the most seconds that it may take."""

    file: str
    seconds: float
    module: str
    arguments: Sequence[str]
    env: dict[str, str]


def parts(*, quick: bool, data: str | None = None) -> list[Part]:
    """What is measured, the most telling first."""
    of_data = ["--data", data] if data else []
    tuned = ["--malloc", "tuned"]
    clouds = ["--batch", "8", "--points", "1024"]

    def ops(file: str, seconds: float, *arguments: str, **env: str) -> Part:
        return Part(f"ops_{file}.json", seconds, "benchmarks.run", [*arguments, *of_data], env)

    def step(file: str, seconds: float, *arguments: str) -> Part:
        return Part(f"step_{file}.json", seconds, "benchmarks.train_step", arguments, {})

    if quick:
        return [
            ops("tuned", 150, *tuned, "--rounds", "5"),
            step("dgcnn_8x1024_tuned", 60, *clouds, *tuned),
        ]
    # torch.compile takes 10 s a case, so that one operator has to do.
    everybody = ["--peers", *(name for name in peers.PEERS if name != peers.COMPILED), "--memory", *tuned]
    pretraining = ["--model", "crosspoint", "--batch", "4", "--points", "1024", "--k", "15"]
    widest = facts()["instruction_set"]
    narrower = WIDEST_FIRST[1 + WIDEST_FIRST.index(widest) :] if widest in WIDEST_FIRST else ()
    apart = ["edge_conv", "dgcnn_backbone", "dgcnn"]
    others = [op for op in registry.OPS if op not in apart]
    return [
        ops("tuned_dgcnn", 100, "--only", *apart[1:], "--rounds", "3", *everybody),
        ops(
            "tuned_edge_conv", 100, "--only", apart[0], "--rounds", "5", "--peers", "all", "--memory", *tuned
        ),
        ops("tuned", 240, "--only", *others, "--rounds", "5", *everybody),
        ops("default_dgcnn", 40, "--only", *apart[1:], "--rounds", "3"),
        ops("default", 90, "--only", *others, apart[0], "--rounds", "3"),
        step("dgcnn_8x1024_tuned", 40, *clouds, "--steps", "5", *tuned),
        step("dgcnn_8x1024_default", 50, *clouds),
        *(
            ops(f"tuned_{name}", 40, "--peers", "--rounds", "3", *tuned, CROSSPOINT_CPU=name)
            for name in narrower
        ),
        ops("tuned_threads", 30, "--no-ratios", "--thread-scaling", "--rounds", "5", *tuned),
        ops("tuned_growth", 130, "--no-ratios", "--scaling", "--rounds", "3", *everybody),
        step("crosspoint_4x1024_default", 130, *pretraining, "--largest-batch"),
        ops("tuned_pairs", 40, "--only", "nt_xent", "--size", "large", "--rounds", "1", *everybody),
        ops("tuned_large", 240, "--size", "large", "small", "--rounds", "5", *everybody),
    ]


def run(chosen: Sequence[Part], out: Path, seconds: float) -> list[str]:
    """Runs the parts within `seconds`; what each that did not end well came to."""
    out.mkdir(parents=True, exist_ok=True)
    end, troubles = time.monotonic() + seconds, []
    for part in chosen:
        left = min(part.seconds, end - time.monotonic())
        if left < 5:
            troubles.append(f"{part.file}: no time left")
            continue
        print(f"---- {part.file}, at most {left:.0f} s", flush=True)
        command = [
            sys.executable,
            "-m",
            part.module,
            *part.arguments,
            "--out",
            str(out.resolve() / part.file),
        ]
        try:
            # In a session of its own: where time is over, its children end with it.
            process = subprocess.Popen(
                command, cwd=Path(__file__).parents[1], env={**os.environ, **part.env}, start_new_session=True
            )
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            _end(process)
            troubles.append(f"{part.file}: ended after its {left:.0f} s, with what it had by then")
            continue
        except BaseException:
            _end(process)
            raise
        if status:
            troubles.append(f"{part.file}: failed with {status}")
    return troubles


def _end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, 9)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        help="folder of the results; its name is the machine's",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the layers of DGCNN against plain PyTorch alone"
    )
    parser.add_argument("--minutes", type=float, default=14.0, help="for all parts together")
    parser.add_argument("--data", metavar="FOLDER", help="of meshes and scans, for benchmarks.run")
    parser.add_argument("--no-report", action="store_true", help="result files alone")
    args = parser.parse_args(arguments)
    troubles = run(parts(quick=args.quick, data=args.data), args.out, 60 * args.minutes)
    for trouble in troubles:
        print(trouble, file=sys.stderr)
    failed = int(any("failed" in trouble for trouble in troubles))
    if args.no_report:
        return failed
    try:
        report.write([args.out], args.out / "report.md")
    except (ValueError, ImportError) as error:
        print(f"benchmarks.suite: no page: {error}", file=sys.stderr)
        return 1
    print(args.out / "report.md")
    return failed


if __name__ == "__main__":
    sys.exit(main())
