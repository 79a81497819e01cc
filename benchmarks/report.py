"""One Markdown page and its plots from result files.

    python -m benchmarks.report runs/bench                      runs/bench/report.md, plots under runs/bench/report/
    python -m benchmarks.report benchmarks/results/* --out docs/performance/measured.md

A folder is a machine; `python -m benchmarks.suite` fills one. Plots need matplotlib; `--no-plots` leaves them out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import targets
from benchmarks.measured import Measured, best_peer, load, share_of_limit
from benchmarks.peers import PEERS
from benchmarks.registry import OPS

__all__ = ["page", "write"]

QUIET = 0.05  # share of the processors that others may have used before the page warns of it


def write(folders: Sequence[Path], out: Path, *, plots: bool = True) -> None:
    """The page `out`, and its plots in the folder of that name beside it. ValueError where nothing was measured."""
    machines = [load(folder) for folder in folders]
    images: dict[str, list[tuple[str, str]]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    if plots:
        from benchmarks.plots import draw

        images = {machine.name: draw(machine, out.with_suffix("")) for machine in machines}
    out.write_text(page(machines, out.stem, images))


def page(machines: Sequence[Measured], image_folder: str, images: dict[str, list[tuple[str, str]]]) -> str:
    """The text of the page; `images` per machine: file name, caption."""
    parts = ["# Measured", INTRODUCTION]
    for machine in machines:
        pictures = [f"![{caption}]({image_folder}/{name})" for name, caption in images.get(machine.name, ())]
        parts += [f"## {machine.name}", *_about(machine), *pictures]
        parts += [text for part in _PARTS for text in part(machine)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
Made by `python -m benchmarks.report` from result files: do not edit. The method: `docs/performance.md`.

A ratio is theirs / ours, the median over rounds in which both took their turn, and its range in brackets; above 1
ours is faster. Nobody has a time who did not give the right answer. GFLOP/s are of the least work that the best known
algorithm needs, not of what was executed; the share of the limit is the time that this work would take at the measured
rate of the processor or of memory, whichever is longer, over the time that it took."""


def _about(machine: Measured) -> Iterator[str]:
    for note in dict.fromkeys(machine.notes()):
        yield f"*{note}*"
    run = machine.main
    if not run["rows"]:
        return
    rows = [
        ("machine", run["machine"]),
        ("threads", run["threads"]),
        ("instructions", run["instruction_set"]),
        ("torch, Python", f"{run['torch']}, {run['python']}"),
        ("commit, date", f"{run['commit']}, {run['date']}"),
    ]
    if limits := run.get("limits"):
        on_registers = limits.get("gflops_registers")
        text = "not measured: no C compiler" if on_registers is None else f"{on_registers:.0f} GFLOP/s"
        rows.append(("multiply-adds on registers", text))
        rows.append(("torch.mm, 2048^3", f"{limits['gflops']:.0f} GFLOP/s"))
        rows.append(
            ("memory, read and copied", f"{limits['read_gb_s']:.0f} and {limits['copy_gb_s']:.0f} GB/s")
        )
    versions = [f"{name} {version}" for name, version in run.get("peers", {}).items() if version]
    rows.append(("peers", ", ".join(["plain PyTorch", *versions])))
    busy = [r["others"] for r in machine.runs.values() if r.get("others") is not None]
    if busy:
        warning = (
            ": not a quiet machine, so trust ratios alone, and these with care" if max(busy) > QUIET else ""
        )
        rows.append(("taken by other processes", f"{100 * max(busy):.0f} % of the processors{warning}"))
    yield _table(("", ""), rows)


# ---- operators


def _operators(machine: Measured) -> Iterator[str]:
    rows = machine.main["rows"]
    for op in OPS:
        mine = [row for row in rows.values() if row["op"] == op]
        if not mine:
            continue
        yield f"### {op}"
        yield _times(mine, machine.default["rows"])
        yield from _memory_and_limits(mine, machine.main.get("limits", {}))
        yield from _absences(mine)


