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
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.knn_paths import SETTINGS, measure
from benchmarks.ops import edge_conv_cases, nt_xent_cases
from benchmarks.plain import nearest
from benchmarks.small_calls import Small, small_calls
from crosspoint import ops
from crosspoint.ops import _library, reference
from crosspoint.testing import assert_same_graph

NEEDS_GPU = "needs a GPU"
OPS = tuple(sorted({row.op for row in ops.describe_backends()}))
TIMED = ("knn_graph", "knn", "edge_conv", "nt_xent")
STAGES = ("install", "build", "environment", "behaviour", "speeds", "paths", "battery", "sanitizers")
PEERS = ("flashlib", "pytorch3d", "torch_cluster", "pyg_lib", "torch_geometric", "lightly")
SCHEMA = 1


def backends(op: str, device: str) -> list[str]:
    """The compiled backends that can run `op` on `device`."""
    rows = ops.describe_backends()
    return [
        r.backend for r in rows if (r.op, r.device) == (op, device) and r.usable and r.backend != "reference"
    ]


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
    for name in ("triton", *PEERS):
        try:
            facts[name] = metadata.version(name.replace("_", "-"))
        except metadata.PackageNotFoundError:
            facts[name] = None
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


class Case(NamedTuple):
    """What is timed; `check` raises where ours is wrong."""

    op: str
    name: str
    run: Callable[[str], Callable[[], object]]  # impl -> a call without arguments
    check: Callable[[object], None]
    plain: Callable[[], object] | None
    peers: dict[str, Callable[[], object]]
    target_us: float | None = None


