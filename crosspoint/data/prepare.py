"""Training pairs from meshes: clouds and rendered views, in the ShapeNet / ShapeNetRendering layout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from crosspoint._files import replace_file
from crosspoint._optional import require
from crosspoint.data import generated, render
from crosspoint.data.meshes import MeshFile, find_meshes, load_mesh
from crosspoint.data.ply import write_points

__all__ = ["GENERATED", "PrepareConfig", "PrepareReport", "prepare", "was_interrupted"]

log = logging.getLogger(__name__)

GENERATED = "generated"
_SETTINGS = "prepare.json"
_REPORT = "prepare_report.json"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class PrepareConfig:
    """Make training pairs from meshes: points sampled on the surface, and shaded views.

    Writes OUT/ShapeNet/<class>/<id>.ply, OUT/ShapeNetRendering/<class>/<id>/rendering/NN.png and
    OUT/prepare_report.json. Every shape is centred on its bounding box and scaled to radius 1, so units do
    not matter; y is up in what is written. Run again after an interruption, it goes on where it was.
    """

    meshes: str
    """Folder tree of .off, .obj, .ply, .stl or .glb files, whose folders are the classes; or "generated":
    built-in shapes, made under OUT/meshes."""
    out: str
    """Folder to write."""
    points: int = 2048
    """Points per cloud, drawn with equal density over the surface."""
    views: int = 12
    """Pictures per shape, from all around it and slightly above."""
    image_size: int = 224
    """Height and width of the pictures, in pixels."""
    up: Literal["y", "z"] = "y"
    """Axis that is up in the meshes."""
    class_depth: int | None = None
    """Folder levels that make the class; those below go into the id. Default: all levels, joined with "-"."""
    per_class: int = 40
    """With "generated": shapes per class."""
    workers: int | None = None
    """Processes; default: one per core, 0: this process alone. Changes no result."""
    strict: bool = False
    """Stop at the first broken mesh, instead of naming it in the report and going on."""
    seed: int = 0
    """With a shape's class and id, decides its points and cameras."""

    def validate(self) -> None:
        """Raise ValueError, naming the option, if a value cannot work."""
        for name, least in {
            "points": 1,
            "views": 1,
            "image_size": 1,
            "per_class": 1,
            "seed": 0,
            "workers": 0,
            "class_depth": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.up not in ("y", "z"):
            raise ValueError(f"up must be 'y' or 'z', got {self.up!r}")
        if str(self.meshes) == GENERATED and self.up != "y":
            raise ValueError("the built-in shapes have y up: leave up at 'y'")


@dataclass
class PrepareReport:
    """What a run did. shapes: complete ones in the folder; prepared: those of them made by this run."""

    shapes: int
    prepared: int
    classes: dict[str, int]
    failed: list[dict[str, str]]  # "mesh", "reason"
    seconds: float


def prepare(config: PrepareConfig) -> PrepareReport:
    """Make pairs from `config.meshes` in `config.out`; see PrepareConfig.

    A broken mesh is left out and named in the report, OUT/prepare_report.json, or with `strict` ends the run
    with ValueError. Shapes that are complete already are kept, so an interrupted run goes on; a folder that
    was made with other settings is refused. With workers, the calling script needs the usual
    `if __name__ == "__main__":`.
    """
    start = time.perf_counter()
    config.validate()
    for module in ("trimesh.ray.ray_pyembree", "PIL.Image"):
        require(module, extra="train")  # now, not in every process
    tqdm = require("tqdm", extra="train").tqdm
    out = Path(config.out)
    built_in = str(config.meshes) == GENERATED
    root = out / "meshes" if built_in else Path(config.meshes)
    if not built_in:
        meshes = find_meshes(root, class_depth=config.class_depth)
        if root.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"out folder {out} lies in the mesh folder {root}: choose one outside of it")
    _claim(out, config, built_in)
    if built_in:
        generated.write_meshes(root, per_class=config.per_class, seed=config.seed)
        meshes = find_meshes(root)

    job = _Job(str(out), config.points, config.views, config.image_size, config.up, config.seed)
    missing = [mesh for mesh in meshes if not job.cloud(mesh.name).exists()]
    if missing:
        (out / _REPORT).unlink(missing_ok=True)  # of a former run; where there is none, one was interrupted
    failed: dict[str, str] = {}
    try:
        with (
            tqdm(total=len(meshes), initial=len(meshes) - len(missing), desc="prepare", unit="shape") as bar,
            contextlib.closing(_results(job, missing, _processes(config, len(missing)))) as results,
        ):
            for mesh, reason in results:
                bar.update()
                if reason is not None:
                    failed[str(mesh.path.relative_to(root))] = reason
                    bar.set_postfix(broken=len(failed))
                    if config.strict:
                        break
    except KeyboardInterrupt:
        done = sum(job.cloud(mesh.name).exists() for mesh in meshes)
        raise KeyboardInterrupt(
            f"{done} of {len(meshes)} shapes are complete in {out}: the same command goes on"
        ) from None
    report = _report(job, meshes, missing, failed, time.perf_counter() - start)
    content = json.dumps({**asdict(report), "config": asdict(config)}, indent=2, default=str)
    replace_file(out / _REPORT, lambda file: file.write(content.encode()))
    if failed and config.strict:
        mesh, reason = next(iter(failed.items()))
        raise ValueError(f"{root / mesh}: {reason}; leave out --strict to pass over broken meshes")
    if not report.shapes:
        mesh, reason = next(iter(failed.items()))
        raise ValueError(
            f"none of the {len(meshes)} meshes under {root} is usable; the first, {mesh}: {reason}"
        )
    log.info(
        "%d shapes in %d classes under %s (%d new, %d meshes broken: see %s), %.0f s",
        *(
            report.shapes,
            len(report.classes),
            out,
            report.prepared,
            len(failed),
            out / _REPORT,
            report.seconds,
        ),
    )
    return report


