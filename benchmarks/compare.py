"""Another commit against this checkout, in turn: the gate before a change to a kernel lands.

    python -m benchmarks.compare main                              DGCNN's layers and the small cases
    python -m benchmarks.compare HEAD~3 --only edge_conv --size layer large --rounds 21 --out compare.json

The commit is checked out beside this one (git worktree, in a temporary folder) and built there; what is measured, and
how, comes from this checkout's benchmarks/ on both sides. Each side is a process of its own; they take turns, block by
block, so that a change of the machine's speed meets both. A case is slower if the median of new / old lies beyond the
tolerance and its confidence interval (95 %, by order statistics) beyond 1. Such a case is measured again in new
processes, the other side first, since where memory lies can make a process slow as long as it lives; it counts if it is
slower every time.

Exit status: 0, 1 for a regression or a wrong answer, 2 for wrong usage or a commit that does not build.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

import crosspoint
from benchmarks import machine, registry
from benchmarks.registry import Case

__all__ = ["Side", "built", "compare", "slower"]

_AGAIN = 2  # times that a case which looks slower is measured again
_ROOT = Path(__file__).parents[1]
_SITE = "CROSSPOINT_COMPARE_SITE"  # of a side's environment: the folder to start it in, first on its path


class Unusable(Exception):
    """A commit that cannot be compared with: unknown, or not to be built."""


# ---- the other commit


@contextmanager
def built(ref: str) -> Iterator[dict[str, str]]:
    """A commit, built in a temporary folder: the environment in which `crosspoint` is that commit's.

    This checkout is built too, where it lies, so that none of the two is older than its sources.
    """
    with tempfile.TemporaryDirectory(prefix="crosspoint-compare-") as folder:
        source, site = Path(folder) / "source", Path(folder) / "site"
        _run(["git", "worktree", "add", "--quiet", "--detach", str(source), ref], _ROOT)
        try:
            site.mkdir()
            _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], _ROOT)
            build = ["build", "--build-base", str(Path(folder) / "build"), "--build-lib", str(site)]
            _run([sys.executable, "setup.py", "--quiet", *build], source)
            (site / "benchmarks").symlink_to(_ROOT / "benchmarks")
            yield {_SITE: str(site), "PYTHONPATH": str(site)}
        finally:
            _run(["git", "worktree", "remove", "--force", str(source)], _ROOT)


def _run(command: Sequence[str], cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except OSError as error:
        raise Unusable(f"{command[0]}: {error}") from error
    if done.returncode:
        raise Unusable(f"{' '.join(command[:3])} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")


# ---- one side


class Side:
    """A process that measures with the `crosspoint` that its environment leads to."""

    def __init__(self, env: Mapping[str, str]) -> None:
        inherited = {
            k: v for k, v in os.environ.items() if k != "CROSSPOINT_LIBRARY"
        }  # one for both would be no comparison
        self._site = env.get(_SITE, str(_ROOT))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", "--serve"],
            cwd=self._site,
            env={**inherited, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: object) -> dict:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise Unusable(f"a measuring process ended with {self._process.wait()}; what it said is above")
        return json.loads(line)

    def __enter__(self) -> Side:
        found = self.ask(where=True)["package"]
        if not Path(found).is_relative_to(self._site):
            self.__exit__()
            raise Unusable(f"a side that was to measure {self._site} would measure {found}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    """Answers questions: `where` the package is, `case` prepares one and judges the answer, `calls` times so many."""
    from benchmarks.measure import Clock, backends, runner
    from benchmarks.truth import judge

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print
    clock = Clock("cpu")
    run = None
    for line in sys.stdin:
        question = json.loads(line)
        if "where" in question:
            answer = {"package": str(Path(crosspoint.__file__).parent)}
        elif "case" in question:
            case = _case(question["case"])
            try:
                problem = registry.build(case)
                impl = next(iter(backends(case.op, "cpu")), "reference")
                run = runner(impl, problem)
                verdict = judge(problem, run(), is_ours=True)
                answer = {
                    "impl": impl,
                    "right": verdict.right,
                    "error": verdict.error,
                    "seconds": clock.once(run),
                }
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                answer = {"failed": f"{type(error).__name__}: {error}"[:300]}
        else:
            calls = question["calls"]
            answer = {
                "seconds": clock.once(lambda run=run, calls=calls: [run() for _ in range(calls)]) / calls
            }
        print(json.dumps(answer), file=answers, flush=True)


def _described(case: Case) -> dict:
    return {**dataclasses.asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}


def _case(described: dict) -> Case:
    return Case(**{**described, "dtype": getattr(torch, described["dtype"])})


# ---- both


def sitting(
    old: Mapping[str, str], new: Mapping[str, str], cases: Sequence[Case], rounds: int, *, old_first: bool
) -> Iterator[dict]:
    """Both sides in turn on each case: a row with new / old of every round, or why there is none."""
    order = ("old", "new") if old_first else ("new", "old")
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side(old if name == "old" else new)) for name in order}
        for case in cases:
            row: dict = {"case": case.name}
            said = {name: side.ask(case=_described(case)) for name, side in sides.items()}
            row |= {
                name: {k: v for k, v in answer.items() if k != "seconds"} for name, answer in said.items()
            }
            if all(answer.get("right") for answer in said.values()):
                # The faster side decides on the calls of a block, the same on both: 30 ms.
                calls = max(
                    1, math.ceil(0.03 / max(1e-6, min(answer["seconds"] for answer in said.values())))
                )
                seconds: dict[str, list[float]] = {name: [] for name in order}
                for _ in range(rounds):
                    for name in order:
                        seconds[name].append(sides[name].ask(calls=calls)["seconds"])
                row["ms"] = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
                row["ratios"] = [b / a for a, b in zip(seconds["old"], seconds["new"], strict=True)]
            yield row


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Of the median, at least 95 % sure: order statistics, by the binomial distribution."""
    n, ordered = len(ratios), sorted(ratios)
    below, rank = 0.0, 0
    while rank < n // 2 and below + math.comb(n, rank) / 2**n <= 0.025:
        below += math.comb(n, rank) / 2**n
        rank += 1
    return ordered[max(0, rank - 1)], ordered[n - max(1, rank)]


