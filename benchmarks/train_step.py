"""Time and peak memory of one DGCNN training step, fused and plain, measured in one run.

    python -m benchmarks.train_step --batch 32 --points 2048 --k 20 --steps 3 --out step.json

Each variant lives in a process of its own (peak resident memory is a process's figure), holds the same weights
and the same clouds, and steps in turn with the others, so that a change of the machine's speed meets all of
them. With `--malloc tuned` glibc keeps large blocks instead of returning them to the kernel after every tensor:
the harder baseline, because most of what the plain step loses otherwise is page faults.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import TUNED_MALLOC, peak_resident
from benchmarks.plain import PlainDGCNN, plain_state
from crosspoint.models import DGCNN

VARIANTS = ("fused", "plain")


def clouds(batch: int, points: int) -> Tensor:
    """Points on ellipsoids of random proportions, (B, N, 3), in the unit ball."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(batch, points, 3, generator=generator)
    radii = torch.rand(batch, 1, 3, generator=generator) * 0.8 + 0.2
    return torch.nn.functional.normalize(direction, dim=2) * radii


def make_model(variant: str, k: int) -> torch.nn.Module:
    torch.manual_seed(0)
    fused = DGCNN(k, projection_dim=None)
    if variant == "fused":
        return fused
    plain = PlainDGCNN(k, projection_dim=None)
    plain.load_state_dict(plain_state(fused.state_dict()))
    return plain


def serve(variant: str, args: argparse.Namespace, pipe: Connection) -> None:
    """A variant's process: one training step (forward, backward, Adam) for every message."""
    torch.set_num_threads(args.threads)
    model = make_model(variant, args.k).train()
    points = clouds(args.batch, args.points)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # Libraries get loaded and the thread pool started before memory is counted.
    model(points[:2, : max(args.k, 64)]).square().mean().backward()
    model.load_state_dict(make_model(variant, args.k).state_dict())
    base = peak_resident()
    while pipe.recv() == "step":
        started = time.perf_counter()
        feature = model(points)
        loss = feature.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - started
        pipe.send({"seconds": seconds, "loss": loss.item(), "peak_bytes": peak_resident() - base})


def measure(args: argparse.Namespace) -> dict:
    context = multiprocessing.get_context("spawn")
    former = {name: os.environ.get(name) for name in TUNED_MALLOC}
    if args.malloc == "tuned":
        os.environ.update(TUNED_MALLOC)
    pipes, workers = {}, []
    for variant in args.variants:
        pipes[variant], other = context.Pipe()
        workers.append(context.Process(target=serve, args=(variant, args, other), daemon=True))
        workers[-1].start()
        other.close()
    for name, value in former.items():
        if value is None:
            os.environ.pop(name, None)
    steps = {variant: [] for variant in args.variants}
    for _ in range(args.steps):
        for variant, pipe in pipes.items():
            pipe.send("step")
            steps[variant].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send("stop")
    for worker in workers:
        worker.join()
    return summarise(args, steps)


def summarise(args: argparse.Namespace, steps: dict[str, list[dict]]) -> dict:
    first_losses = [runs[0]["loss"] for runs in steps.values()]
    # Distances that round differently flip a few neighbours: the losses agree closely, not bitwise.
    if max(first_losses) - min(first_losses) > 1e-3 * abs(first_losses[0]):
        raise SystemExit(f"the variants disagree, so no speed is reported: first losses {first_losses}")
    result = {
        "batch": args.batch,
        "points": args.points,
        "k": args.k,
        "threads": args.threads,
        "malloc": args.malloc,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    for variant, runs in steps.items():
        result[variant] = {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "seconds_all": [round(run["seconds"], 4) for run in runs],
            "peak_mib": round(max(run["peak_bytes"] for run in runs) / 2**20),
            "loss": runs[0]["loss"],
        }
    if set(VARIANTS) <= set(steps):
        pairs = zip(steps["plain"], steps["fused"], strict=True)
        result["speedup"] = statistics.median(p["seconds"] / f["seconds"] for p, f in pairs)
        result["memory_ratio"] = result["plain"]["peak_mib"] / result["fused"]["peak_mib"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--malloc", choices=("default", "tuned"), default="default")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = measure(args)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