def was_interrupted(out: Path) -> bool:
    """Whether `prepare` has begun to fill a folder, and has not come to its end."""
    return (out / _SETTINGS).exists() and not (out / _REPORT).exists()


def _claim(out: Path, config: PrepareConfig, built_in: bool) -> None:
    """Write down the settings of `out`, or raise if it was made with others."""
    settings = {
        "meshes": GENERATED if built_in else str(Path(config.meshes).resolve()),
        **{name: getattr(config, name) for name in ("points", "views", "image_size", "up", "seed")},
        **({"per_class": config.per_class} if built_in else {"class_depth": config.class_depth}),
    }
    path = out / _SETTINGS
    if path.exists():
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete {out} or choose another out folder"
            ) from error
        differ = [key for key in {**settings, **former} if settings.get(key) != former.get(key)]
        if differ:
            changes = ", ".join(
                f"{key} {former.get(key)!r} there, {settings.get(key)!r} now" for key in differ
            )
            raise ValueError(f"{out} was made with other settings ({changes}); choose another out folder")
        return
    for name in ("ShapeNet", "ShapeNetRendering"):
        if (out / name).exists():
            raise FileExistsError(f"{out / name} exists and was not made by this; choose another out folder")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))


def _report(
    job: _Job, meshes: Sequence[MeshFile], missing: Sequence[MeshFile], failed: dict[str, str], seconds: float
) -> PrepareReport:
    complete = {mesh.name for mesh in meshes if job.cloud(mesh.name).exists()}
    return PrepareReport(
        shapes=len(complete),
        prepared=sum(mesh.name in complete for mesh in missing),
        classes=dict(sorted(Counter(name.split("/")[0] for name in complete).items())),
        failed=[{"mesh": mesh, "reason": failed[mesh]} for mesh in sorted(failed)],
        seconds=seconds,
    )


def _processes(config: PrepareConfig, tasks: int) -> int:
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, tasks)


@dataclass(frozen=True)
class _Job:
    """What a process needs to know to make a shape."""

    out: str
    points: int
    views: int
    image_size: int
    up: str
    seed: int

    def cloud(self, name: str) -> Path:
        """The file that is written last: where it exists, the shape is complete."""
        return Path(self.out, "ShapeNet", f"{name}.ply")

    def make(self, mesh: MeshFile) -> str | None:
        """Write the pair of `mesh`; what is wrong with it, if it cannot be done."""
        try:
            points, views = self._compute(mesh)
        except Exception as error:
            return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        self._write(mesh.name, points, views)
        return None

    def _compute(self, mesh: MeshFile) -> tuple[np.ndarray, np.ndarray]:
        sample = require("trimesh.sample", extra="train")
        shape = load_mesh(mesh.path, up=self.up)
        digest = hashlib.sha256(mesh.name.encode()).digest()
        seeds = np.random.SeedSequence([self.seed, int.from_bytes(digest[:16], "little")]).spawn(2)
        points, _ = sample.sample_surface(shape, self.points, seed=np.random.default_rng(seeds[0]))
        rotations = render.cameras(self.views, np.random.default_rng(seeds[1]))
        return np.asarray(points), render.render_views(shape, rotations, self.image_size)

    def _write(self, name: str, points: np.ndarray, views: np.ndarray) -> None:
        image = require("PIL.Image", extra="train")
        final = Path(self.out, "ShapeNetRendering", name, "rendering")
        fresh = final.with_name(".rendering.tmp")
        for leftover in (fresh, final):  # of a run that was interrupted
            if leftover.exists():
                shutil.rmtree(leftover)
        fresh.mkdir(parents=True)
        for number, view in enumerate(views):
            image.fromarray(view).save(fresh / f"{number:02d}.png", compress_level=3)
        fresh.rename(final)
        cloud = self.cloud(name)
        cloud.parent.mkdir(parents=True, exist_ok=True)
        write_points(cloud, points)


def _results(job: _Job, meshes: Sequence[MeshFile], workers: int) -> Iterator[tuple[MeshFile, str | None]]:
    """Every mesh, once it is done, and what was wrong with it."""
    if workers == 0:
        for mesh in meshes:
            yield mesh, job.make(mesh)
        return
    waiting = list(reversed(meshes))
    while waiting:
        suspects: list[MeshFile] = []
        yield from _until_broken(job, waiting, workers, suspects)
        # A process died. One of these meshes may kill every process that touches it, so each gets its own.
        for mesh in suspects:
            blamed: list[MeshFile] = []
            yield from _until_broken(job, [mesh], 1, blamed)
            for culprit in blamed:
                yield culprit, "its process died while working on it (killed, out of memory, or a crash)"


def _until_broken(
    job: _Job, waiting: list[MeshFile], workers: int, suspects: list[MeshFile]
) -> Iterator[tuple[MeshFile, str | None]]:
    """Take meshes from the end of `waiting` and yield results; ends early if a process dies.

    What was under way then is left in `suspects`.
    """
    running: dict[Future[str | None], MeshFile] = {}
    with _pool(workers) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    mesh = waiting[-1]
                    running[pool.submit(job.make, mesh)] = mesh
                    waiting.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    reason = future.result()
                    yield running.pop(future), reason
        except BrokenProcessPool:
            suspects += running.values()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # Started anew, not forked: a fork of a process whose libraries run threads may hang.
    context = multiprocessing.get_context("spawn")
    former = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_process() -> None:
    # Ctrl-C reaches the whole group; the parent ends the run. A killed parent must leave no processes behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("trimesh").setLevel(logging.CRITICAL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