def _times(rows: list[dict], default: dict[str, dict]) -> str:
    peers = [name for name in PEERS if any(name in row["ratio"] for row in rows)]
    other_malloc = any("plain" in default.get(row["case"], {}).get("ratio", {}) for row in rows)
    header = ["case", "ours, ms", *peers, *(["plain, default malloc"] if other_malloc else [])]
    body = []
    for row in rows:
        line: list[object] = [_short(row)]
        if row["ours"] not in row["ms"]:
            body.append([*line, f"wrong by {row['checks'][row['ours']]['error']:.1e}: no speed"])
            continue
        line.append(_time(row["ms"][row["ours"]]))
        line += [_ratio(row, name) for name in peers]
        if other_malloc:
            line.append(_ratio(default.get(row["case"], {"ratio": {}, "checks": {}}), "plain"))
        body.append(line)
    return _table(header, body)


def _memory_and_limits(rows: list[dict], limits: dict) -> Iterator[str]:
    rows = [row for row in rows if row["ours"] in row["ms"]]
    peaks = any("peak_bytes" in row for row in rows)
    if not rows or not (limits or peaks):
        return
    header = ["case", *(["GFLOP/s", "of the limit"] if limits else [])]
    header += ["ours, MiB", "plain, MiB", "ratio", "least of the others, MiB"] if peaks else []
    body = []
    for row in rows:
        line: list[object] = [_short(row)]
        if limits:
            rate = 1e-6 * row["floor"]["flops"] / row["ms"][row["ours"]]["median"]
            line += [f"{rate:.1f}", f"{100 * share_of_limit(row, limits):.0f} %"]
        if peaks:
            bytes_of = row.get("peak_bytes", {})
            others = {n: b for n, b in bytes_of.items() if n not in (row["ours"], "plain")}
            least = min(others, key=others.get, default=None)
            line += [
                _mib(bytes_of.get(row["ours"])),
                _mib(bytes_of.get("plain")),
                _memory_ratio(row, "plain"),
            ]
            line.append("" if least is None else f"{_mib(others[least])} ({least})")
        body.append(line)
    yield _table(header, body)


def _absences(rows: list[dict]) -> Iterator[str]:
    """Who took no part, and whose answer was wrong; said once where it is the same in every case."""
    why: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, reason in row["absent"].items():
            why.setdefault(name, {}).setdefault(reason, []).append(_short(row))
        for name, verdict in row["checks"].items():
            if not verdict["right"] and name != row["ours"]:
                why.setdefault(name, {}).setdefault("gave a wrong answer", []).append(_short(row))
    lines = []
    for name, reasons in why.items():
        for reason, found in reasons.items():
            of = "" if len(found) == len(rows) else f" ({'; '.join(found)})"
            lines.append(f"- {name}: {' '.join(reason.split())}{of}")
    if lines:
        yield "Absent:\n\n" + "\n".join(lines)


# ---- the other parts


def _targets(machine: Measured) -> Iterator[str]:
    """Where each case that has a target stands."""
    if machine.main.get("threads") != 2 or machine.main.get("device") != "cpu":
        return
    body = []
    for target in targets.TARGETS:
        run = machine.default if target.malloc == "default" else machine.main
        row = run["rows"].get(target.case)
        found = None if row is None or run.get("malloc") != target.malloc else reached(row, target)
        if found is None:
            continue
        name, value = found
        short = target.what == "MB"  # the less the better
        met = value <= target.must if short else value >= target.must
        aimed = target.aim is not None and value >= target.aim
        unit = " MB" if short else "x" if target.what == "time" else "x less memory"
        against = name if target.against == targets.BEST else target.against
        marks = target.case + (", default malloc" if target.malloc == "default" else "")
        body.append(
            [
                marks,
                against if not short else "",
                f"{target.must:g}{unit}",
                "" if target.aim is None else f"{target.aim:g}{unit}",
                f"**{value:.1f}{unit}**",
                "aim reached" if aimed else "met" if met else "missed",
            ]
        )
    if body:
        yield "### Targets"
        yield _table(("case", "against", "must", "aim", "measured", ""), body)