def knn_cases(op: str, device: str) -> Iterator[Case]:
    shapes = [
        ((32, 1024, 3), 20, 20.0),
        ((32, 1024, 64), 20, 60.0),
        ((32, 1024, 128), 20, 110.0),
        ((64, 2048, 3), 20, None),
        ((1, 100_000, 3), 20, 150.0),
        ((1, 1_000_000, 3), 16, 1200.0),
    ]
    if device == "cpu":
        shapes = [((2, 100, 3), 5, None), ((1, 80, 16), 5, None)]
    for shape, k, target in shapes:
        torch.manual_seed(0)
        x = torch.randn(shape)
        rows = torch.arange(0, shape[1], max(1, shape[1] // 16))

        def check(idx: object, x: Tensor = x, k: int = k, rows: Tensor = rows) -> None:
            query = x[:, rows]
            assert_same_graph(idx[:, rows], reference.knn(query, x, k)[1], x, query)

        def run(impl: str, x: Tensor = x, k: int = k) -> Callable[[], Tensor]:
            if op == "knn":
                return lambda: ops.knn(x, x, k, impl=impl)[1]
            return lambda: ops.knn_graph(x, k, impl=impl)

        columns = x.transpose(1, 2).contiguous()
        matrix_fits = shape[0] * shape[1] ** 2 <= 1 << 30
        plain = (lambda columns=columns, k=k: nearest(columns, k)) if matrix_fits else None
        yield Case(op, f"{shape}, k={k}", run, check, plain, knn_peers(x, k), target)


def knn_peers(x: Tensor, k: int) -> dict[str, Callable[[], object]]:
    def pytorch3d() -> object:
        from pytorch3d.ops import knn_points

        return knn_points(x, x, K=k).idx

    batch = torch.arange(x.shape[0]).repeat_interleave(x.shape[1])
    flat = x.flatten(0, 1)

    def torch_cluster() -> object:
        from torch_cluster import knn

        return knn(flat, flat, k, batch, batch)

    return {"pytorch3d": pytorch3d, "torch_cluster": torch_cluster}


def training_cases(op: str, device: str) -> Iterator[Case]:
    """The cases of benchmarks/ops.py, forward and backward."""

    def build(impl: str) -> list:
        torch.manual_seed(0)
        if op == "edge_conv":
            return list(edge_conv_cases(impl, *((32, 1024, 20) if device == "cuda" else (1, 30, 4))))
        return list(nt_xent_cases(impl, (256, 1024, 4096, 16384) if device == "cuda" else (16,)))

    for i, (name, _, plain, agree) in enumerate(build("reference")):

        def check(ours: object, plain=plain, agree=agree) -> None:
            assert agree(ours, plain()), "differs from plain PyTorch"

        yield Case(op, name, lambda impl, i=i: build(impl)[i][1], check, plain, {})


def cases(device: str, only: str | None) -> Iterator[Case]:
    for op in TIMED:
        if only not in (None, op) or not backends(op, device):
            continue
        yield from knn_cases(op, device) if op in ("knn_graph", "knn") else training_cases(op, device)


class Clock:
    """Median time of a call in microseconds, with the L2 cache flushed before it and the launches queued ahead."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        once = self.once(run)
        return statistics.median(self.once(run) for _ in range(int(min(30, max(5, 0.3e6 / once)))))

    def once(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            started = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        torch.cuda._sleep(2_000_000)  # about 1 ms, in which the host gets ahead
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)


def extra_bytes(run: Callable[[], object], device: str) -> int | str:
    """Peak memory of a call beyond what was there before and what it returns."""
    if device != "cuda":
        return NEEDS_GPU
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = tensors(run())
    torch.cuda.synchronize()
    returned = sum(y.untyped_storage().nbytes() for y in result if isinstance(y, Tensor))
    return torch.cuda.max_memory_allocated() - before - returned


def speeds(device: str, report: Report, only: str | None, seconds: float = math.inf) -> None:
    """Ours and plain PyTorch for every case, then peers, then what needs compiling; none begins after `seconds`."""
    clock = Clock(device)
    rows = []
    end = time.monotonic() + seconds

    def attempt(row: dict, name: str, act: Callable[[], float]) -> None:
        if time.monotonic() > end:
            row["errors"][name] = "no time left"
            return
        try:
            row["us"][name] = act()
        except Exception as error:
            row["errors"][name] = f"{type(error).__name__}: {error}"[:300]
        print(row["op"], row["case"], name, row["us"].get(name) or row["errors"].get(name), flush=True)
        report.save()

    with torch.device(device):
        for case in cases(device, only):
            row = report.add(
                op=case.op, case=case.name, us={}, extra_bytes={}, errors={}, target_us=case.target_us
            )
            rows.append((row, case))
            for impl in backends(case.op, device):

                def measured(case=case, impl=impl, row=row) -> float:
                    run = case.run(impl)
                    case.check(run())
                    row["extra_bytes"][impl] = extra_bytes(run, device)
                    return clock(run)

                attempt(row, impl, measured)
            if case.plain is not None:
                attempt(row, "plain", lambda case=case: clock(case.plain))
        for row, case in rows:
            for name, peer in case.peers.items():
                if _installed(name):
                    attempt(row, name, lambda peer=peer: clock(peer))
        for row, case in rows:
            if device != "cuda":
                row["errors"]["compiled"] = NEEDS_GPU
            elif case.plain is not None:
                attempt(row, "compiled", lambda case=case: clock(torch.compile(case.plain, dynamic=False)))
    report.save()


def _installed(package: str) -> bool:
    try:
        metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return False
    return True


# ---- paths


def paths(device: str, report: Report) -> None:
    """The searches of k-NN around the numbers that choose between them."""
    clock = Clock(device) if device == "cuda" else None
    for setting in SETTINGS:
        if clock is None:
            report.add(setting=setting.name, paths=list(setting.paths), status=NEEDS_GPU)
            continue
        try:
            for row in measure(setting, device, clock):
                report.add(**row)
        except Exception as error:
            report.add(setting=setting.name, status="failed", why=f"{type(error).__name__}: {error}"[:300])


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
        lines += [f"    {name}: {error}" for name, error in row["errors"].items()]
    lines += ["", "k-NN by path, microseconds"]
    for row in whole["paths"]:
        found = row.get("us") or row["status"]
        lines.append(f"{row['setting']} {tuple(row.get('shape', ()))}: {found}")
    return "\n".join(lines) + "\n"


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
