"""How cost grows: with each size on its own, as the slope of log time over log size (with the batch, of memory too);
and with the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from benchmarks.measure import Clock, backends, interleave, measure, runner, spread
from benchmarks.memory import peak_apart
from benchmarks.peers import COMPILED
from benchmarks.registry import Case, build
from benchmarks.truth import judge

__all__ = ["SWEEPS", "growth", "over_threads", "slope"]

# op -> a middling shape, and the values that each size takes while the others stay
SWEEPS: dict[str, tuple[dict[str, int], dict[str, tuple[int, ...]]]] = {
    "knn_graph": (
        {"B": 4, "N": 1024, "C": 3, "k": 20},
        {"N": (512, 1024, 2048, 4096, 8192), "C": (3, 16, 64, 128), "k": (5, 10, 20, 40), "B": (1, 4, 16)},
    ),
    "edge_conv": (
        {"B": 4, "N": 1024, "k": 20, "C": 64, "C_out": 64},
        {
            "N": (256, 512, 1024, 2048),
            "C": (16, 64, 256),
            "C_out": (64, 128, 256),
            "k": (5, 10, 20, 40),
            "B": (1, 2, 4, 8),
        },
    ),
    "edge_conv2": (
        {"B": 1, "N": 512, "k": 20, "C": 64, "C_mid": 64, "C_out": 64},
        {"N": (256, 512, 1024), "k": (5, 10, 20, 40), "B": (1, 2, 4)},
    ),
    "conv_bn_act_pool": (
        {"B": 4, "N": 512, "C": 512, "C_out": 1024},
        {"N": (256, 512, 1024), "C": (128, 256, 512), "B": (1, 4, 8)},
    ),
    "nt_xent": ({"N": 512, "D": 256}, {"N": (256, 512, 1024, 2048, 4096), "D": (64, 128, 256, 512)}),
    "info_nce": ({"N": 1024, "D": 256}, {"N": (512, 1024, 2048, 4096)}),
    "dgcnn": ({"B": 2, "N": 512, "k": 20}, {"N": (256, 512, 1024, 2048), "B": (1, 2, 4, 8)}),
}


def growth(only: Sequence[str] | None, names: Sequence[str], rounds: int, memory: bool) -> Iterator[dict]:
    """A row per operator and size: milliseconds of ours and of the peers, of right answers alone, and the slopes.

    With `memory`, rows over the batch also have peak bytes and their slopes, a process for each.
    """
    names = [name for name in names if name != COMPILED]  # it would compile anew at every point
    for op, (middle, sweeps) in SWEEPS.items():
        if only is not None and op not in only:
            continue
        for name, values in sweeps.items():
            batch = "B" if "B" in middle else "N"  # a loss's batch is its pairs
            yield swept(op, middle, name, values, names, rounds, memory and name == batch)


def swept(
    op: str,
    middle: dict[str, int],
    size: str,
    values: Sequence[int],
    names: Sequence[str],
    rounds: int,
    memory: bool,
) -> dict:
    row: dict = {"op": op, "size": size, "middle": middle, "values": list(values), "ms": {}}
    if memory:
        row["peak_bytes"] = {}
    for value in values:
        case = Case(op, "scaling", {**middle, size: value}, backward=op != "knn_graph")
        measured = measure(case, names, min(rounds, 5))
        row["ours"] = measured["ours"]
        for name, time in measured["ms"].items():
            row["ms"].setdefault(name, {})[str(value)] = time["median"]
            if memory:
                row["peak_bytes"].setdefault(name, {})[str(value)] = peak_apart(case, name)
    for key in ("ms", "peak_bytes"):
        if key in row:
            positive = {name: {v: cost for v, cost in row[key][name].items() if cost} for name in row[key]}
            slopes = {name: slope(found) for name, found in positive.items() if len(found) > 1}
            row["slope" if key == "ms" else "slope_bytes"] = slopes
            text = ", ".join(f"{name} {value:.2f}" for name, value in slopes.items())
            print(f"{op}, {key} over {size} = {', '.join(map(str, values))}: slope {text}", flush=True)
    return row


def slope(costs: dict[str, float]) -> float:
    """Of the line through log(cost) over log(size) that fits best."""
    x = [math.log(float(value)) for value in costs]
    y = [math.log(cost) for cost in costs.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def over_threads(chosen: Sequence[Case], rounds: int) -> Iterator[dict]:
    """A row per case: ours on 1, 2, 4, ... threads, in turn."""
    most = torch.get_num_threads()
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64, 128) if count < most] + [most]
    for case in chosen:
        impl = next(iter(backends(case.op, "cpu")), "reference")
        problem = build(case)
        run = runner(impl, problem)
        if not judge(problem, run(), is_ours=True).right:
            continue

        def on(count: int, run=run) -> None:
            torch.set_num_threads(count)
            run()

        runs = {str(count): lambda count=count: on(count) for count in counts}
        for start in runs.values():
            start()
        seconds = interleave(runs, rounds, Clock("cpu"))
        torch.set_num_threads(most)
        alone = seconds["1"]
        row = {
            "case": case.name,
            "ms": {count: 1e3 * spread(values)["median"] for count, values in seconds.items()},
            "speedup": {
                count: spread([a / b for a, b in zip(alone, values, strict=True)])
                for count, values in seconds.items()
            },
        }
        text = ", ".join(f"{count}: {value['median']:.2f}x" for count, value in row["speedup"].items())
        print(f"{case.name} on threads {text}", flush=True)
        yield row