def reached(row: dict, target: targets.Target) -> tuple[str, float] | None:
    """Whom a target's case was measured against, and what was reached; None where it was not measured."""
    name = best_peer(row) if target.against == targets.BEST else target.against
    if target.what == "time":
        return (name, row["ratio"][name]["median"]) if name in row["ratio"] else None
    peaks = row.get("peak_bytes", {})
    if row["ours"] not in peaks:
        return None
    if target.what == "MB":
        return name, 1e-6 * peaks[row["ours"]]
    return (name, peaks[name] / peaks[row["ours"]]) if name in peaks else None


def _weak_spots(machine: Measured) -> Iterator[str]:
    """Every case in which somebody else was faster, or took less memory than half of ours."""
    lines = []
    for row in machine.main["rows"].values():
        for name, ratio in row["ratio"].items():
            if ratio["median"] < 1:
                lines.append(f"- {row['case']}: {name} is {1 / ratio['median']:.2f}x faster than ours")
        peaks = row.get("peak_bytes", {})
        own = peaks.get(row["ours"], 0)
        for name, size in peaks.items():
            if own > 1 << 20 and size < own / 2:
                lines.append(f"- {row['case']}: {name} takes {_mib(size)} MiB, ours {_mib(own)} MiB")
    if machine.main["rows"]:
        yield "### Weak spots"
        yield "\n".join(lines) or "None of the cases measured here."


def _growth(machine: Measured) -> Iterator[str]:
    rows = machine.main.get("scaling", [])
    if not rows:
        return
    names = [name for name in ("native", *PEERS) if any(name in row["slope"] for row in rows)]
    body = []
    for row in rows:
        at = ", ".join(f"{k}={v}" for k, v in row["middle"].items() if k != row["size"])
        for key, what in (("slope", "time"), ("slope_bytes", "memory")):
            if row.get(key):
                values = [f"{row[key][name]:.2f}" if name in row[key] else "" for name in names]
                body.append(
                    [row["op"], f"{row['size']} = {', '.join(map(str, row['values']))}", at, what, *values]
                )
    yield "### How cost grows"
    yield (
        "Slopes of log cost over log size: 1 is linear, 2 quadratic; below 1 where a fixed cost still matters."
    )
    yield _table(("operator", "over", "at", "of", *names), body)


def _threads(machine: Measured) -> Iterator[str]:
    rows = machine.main.get("thread_scaling", [])
    if not rows:
        return
    counts = list(dict.fromkeys(count for row in rows for count in row["ms"]))
    body = [
        [row["case"], *(f"{row['speedup'][c]['median']:.2f}x" if c in row["speedup"] else "" for c in counts)]
        for row in rows
    ]
    yield "### Threads"
    yield _table(("case: time on 1 thread / time", *counts), body)


def _instruction_sets(machine: Measured) -> Iterator[str]:
    if not machine.runs:
        return
    runs = machine.instruction_sets()
    if len(runs) < 2:
        return
    cases = [case for case in machine.main["rows"] if all(case in run["rows"] for run in runs.values())]
    body = []
    for case in cases:
        rows = [run["rows"][case] for run in runs.values()]
        if all(row["ours"] in row["ms"] for row in rows):
            times = [row["ms"][row["ours"]]["median"] for row in rows]
            body.append([case, f"{times[0]:.2f} ms", *(f"{time / times[0]:.1f}x" for time in times[1:])])
    yield "### Instruction sets"
    first, *rest = runs
    yield "Ours alone, in runs of their own: time, and how many times longer it is with narrower instructions."
    yield _table(("case", first, *rest), body)


