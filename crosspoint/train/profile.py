"""Where the time of a pre-training step goes, and how fast the input pipeline is by itself."""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from crosspoint._files import replace_file
from crosspoint.train.config import PretrainConfig, config_to_dict
from crosspoint.train.pretrain import Run, check_ranks, open_dataset
from crosspoint.train.ranks import joined
from crosspoint.train.repeatable import isolated

__all__ = ["ProfileConfig", "profile"]

log = logging.getLogger(__name__)

_WAIT = "wait for data"
_PARTS = (_WAIT, "augment", "forward", "backward", "forward and backward", "optimizer")
_SHOWN = 12  # operators in the table


@dataclass
class ProfileConfig(PretrainConfig):
    """Take some steps of a pre-training and say where their time goes; nothing of the training is kept.

    Takes every option of `crosspoint pretrain`. Writes profile.json and trace.json, which chrome://tracing and
    ui.perfetto.dev show, to OUT.
    """

    out: str = "runs/profile"
    """Folder for profile.json and trace.json."""
    steps: int = 10
    """Steps to measure."""
    warm_up: int = 2
    """Steps before them, which are not measured."""

    def validate(self) -> None:
        """Raise ValueError, naming the option, if a value cannot work."""
        super().validate()
        for name, least in (("steps", 1), ("warm_up", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.resume:
            raise ValueError("resume must be off: a profile continues no run")


def profile(config: ProfileConfig) -> dict[str, Any]:
    """Measure; write profile.json and trace.json, print a table, return what profile.json holds.

    Keys: pipeline (pairs per second of loading alone, as fast as it goes; without worker processes also the processor
    time of a pair, which other programs change less), step (pairs per second of whole steps, seconds of one), parts
    (name -> milliseconds of the host in a step, and of the GPU where there is one), operators (those that take longest
    by themselves: name, calls in a step, milliseconds), config.

    Raises ValueError for options that cannot work, fewer steps in the training than are to be measured, and several
    processes; FileNotFoundError where there is no data.
    """
    config.validate()
    with joined(config.device) as ranks:
        if ranks.world > 1:
            raise ValueError(f"one process makes a profile, got {ranks.world}")
        check_ranks(config, ranks)
        out = Path(config.out)
        dataset = open_dataset(config, out)
        out.mkdir(parents=True, exist_ok=True)
        with isolated(ranks.device):
            run = Run(config, dataset, ranks, None)
            wanted = config.warm_up + config.steps
            if run.total < wanted:
                raise ValueError(
                    f"the training has {run.total} steps, fewer than warm_up + steps = {wanted}; give more "
                    "--epochs, or fewer --steps"
                )
            results = {"pipeline": _load(run, config), **_take_steps(run, config, out)}
    results["config"] = config_to_dict(config)
    text = json.dumps(results, indent=2)
    replace_file(out / "profile.json", lambda file: file.write(text.encode()))
    print(format_table(results))
    print(f"written: {out / 'profile.json'}, {out / 'trace.json'}")
    return results


def _load(run: Run, config: ProfileConfig) -> dict[str, float | None]:
    """Loading alone; the first batch, for which worker processes start, is not counted."""
    batches = run.batches()
    next(batches)
    started, cpu_started, count = time.perf_counter(), time.process_time(), 0
    for batch in itertools.islice(batches, config.warm_up + config.steps - 1):
        count += len(batch["index"])
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "pairs_per_second": count / seconds if count else 0.0,
        "cpu_ms_per_pair": 1e3 * cpu_seconds / count if count and config.workers == 0 else None,
        "workers": config.workers,
    }


def _take_steps(run: Run, config: ProfileConfig, out: Path) -> dict[str, Any]:
    on_gpu = run.device.type == "cuda"
    batches = run.batches()

    def step() -> None:
        with record_function(_WAIT):
            batch = next(batches)
        run.train_step(batch)
        run.step += 1

    for _ in range(config.warm_up):
        step()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(config.steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / config.steps
    profiler.export_chrome_trace(str(out / "trace.json"))

    events = profiler.key_averages()
    to_ms = 1e-3 / config.steps  # of microseconds over all steps
    named = {event.key: event for event in events if event.key in _PARTS}
    parts = {
        name: {
            "host_ms": to_ms * named[name].cpu_time_total,
            "gpu_ms": to_ms * named[name].device_time_total if on_gpu else None,
        }
        for name in _PARTS
        if name in named
    }
    of_itself = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operators = sorted(
        (event for event in events if event.key not in _PARTS),
        key=lambda event: getattr(event, of_itself),
        reverse=True,
    )
    return {
        "step": {"seconds": seconds, "pairs_per_second": config.batch_size / seconds},
        "parts": parts,
        "operators": [
            {
                "name": event.key,
                "calls": event.count / config.steps,
                "ms": to_ms * getattr(event, of_itself),
            }
            for event in operators[:_SHOWN]
        ],
    }


def format_table(results: dict[str, Any]) -> str:
    """profile.json as a table for the terminal."""
    step, loading = results["step"], results["pipeline"]
    whole = 1e3 * step["seconds"]
    cpu = (
        "" if loading["cpu_ms_per_pair"] is None else f", {loading['cpu_ms_per_pair']:.3f} ms of a core each"
    )
    lines = [
        f"{whole:.1f} ms a step, {step['pairs_per_second']:.1f} pairs/s; loading alone "
        f"{loading['pairs_per_second']:.1f} pairs/s{cpu}",
        "",
        f"{'part of a step':<40}{'host ms':>10}{'share':>8}{'GPU ms':>10}",
    ]
    rest = whole
    for name, part in results["parts"].items():
        rest -= part["host_ms"]
        gpu = "" if part["gpu_ms"] is None else f"{part['gpu_ms']:.2f}"
        lines.append(f"{name:<40}{part['host_ms']:>10.2f}{part['host_ms'] / whole:>8.0%}{gpu:>10}")
    lines.append(f"{'all else':<40}{rest:>10.2f}{rest / whole:>8.0%}")
    lines += ["", f"{'operator, by itself':<60}{'calls':>10}{'ms':>10}{'share':>8}"]
    for row in results["operators"]:
        lines.append(
            f"{row['name'][:58]:<60}{row['calls']:>10.1f}{row['ms']:>10.2f}{row['ms'] / whole:>8.0%}"
        )
    return "\n".join(lines)
