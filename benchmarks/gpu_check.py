"""The stages of scripts/gpu_check.sh in Python. Each writes JSON as it goes: a time limit loses only what is left.

    python -m benchmarks.gpu_check environment|behaviour|small|speeds|paths --device cuda --out FILE [--only OP]
    python -m benchmarks.gpu_check summary --out FOLDER

On the CPU (a rehearsal) the same code runs on tiny shapes, and what only a GPU can show is marked NEEDS_GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import contrast_paths, peers, registry, train_step
from benchmarks.knn_paths import SETTINGS, measure
from benchmarks.measure import Clock, backends, runner
from benchmarks.memory import extra_bytes
from benchmarks.small_calls import Small, small_calls
from benchmarks.truth import judge
from crosspoint import ops
from crosspoint.ops import _library

NEEDS_GPU = "needs a GPU"
OPS = tuple(sorted({row.op for row in ops.describe_backends()}))
STAGES = (
    "install",
    "build",
    "environment",
    "behaviour",
    "speeds",
    "steps",
    "paths",
    "battery",
    "wgmma",
    "sanitizers",
)
SCHEMA = 1


class Report:
    """A JSON file that is whole after every row."""

    def __init__(self, path: Path, **head: object) -> None:
        self.path, self.value = path, {**head, "rows": []}
        self.save()

    def add(self, **row: object) -> dict:
        self.value["rows"].append(row)
        print(json.dumps(row), flush=True)
        self.save()
        return row

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.value, indent=2) + "\n")
        partial.replace(self.path)


# ---- environment


def environment(device: str, report: Report) -> None:
    """What the machine is, and which peers it has."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "processor_threads": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": NEEDS_GPU,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    try:
        facts["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        facts["triton"] = None
    facts |= peers.versions()
    for name, value in facts.items():
        report.add(name=name, value=value)
    report.add(name="build", value=_library.load_error or _library.build_info().splitlines())
    report.add(name="backends", value={op: backends(op, device) for op in OPS})


# ---- behaviour: small calls


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def forward_backward(small: Small, impl: str) -> list[Tensor]:
    """Outputs, then the gradients of the sum of what is finite in them, where they have any."""
    leaves = [x.detach().clone().requires_grad_() for x in small.inputs]
    outputs = tensors(small.call(impl, *leaves))
    smooth = [y.where(y.isfinite(), 0).sum() for y in outputs if y.requires_grad]
    gradients = torch.autograd.grad(sum(smooth), leaves) if smooth else ()
    return [*(y.detach() for y in outputs), *gradients]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


def run_small(device: str, report: Report, only: str | None) -> None:
    """Every small call once, forward and backward: what the sanitizers watch."""
    for small in small_calls(device, only):
        for impl in backends(small.op, device):
            forward_backward(small, impl)
            if device == "cuda":
                torch.cuda.synchronize()
            report.add(op=small.op, case=small.name, backend=impl, status="ran")


def deterministic(small: Small, impl: str) -> None:
    first = forward_backward(small, impl)
    for run in range(9):
        assert same_bits(forward_backward(small, impl), first), f"run {run + 2} of 10 differs from the first"


def captured(small: Small, impl: str) -> None:
    """A graph that is replayed on new inputs gives what a plain call gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            small.call(impl, *small.inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            outputs = tensors(small.call(impl, *small.inputs))
        for x in small.inputs:
            x.mul_(-0.5).add_(0.25)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(outputs, tensors(small.call(impl, *small.inputs))), "the replayed graph differs"


def on_its_stream(small: Small, impl: str) -> None:
    """Inputs that a stream has yet to change are read after it has."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles, about 25 ms
        for x in small.inputs:
            x.mul_(-0.5).add_(0.25)
        outputs = tensors(small.call(impl, *small.inputs))
    torch.cuda.synchronize()
    with torch.no_grad():
        assert same_bits(outputs, tensors(small.call(impl, *small.inputs))), (
            "the call did not wait for its stream"
        )


CHECKS = {
    "ten runs give the same bits": (deterministic, False),
    "CUDA graph": (captured, True),
    "non-default stream": (on_its_stream, True),
}


def behaviour(device: str, report: Report, only: str | None) -> None:
    """Every check on every small call and backend; a failure is a row like any other."""
    for small in small_calls(device, only):
        for impl in backends(small.op, device):
            for name, (check, needs_gpu) in CHECKS.items():
                row = {"op": small.op, "case": small.name, "backend": impl, "check": name}
                if needs_gpu and device != "cuda":
                    report.add(**row, status=NEEDS_GPU)
                    continue
                try:
                    check(small, impl)
                    report.add(**row, status="passed")
                except Exception as error:
                    report.add(**row, status="failed", why=f"{type(error).__name__}: {error}"[:500])


# ---- speeds


def speed_cases(device: str, only: str | None) -> Iterator[registry.Case]:
    """What benchmarks/registry.py has for GPUs: of one operator, also the compositions that run on it."""
    for case in registry.cases(None, ["gpu" if device == "cuda" else "tiny"]):
        runs_on = registry.ENTRIES[case.op].backends_of
        rehearsed = device == "cuda" or case.kind == "normal"
        if rehearsed and only in (None, case.op, runs_on) and backends(runs_on, device):
            yield case


def speeds(device: str, report: Report, only: str | None, seconds: float = math.inf) -> None:
    """Ours and plain PyTorch for every case, then peers, then what needs compiling; none begins after `seconds`."""
    clock = Clock(device)
    end = time.monotonic() + seconds
    rows = {}
    for case in speed_cases(device, only):
        rows[case.name] = report.add(
            op=case.op, case=case.name.removeprefix(f"{case.op} "), us={}, extra_bytes={}, errors={}, absent={},
            target_us=case.target_us, flops=registry.ENTRIES[case.op].floor(case).flops,
        )  # fmt: skip

    def attempt(row: dict, name: str, problem: registry.Problem) -> None:
        """Nothing is timed whose answer is wrong."""
        if time.monotonic() > end:
            row["errors"][name] = "no time left"
            return
        try:
            run = runner(name, problem)
            verdict = judge(problem, run(), is_ours=name not in peers.PEERS)
            if verdict.right:
                row["extra_bytes"][name] = extra_bytes(run) if device == "cuda" else NEEDS_GPU
                row["us"][name] = 1e6 * clock.median(run)
            else:
                row["errors"][name] = f"wrong by {verdict.error:.1e}"
        except Exception as error:
            row["errors"][name] = f"{type(error).__name__}: {error}"[:300]
        print(row["op"], row["case"], name, row["us"].get(name) or row["errors"].get(name), flush=True)
        report.save()

    others = [name for name in peers.PEERS if name not in ("plain", peers.COMPILED)]
    for names in (["plain"], others, [peers.COMPILED]):
        for case in speed_cases(device, only):
            row = rows[case.name]
            if names == [peers.COMPILED] and device != "cuda":
                row["errors"][peers.COMPILED] = NEEDS_GPU
                continue
            impls = backends(registry.ENTRIES[case.op].backends_of, device) if names == ["plain"] else []
            taking_part = [*impls]
            for name in (name for name in names if name in peers.of(case.op)):
                if why := peers.why_not(name, case, device):
                    row["absent"][name] = why
                else:
                    taking_part.append(name)
            if taking_part and time.monotonic() < end:
                problem = registry.build(case, device)
                for name in taking_part:
                    attempt(row, name, problem)
            else:
                row["errors"].update(dict.fromkeys(taking_part, "no time left"))
    report.save()


# ---- paths


def paths(device: str, report: Report) -> None:
    """The searches of k-NN around the numbers that choose between them; contrastive losses by wgmma and mma.sync."""
    clock = Clock(device) if device == "cuda" else None

    def timed(run: Callable[[], object]) -> float:
        return 1e6 * clock.median(run)

    def attempt(rows: Iterable[dict], **head: object) -> None:
        try:
            for row in rows:
                report.add(**head, **row)
        except Exception as error:
            report.add(**head, status="failed", why=f"{type(error).__name__}: {error}"[:300])

    for setting in SETTINGS:
        if clock is None:
            report.add(setting=setting.name, paths=list(setting.paths), status=NEEDS_GPU)
        else:
            attempt(measure(setting, device, timed), setting=setting.name)
    hopper = clock is not None and torch.cuda.get_device_capability() == (9, 0)
    for case in contrast_paths.CASES:
        if hopper:
            attempt(contrast_paths.measure(case, device, timed), setting=contrast_paths.SETTING, op=case.op)
        else:
            report.add(setting=contrast_paths.SETTING, op=case.op, status=NEEDS_GPU)


# ---- summary


def summary(folder: Path) -> dict:
    """One JSON of what all stages left in the folder, and a table of it."""
    stages = {}
    for line in (folder / "stages.tsv").read_text(errors="replace").splitlines():
        name, status, seconds, last_line = line.split("\t")
        stages[name] = {"status": status, "seconds": int(seconds), "last_line": last_line}
    # The last ones run side by side, and end in any order.
    whole: dict = {"schema": SCHEMA, "stages": {name: stages[name] for name in STAGES if name in stages}}
    for part in ("environment", "behaviour", "speeds", "paths"):
        path = folder / f"{part}.json"
        whole[part] = json.loads(path.read_text())["rows"] if path.exists() else []
    paths = (folder / f"step_{model}.json" for model in train_step.MODELS)
    whole["steps"] = [json.loads(path.read_text()) for path in paths if path.exists()]
    (folder / "gpu_check.json").write_text(json.dumps(whole, indent=2) + "\n")
    (folder / "table.txt").write_text(table(whole))
    return whole


def table(whole: dict) -> str:
    facts = {row["name"]: row["value"] for row in whole["environment"]}
    lines = [f"device {facts.get('device')}, torch {facts.get('torch')}, CUDA {facts.get('cuda')}", ""]
    lines += [
        f"{name:14s} {s['status']:14s} {s['seconds']:4d} s  {s['last_line'][:90]}"
        for name, s in whole["stages"].items()
    ]
    lines += ["", "checks that did not pass:"]
    lines += [
        f"  {row['op']} {row['case']} {row['backend']}, {row['check']}: {row['status']} {row.get('why', '')}"
        for row in whole["behaviour"]
        if row["status"] not in ("passed", NEEDS_GPU)
    ] or ["  none"]
    lines += ["", "microseconds (median, L2 flushed); extra: peak bytes beyond inputs and outputs"]
    for row in whole["speeds"]:
        times = "  ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
        target = "" if row["target_us"] is None else f"  (target {row['target_us']:.0f})"
        extra = "  ".join(f"{name} {size}" for name, size in row["extra_bytes"].items())
        lines.append(f"{row['op']} {row['case']}: {times}{target}; extra: {extra}")
        rates = "  ".join(f"{name} {1e-6 * row['flops'] / us:.1f}" for name, us in row["us"].items())
        lines += [f"    TFLOP/s of the least work: {rates}"] if rates else []
        lines += [f"    {name}: {why}" for name, why in {**row["errors"], **row["absent"]}.items()]
    lines += ["", "whole training steps"]
    for step in whole["steps"]:
        name = f"{step['model']} {step['batch']} x {step['points']}"
        lines += [
            f"{name} {variant}: {_step(step[variant])}" for variant in train_step.VARIANTS if variant in step
        ]
    lines += ["", "by path, microseconds"]
    for row in whole["paths"]:
        found = row.get("us") or row["status"]
        lines.append(f"{row['setting']} {row.get('op', '')} {tuple(row.get('shape', ()))}: {found}")
    return "\n".join(lines) + "\n"


def _step(found: dict) -> str:
    if "failed" in found:
        return found["failed"]
    return f"{1e3 * found['seconds']:.2f} ms, {found['shapes_per_second']:.0f} shapes/s, peak {found['peak_mib']} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("environment", "behaviour", "small", "speeds", "paths", "summary"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="the stage's JSON; of summary, the folder")
    parser.add_argument("--only", choices=OPS)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of speeds: begin no measurement after"
    )
    args = parser.parse_args()
    if args.stage == "summary":
        print(table(summary(args.out)))
        return
    report = Report(args.out, device=args.device)
    if args.stage == "environment":
        environment(args.device, report)
        return
    if args.stage == "paths":
        paths(args.device, report)
    elif args.stage == "speeds":
        speeds(args.device, report, args.only, args.seconds)
    else:
        {"behaviour": behaviour, "small": run_small}[args.stage](args.device, report, args.only)
    if not report.value["rows"]:
        print(f"no backend here runs {args.only or 'any operator'} on {args.device}")
        sys.exit(1)
    if any(row.get("status") == "failed" for row in report.value["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
