"""Many configurations over seeds: each pre-trained, each evaluated, one table with mean and standard deviation."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosspoint._files import replace_file
from crosspoint._optional import require
from crosspoint.evaluate.cross_modal import CrossModalConfig, evaluate_cross_modal
from crosspoint.evaluate.few_shot import FewShotConfig, evaluate_few_shot
from crosspoint.evaluate.protocol import versions
from crosspoint.evaluate.retrieval import RetrievalConfig, evaluate_retrieval
from crosspoint.evaluate.svm import SvmConfig, evaluate_svm
from crosspoint.train import PretrainConfig, pretrain
from crosspoint.train.config import config_from_dict, config_to_dict, load_config

__all__ = ["SweepConfig", "SweepList", "sweep"]

log = logging.getLogger(__name__)

_RANDOM = "random initialisation"


@dataclass
class SweepConfig:
    """Pre-train and evaluate every configuration of a list with every seed; write one table.

    What is finished is not done again: the same command continues a sweep that was stopped.
    """

    list: Path
    """YAML file: base, seeds, runs, evaluate (docs/api/evaluate.md, configs/sweeps/)."""
    data: str
    """Folder of pairs to pre-train on, or "generated"."""
    out: Path
    """Folder for the runs (NAME/seed_S), sweep.md and sweep.json."""
    labelled: Path = Path("data")
    """Folder of the labelled clouds, or of held-out pairs, that the protocols read; `evaluate` can name another."""
    device: str = "auto"
    """Where the models run: "auto" (the first GPU, else the CPU) or a torch device."""


@dataclass
class SweepList:
    """What a LIST.yaml holds."""

    runs: dict
    """Name -> what differs from the base, as in a recipe; an empty mapping is the base itself."""
    base: dict = field(default_factory=dict)
    """What all runs share, as in a recipe of `crosspoint pretrain`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each run is made with each of them; pre-training and evaluation share it."""
    evaluate: dict = field(default_factory=lambda: {"svm": {}})
    """Protocol (svm, few-shot, retrieval, cross-modal) -> its options. `random_init: true` adds rows to the table."""


class _Protocol(NamedTuple):
    config: type
    run: Any
    metrics: Any  # what its results say of one encoder -> {title: fraction}


_PROTOCOLS = {
    "svm": _Protocol(SvmConfig, evaluate_svm, lambda entry: {"linear SVM": entry["accuracy"]}),
    "few-shot": _Protocol(
        FewShotConfig,
        evaluate_few_shot,
        lambda rows: {f"{row['ways']}-way {row['shots']}-shot": row["mean"] for row in rows},
    ),
    "retrieval": _Protocol(
        RetrievalConfig,
        evaluate_retrieval,
        lambda entry: {"mAP": entry["mean_average_precision"], "k-NN": entry["knn_accuracy"]},
    ),
    "cross-modal": _Protocol(
        CrossModalConfig,
        evaluate_cross_modal,
        lambda entry: {
            f"{way.replace('_', ' ')}, recall@1": entry[way]["recall_at_1"]
            for way in ("image_to_cloud", "cloud_to_image")
        },
    ),
}
# Options that no score depends on.
_MAY_CHANGE = {"data", "out", "run", "device", "picture", "batch_size"}


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Run the list; write sweep.md and sweep.json after every run, print the table, return what sweep.json holds.

    Keys: rows (name -> metric -> {mean, std, values, seeds}; std has n - 1 in the denominator and is None for one
    seed), list, versions. A value is a fraction; the table has percent.

    Raises ValueError, before anything runs, for a key, an option or a protocol that does not exist, and as `pretrain`
    does for a run that was started with other options.
    """
    for module in ("yaml", "sklearn", "h5py", "tqdm", "tensorboard", "matplotlib"):
        require(module, extra="eval")
    plan = load_config(SweepList, config.list)
    jobs = list(_jobs(config, plan))  # all are checked before the first runs
    found: dict[str, dict[str, dict[int, float]]] = {}
    config.out.mkdir(parents=True, exist_ok=True)
    for i, job in enumerate(jobs):
        log.info("%s, seed %d: %d of %d", job.name, job.training.seed, i + 1, len(jobs))
        for row, metrics in _scores(job).items():
            for metric, value in metrics.items():
                found.setdefault(row, {}).setdefault(metric, {})[job.training.seed] = value
        results = {
            "rows": {
                row: {name: _summary(each) for name, each in metrics.items()}
                for row, metrics in found.items()
            },
            "list": config_to_dict(plan),
            "versions": versions(),
        }
        text, table = json.dumps(results, indent=2), format_table(results) + "\n"
        replace_file(config.out / "sweep.json", lambda file, text=text: file.write(text.encode()))
        replace_file(config.out / "sweep.md", lambda file, table=table: file.write(table.encode()))
    print(format_table(results))
    print(f"written: {config.out / 'sweep.md'}, {config.out / 'sweep.json'}")
    return results


