"""Our operators against their peers: judged, then timed in turn.

    python -m benchmarks.run                                          the layers of DGCNN against plain PyTorch
    python -m benchmarks.run --only knn_graph edge_conv --rounds 7 --malloc tuned --out results.json
    python -m benchmarks.run --size large --case 100000 --peers scipy faiss --data SCANS_AND_MESHES
    python -m benchmarks.run --peers all --memory --scaling --thread-scaling --out results.json

Every round runs ours, then each peer; a ratio is the median over rounds of theirs / ours, so that a change of the
machine's speed meets all of them. `--malloc tuned` starts again with glibc told to keep large blocks: by default
every tensor above 32 MB goes back to the kernel and is zeroed page by page when it is next allocated, which doubles
the time of the plain code. `python -m benchmarks.report` makes a page of the results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import inputs, machine, measure, registry, scaling
from benchmarks.memory import peak_apart
from benchmarks.peers import PEERS
from benchmarks.registry import Case

SCHEMA = 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=registry.OPS, help="operators; default: all")
    parser.add_argument(
        "--size", nargs="+", choices=registry.SIZES, default=["layer"], help="groups of cases"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument(
        "--peers", nargs="*", choices=[*PEERS, "all"], default=["plain"], help="whom to measure against"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--impl", help="our backend; default: the first that is compiled for the device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch and the peers; default: torch's own choice")
    parser.add_argument("--malloc", choices=("default", "tuned"), default="default")
    parser.add_argument(
        "--memory", action="store_true", help="also peak memory, a process for each case and peer"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="also how cost grows with N, C, k, B and the batch"
    )
    parser.add_argument(
        "--thread-scaling", action="store_true", help="also the same calls on 1, 2, ... threads"
    )
    parser.add_argument("--no-ratios", action="store_true", help="only the growth and the threads asked for")
    parser.add_argument("--data", metavar="FOLDER", help=f"of meshes and scans; or {inputs.DATA}")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--out", type=Path, help="JSON, whole after every case")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def peers_of(args: argparse.Namespace) -> list[str]:
    return list(PEERS) if "all" in args.peers else list(args.peers)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.data:
        os.environ[inputs.DATA] = args.data
    if args.malloc == "tuned" and not machine.tuned_malloc():
        command = [
            sys.executable,
            "-m",
            "benchmarks.run",
            *(sys.argv[1:] if arguments is None else arguments),
        ]
        os.execve(sys.executable, command, {**os.environ, **machine.TUNED_MALLOC})
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = list(registry.cases(args.only, args.size, args.case))
    if not chosen:
        sys.exit(
            f"no case of {args.only or 'any operator'} in {args.size} has {args.case!r} in its name; see --list"
        )
    if args.list:
        print("\n".join(f"{case.size:7s} {case.name}" for case in chosen))
        return
    others = machine.Others()
    results: dict = {"schema": SCHEMA, **machine.facts(args.device), "limits": machine.limits(args.device)}
    print(", ".join(f"{name} {value}" for name, value in results.items() if isinstance(value, str | int)))
    print(", ".join(f"{name} {value:.0f}" for name, value in results["limits"].items()), flush=True)
    for part, rows in (
        ("rows", () if args.no_ratios else ratios(args, chosen, others)),
        (
            "scaling",
            scaling.growth(args.only, peers_of(args), args.rounds, args.memory) if args.scaling else (),
        ),
        ("thread_scaling", scaling.over_threads(chosen, args.rounds) if args.thread_scaling else ()),
    ):
        results[part] = []
        for row in rows:
            results[part].append(row)
            results["others"] = others.share()
            if args.out:
                save(args.out, results)


def save(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def ratios(args: argparse.Namespace, chosen: Sequence[Case], others: machine.Others) -> Iterator[dict]:
    for case in chosen:
        with others.watched():
            row = measure.measure(case, peers_of(args), args.rounds, args.device, args.impl)
        if args.memory and args.device == "cpu":
            row["peak_bytes"] = {name: peak_apart(case, name) for name in row["ms"]}
        print("\n".join(lines(row)), flush=True)
        yield row


def lines(row: dict) -> Iterator[str]:
    """A row as text: only what was right has a time."""
    impl = row["ours"]
    if impl not in row["ms"]:
        yield f"{row['case']}: our answer ({impl}) is wrong by {row['checks'][impl]['error']:.1e}: no speed is reported"
        return
    own = row["ms"][impl]
    source = "" if row["source"] == "random" else f"  [{row['source']}]"
    yield f"{row['case']}: {own['median']:.3f} ms ({own['low']:.3f} to {own['high']:.3f}){memory(row, impl)}{source}"
    for name, verdict in row["checks"].items():
        if name == impl:
            continue
        if not verdict["right"]:
            yield f"    {name:24s} wrong by {verdict['error']:.1e}: no speed is reported"
            continue
        ratio = row["ratio"][name]
        yield (
            f"    {name:24s} {row['ms'][name]['median']:10.2f} ms, ratio {ratio['median']:6.1f} "
            f"({ratio['low']:.1f} to {ratio['high']:.1f}){memory(row, name)}"
        )
    for name, why in row["absent"].items():
        yield f"    {name:24s} absent: {why}"


def memory(row: dict, name: str) -> str:
    return f", {row['peak_bytes'][name] / 2**20:.1f} MiB" if name in row.get("peak_bytes", {}) else ""


if __name__ == "__main__":
    main()
