"""Time: ours and the peers in turn. Nothing is timed before its answer was judged (benchmarks/truth.py)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.registry import ENTRIES, Case, Problem, build, ours
from benchmarks.truth import judge, step
from crosspoint import ops

__all__ = ["Clock", "backends", "interleave", "measure", "runner", "spread"]

_BLOCK = 0.03  # seconds: shorter calls are timed in blocks of this length
_SLOW = 3.0  # seconds: calls beyond take part in three rounds at most


def backends(op: str, device: str) -> list[str]:
    """The compiled backends that can run an operator, or a composition of them, on a kind of device."""
    of = ENTRIES[op].backends_of if op in ENTRIES else op
    return [
        row.backend
        for row in ops.describe_backends()
        if (row.op, row.device) == (of, device) and row.usable and row.backend != "reference"
    ]


def runner(name: str, problem: Problem) -> Callable[[], list[Tensor]]:
    """What is timed: one call by a backend of ours or by a peer, with its backward pass where the case has one."""
    f = (
        peers.peer(name, problem)
        if name in peers.PEERS
        else ENTRIES[problem.case.op].apply(ours(name), problem)
    )
    return lambda: step(problem, f)


class Clock:
    """Seconds of a call. On a GPU the L2 cache is flushed before it, and the launches are queued ahead."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def once(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        torch.cuda._sleep(2_000_000)  # about 1 ms, in which the host gets ahead
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def median(self, run: Callable[[], object]) -> float:
        """The median of 5 to 30 calls."""
        run()
        once = self.once(run)
        return statistics.median(self.once(run) for _ in range(int(min(30, max(5, 0.3 / once)))))


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each, by rounds in which all take their turn: a change of the machine's speed meets all of them."""
    first = {name: clock.once(run) for name, run in runs.items()}
    repeats = {name: 1 if clock.cuda else max(1, round(_BLOCK / max(1e-6, first[name]))) for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds):
        for name, run in runs.items():
            if first[name] > _SLOW and done >= 3:
                continue

            def block(run=run, times=repeats[name]) -> None:
                for _ in range(times):
                    run()

            seconds[name].append(clock.once(block) / repeats[name])
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(case: Case, names: list[str], rounds: int, device: str = "cpu", impl: str | None = None) -> dict:
    """One case: ours and the peers `names`, judged, then timed in turn. A row of the results.

    Only who gave the right answer has a time; `checks` says so of all, `absent` why others took no part.
    """
    problem = build(case, device)
    impl = impl or next(iter(backends(case.op, device)), "reference")
    row: dict = {
        "op": case.op,
        "case": case.name,
        "size": case.size,
        "kind": case.kind,
        "source": problem.source,
        "sizes": case.sizes,
        "backward": case.backward,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ours": impl,
        "threads": torch.get_num_threads(),
        "checks": {},
        "absent": {},
        "floor": ENTRIES[case.op].floor(case)._asdict(),
        "ms": {},
        "ratio": {},
    }
    runs: dict[str, Callable[[], object]] = {}
    for name in [impl, *(name for name in names if name in peers.of(case.op))]:
        if name != impl and (why := peers.why_not(name, case, device)):
            row["absent"][name] = why
            continue
        try:
            run = runner(name, problem)
            verdict = judge(problem, run(), is_ours=name == impl)
        except Exception as error:  # a peer's own limits come as errors of any kind
            if name == impl:
                raise
            row["absent"][name] = f"{type(error).__name__}: {error}"[:300]
            continue
        row["checks"][name] = verdict._asdict()
        if verdict.right:
            runs[name] = run
    if impl not in runs:
        return row  # of a wrong answer there is nothing to compare with
    seconds = interleave(runs, rounds, Clock(device))
    row["ms"] = {name: spread([1e3 * s for s in values]) for name, values in seconds.items()}
    for name, values in seconds.items():
        if name != impl:
            row["ratio"][name] = spread(
                [theirs / own for theirs, own in zip(values, seconds[impl], strict=False)]
            )
    return row