def slower(ratios: Sequence[float], tolerance: float) -> bool:
    return statistics.median(ratios) > 1 + tolerance and interval(ratios)[0] > 1


def compare(
    old: Mapping[str, str], new: Mapping[str, str], cases: Sequence[Case], rounds: int, tolerance: float
) -> list[dict]:
    """A row per case, with its `verdict`: same, slower, faster, wrong, new (the old side cannot do it)."""
    rows = {}
    for row in sitting(old, new, cases, rounds, old_first=True):
        rows[row["case"]] = row | {"verdict": _verdict(row, tolerance)}
        print(line(rows[row["case"]]), flush=True)
    for again in range(_AGAIN):
        suspects = [case for case in cases if rows[case.name]["verdict"] == "slower"]
        if not suspects:
            break
        print(f"{len(suspects)} look slower; again, in new processes:", flush=True)
        for row in sitting(old, new, suspects, rounds, old_first=again % 2 == 1):
            first = rows[row["case"]]
            first.setdefault("again", []).append(row.get("ratios"))
            if _verdict(row, tolerance) != "slower":
                first["verdict"] = "same"
            print(line({**row, "verdict": first["verdict"]}), flush=True)
    return list(rows.values())


def _verdict(row: dict, tolerance: float) -> str:
    if not row["new"].get("right"):
        return "wrong"
    if not row["old"].get("right"):
        return "new"
    if slower(row["ratios"], tolerance):
        return "slower"
    return "faster" if slower([1 / ratio for ratio in row["ratios"]], tolerance) else "same"


def line(row: dict) -> str:
    """A row as text; no speed where an answer was wrong."""
    if "ratios" not in row:
        side = "new" if row["verdict"] == "wrong" else "old"
        why = row[side].get("failed") or f"wrong by {row[side]['error']:.1e}"
        return f"{row['verdict']:7s} {row['case']}: {'this checkout' if side == 'new' else 'the other commit'}: {why}"
    low, high = interval(row["ratios"])
    return (
        f"{row['verdict']:7s} {row['case']}: {row['ms']['old']:.3f} -> {row['ms']['new']:.3f} ms, "
        f"x {statistics.median(row['ratios']):.3f} ({low:.3f} to {high:.3f})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ref", nargs="?", help="the commit to compare with: a branch, a tag, a hash")
    parser.add_argument("--only", nargs="+", choices=registry.OPS, help="operators; default: all")
    parser.add_argument(
        "--size", nargs="+", choices=registry.SIZES, default=["small", "layer"], help="groups of cases"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="at least 6, for an interval of 95 %%")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="how much slower is no regression; 0.05"
    )
    parser.add_argument("--malloc", choices=("default", "tuned"), default="tuned")
    parser.add_argument("--out", type=Path, help="JSON of all rounds")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        _serve()
        return 0
    if args.ref is None:
        parser.error("which commit? (a branch, a tag, a hash)")
    if args.rounds < 6:
        parser.error("--rounds must be at least 6")
    cases = list(registry.cases(args.only, args.size, args.case))
    if not cases:
        parser.error(f"no case of {args.only or 'any operator'} in {args.size} has {args.case!r} in its name")
    allocator = machine.TUNED_MALLOC if args.malloc == "tuned" else {}
    try:
        started = time.monotonic()
        with built(args.ref) as old:
            print(f"built both in {time.monotonic() - started:.0f} s", flush=True)
            rows = compare({**old, **allocator}, allocator, cases, args.rounds, args.tolerance)
    except Unusable as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    if args.out:
        head = {"ref": args.ref, **machine.facts(), "malloc": args.malloc}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    found = {
        verdict: [row["case"] for row in rows if row["verdict"] == verdict] for verdict in ("slower", "wrong")
    }
    for verdict, names in found.items():
        if names:
            print(f"{verdict}: {'; '.join(names)}")
    bad = any(found.values())
    print(f"{len(rows)} cases on {torch.get_num_threads()} threads: {'a' if bad else 'no'} regression")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