def format_table(results: dict[str, Any]) -> str:
    """The rows of sweep.json as a Markdown table: mean ± standard deviation in percent (number of seeds)."""
    metrics = list(dict.fromkeys(name for row in results["rows"].values() for name in row))
    lines = [f"| run | {' | '.join(metrics)} |", f"|---|{'---|' * len(metrics)}"]
    for name, row in results["rows"].items():
        cells = []
        for metric in metrics:
            each = row.get(metric)
            if each is None:
                cells.append("")
                continue
            std = "" if each["std"] is None else f" ± {100 * each['std']:.2f}"
            cells.append(f"{100 * each['mean']:.2f}{std} ({len(each['values'])})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


class _Job(NamedTuple):
    name: str
    training: PretrainConfig
    evaluations: dict[str, Any]  # protocol -> its config


def _jobs(config: SweepConfig, plan: SweepList) -> Iterator[_Job]:
    if not plan.runs or not plan.evaluate:
        raise ValueError(f"{config.list}: runs and evaluate must each name at least one")
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        raise ValueError(f"{config.list}: seeds must be different numbers, at least one; got {plan.seeds}")
    for name, changes in plan.runs.items():
        if not str(name) or Path(str(name)).name != str(name):
            raise ValueError(f"{config.list}: a run's name is a folder's, got {name!r}")
        for seed in plan.seeds:
            out = config.out / str(name) / f"seed_{seed}"
            given = {"data": config.data, "out": str(out), "seed": seed, "device": config.device}
            for where, block in (("base", plan.base), (f"runs.{name}", changes or {})):
                _refuse(config.list, where, block, {*given, "resume"})
            values = _merge(plan.base, changes or {})
            try:
                training = config_from_dict(PretrainConfig, {**values, **given, "resume": True})
                training.validate()
            except ValueError as error:
                raise ValueError(f"{config.list}: runs.{name}: {error}") from error
            yield _Job(str(name), training, _evaluations(config, plan, training, out))


def _evaluations(config: SweepConfig, plan: SweepList, training: PretrainConfig, out: Path) -> dict[str, Any]:
    found = {}
    for protocol, options in plan.evaluate.items():
        if protocol not in _PROTOCOLS:
            raise ValueError(f"{config.list}: evaluate.{protocol}: the protocols are {', '.join(_PROTOCOLS)}")
        cls, options = _PROTOCOLS[protocol].config, options or {}
        _refuse(config.list, f"evaluate.{protocol}", options, {"run", "out", "seed", "device"})
        given = {"run": str(out), "out": str(out), "seed": training.seed, "device": config.device}
        if cls is CrossModalConfig:
            given |= {"image_size": training.image_size, "points": training.points}
        defaults = {"data": str(config.labelled), "random_init": False, "picture": False, **given}
        try:
            found[protocol] = config_from_dict(cls, {**defaults, **options})
        except ValueError as error:
            raise ValueError(f"{config.list}: evaluate.{protocol}: {error}") from error
    return found


def _refuse(path: Path, where: str, values: Any, reserved: set[str]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {where} must hold `key: value` lines, got {values!r}")
    if taken := sorted(reserved & values.keys()):
        raise ValueError(f"{path}: {where}: the sweep itself decides {', '.join(taken)}")


def _merge(base: dict, changes: dict) -> dict:
    """`base` with `changes`, block by block."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _scores(job: _Job) -> dict[str, dict[str, float]]:
    """Row of the table -> metric -> value, from files where the run was evaluated with these options before."""
    pretrain(job.training)
    out, rows = Path(job.training.out), {}
    for protocol, config in job.evaluations.items():
        each = _PROTOCOLS[protocol]
        results = _finished(out / f"{protocol.replace('-', '_')}.json", config, out / "weights.safetensors")
        if results is None:
            results = each.run(config)
        for key, entry in results["encoders"].items():
            row = job.name if key == "pretrained" else f"{job.name}, {_RANDOM}"
            rows.setdefault(row, {}).update(each.metrics(entry))
    return rows


def _finished(path: Path, config: Any, weights: Path) -> dict[str, Any] | None:
    """The results in `path` if they are of these options and no older than the weights."""
    if not path.exists() or path.stat().st_mtime_ns < weights.stat().st_mtime_ns:
        return None
    results, now = json.loads(path.read_text()), config_to_dict(config)
    compared = [f.name for f in fields(config) if f.name not in _MAY_CHANGE]
    return results if all(results["config"].get(name) == now[name] for name in compared) else None


def _summary(values: dict[int, float]) -> dict[str, Any]:
    numbers = list(values.values())
    return {
        "mean": float(np.mean(numbers)),
        "std": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
        "values": numbers,
        "seeds": list(values),
    }