def _steps(machine: Measured) -> Iterator[str]:
    if not machine.steps:
        return
    body = []
    for step in sorted(machine.steps, key=lambda s: (s["model"], s["batch"] * s["points"], s["malloc"])):
        line: list[object] = [
            step["model"],
            f"{step['batch']} x {step['points']}, k={step['k']}",
            step["malloc"],
        ]
        for variant in ("plain", "fused"):
            found = step.get(variant, {})
            line.append(f"{found['seconds']:.2f} s" if "seconds" in found else found.get("failed", ""))
        line.append(f"**{step['speedup']:.1f}x**" if "speedup" in step else "")
        line += [step.get(v, {}).get("peak_mib", "") for v in ("plain", "fused")]
        line.append(f"{step['memory_ratio']:.1f}x" if "memory_ratio" in step else "")
        body.append(line)
    yield "### Whole training steps"
    yield 'Forward, backward and Adam, ours ("fused") and plain PyTorch in turn, each in a process of its own.'
    header = ("model", "clouds", "allocator", "plain", "fused", "ratio", "plain, MiB", "fused, MiB", "ratio")
    yield _table(header, body)
    largest = [step for step in machine.steps if "largest_batch" in step]
    if largest:
        body = [
            [
                step["model"],
                f"{step['points']} points, k={step['k']}",
                f"{step['largest_batch']['limit_mib'] / 1024:.1f} GiB",
                step["largest_batch"]["plain"]["batch"],
                step["largest_batch"]["fused"]["batch"],
            ]
            for step in largest
        ]
        yield "The largest batch that a process of so much memory takes through a step:"
        yield _table(("model", "clouds of", "memory", "plain", "fused"), body)


def _gpu(machine: Measured) -> Iterator[str]:
    for result in machine.gpu:
        known = {row["name"]: row["value"] for row in result["environment"]}
        names = list(dict.fromkeys(name for row in result["speeds"] for name in row["us"]))
        body = []
        for row in result["speeds"]:
            times = [f"{row['us'][name]:.1f}" if name in row["us"] else "" for name in names]
            target = "" if row["target_us"] is None else f"{row['target_us']:.0f}"
            body.append([f"{row['op']} {row['case']}", target, *times])
        yield f"### {known.get('device', 'GPU')}"
        yield (
            f"torch {known.get('torch')}, CUDA {known.get('cuda')}; microseconds, medians, the L2 cache flushed "
            "before each call."
        )
        yield _table(("case", "target", *names), body)
        steps = [
            [
                f"{step['model']}, {step['batch']} x {step['points']}, {variant}",
                f"{1e3 * step[variant]['seconds']:.2f}",
                f"{step[variant]['shapes_per_second']:.0f}",
                step[variant]["peak_mib"],
            ]
            for step in result.get("steps", ())
            for variant in ("plain", "fused")
            if "seconds" in step.get(variant, {})
        ]
        if steps:
            yield "Whole training steps: forward, backward and Adam."
            yield _table(("step", "ms", "shapes/s", "peak MiB"), steps)


_PARTS = (_targets, _weak_spots, _steps, _operators, _growth, _threads, _instruction_sets, _gpu)


# ---- text


def _short(row: dict) -> str:
    """A case without its operator's name, and where its points are from."""
    source = "" if row["source"] == "random" else f" [{row['source']}]"
    return row["case"].removeprefix(f"{row['op']} ") + source


def _time(time: dict) -> str:
    spread = f" ({time['low']:.2f} to {time['high']:.2f})" if "low" in time else ""
    return f"{time['median']:.2f}{spread}"


def _ratio(row: dict, name: str) -> str:
    if name in row["ratio"]:
        ratio = row["ratio"][name]
        return f"**{ratio['median']:.1f}x** ({ratio['low']:.1f} to {ratio['high']:.1f})"
    return "wrong" if not row["checks"].get(name, {"right": True})["right"] else ""


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"


def _memory_ratio(row: dict, name: str) -> str:
    peaks = row.get("peak_bytes", {})
    if name not in peaks or peaks.get(row["ours"], 0) < 1 << 20:
        return ""  # below a MiB pages and workspace decide
    return f"{peaks[name] / peaks[row['ours']]:.1f}x"


def _table(header: Sequence[object], body: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *([*row, *[""] * (len(header) - len(row))] for row in body)]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of result files; one a machine")
    parser.add_argument("--out", type=Path, help="the page; default: report.md in the first folder")
    parser.add_argument("--no-plots", action="store_true")
    args = parser.parse_args(arguments)
    out = args.out or args.folders[0] / "report.md"
    try:
        write(args.folders, out, plots=not args.no_plots)
    except (ValueError, ImportError) as error:
        sys.exit(f"benchmarks.report: {error}")
    print(out)


if __name__ == "__main__":
    main()
