"""Time and peak memory of one training step, fused and plain, measured in one run; and the largest batch that fits.

    python -m benchmarks.train_step --batch 32 --points 2048 --k 20 --steps 3 --out step.json
    python -m benchmarks.train_step --model crosspoint --batch 4 --points 1024 --largest-batch --out step.json

The models: `dgcnn`, the encoder, with a sum of squares for a loss; `crosspoint`, all of the pre-training step: both
views through DGCNN, images through ResNet-50, both losses, Adam. "fused" is crosspoint.models, "plain" the same in
plain PyTorch (benchmarks/plain.py); the ResNet is the same in both.

On a GPU where torch sees one (`--device`), else on the CPU. Each variant lives in a process of its own (peak memory is
a process's figure: resident memory, or on a GPU what torch has allocated), holds the same weights and the same clouds,
and steps in turn with the others, so that a change of the machine's speed meets all of them. With `--malloc tuned`
glibc keeps large blocks instead of returning them to the kernel after every tensor: the harder baseline, because most
of what the plain step loses otherwise is page faults. No process may take more than what the machine has free, so that
a batch that does not fit fails by itself and is reported as that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.inputs import clouds
from benchmarks.memory import Growth, available
from benchmarks.plain import PlainCrossPoint, PlainDGCNN, plain_state
from crosspoint.models import DGCNN, CrossPoint, ResNet

MODELS = ("dgcnn", "crosspoint")
VARIANTS = ("fused", "plain")
_SPARE = 0.9  # of what is free may be taken
_TRIALS = 6  # of the search for the largest batch
# How far losses may be apart. In float32, distances that round differently flip a few neighbours: at 4 clouds of 1,024
# points plain's loss was 1.2e-3 of itself off the one in float64, fused's 2e-4.
_EXACT, _FLOAT32 = 1e-9, 1e-2


class DoesNotFit(Exception):
    """A step asked for more memory than its process may have."""


class Died(Exception):
    """A step's process ended without a word."""


# ---- a variant's process


def make_model(model: str, variant: str, k: int, depth: int) -> torch.nn.Module:
    torch.manual_seed(0)
    if model == "dgcnn":
        fused = DGCNN(k, projection_dim=None)
        plain = PlainDGCNN(k, projection_dim=None)
    else:
        fused = CrossPoint(DGCNN(k), ResNet(depth))
        plain = PlainCrossPoint(k, depth)
    if variant == "fused":
        return fused
    plain.load_state_dict(plain_state(fused.state_dict()))
    return plain


def make_inputs(model: str, batch: int, points: int, image_size: int) -> tuple[Tensor, ...]:
    view1, _ = clouds("surfaces", batch, points)
    if model == "dgcnn":
        return (view1,)
    view2, _ = clouds("surfaces", batch, points, seed=1)
    images = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return view1, view2, images


def loss_of(model: torch.nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    out = model(*inputs)
    return out.square().mean() if isinstance(out, Tensor) else out.loss


@torch.no_grad()
def exact_loss(variant: str, args: argparse.Namespace) -> float:
    """Of a small batch in float64, where the variants agree: what they are judged by."""
    model = make_model(args.model, variant, args.k, args.depth).train().to(args.device).double()
    inputs = make_inputs(args.model, 4, max(args.k, 128), 64)
    return loss_of(model, [each.to(args.device).double() for each in inputs]).item()


def serve(variant: str, args: argparse.Namespace, most: int, pipe: Connection) -> None:
    """A variant's process: one training step (forward, backward, Adam) for every message."""
    memory = Growth(args.device, most)
    torch.set_num_threads(args.threads)
    model = make_model(args.model, variant, args.k, args.depth).train().to(args.device)
    # Libraries get loaded and the thread pool started before memory is counted.
    small = make_inputs(args.model, 2, max(args.k, 64), 64)
    loss_of(model, [each.to(args.device) for each in small]).backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(make_model(args.model, variant, args.k, args.depth).state_dict())
    memory.start()
    try:
        inputs = make_inputs(args.model, args.batch, args.points, args.image_size)
        inputs = [each.to(args.device) for each in inputs]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        while (asked := pipe.recv()) != "stop":
            if asked == "exact loss":
                pipe.send({"exact": exact_loss(variant, args)})
                continue
            started = time.perf_counter()
            loss = loss_of(model, inputs)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            value = loss.item()
            if memory.on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            pipe.send(
                {"seconds": seconds, "loss": value, "peak_bytes": memory.bytes(), "held_bytes": memory.held}
            )
    except (RuntimeError, MemoryError) as error:
        if not _is_about_memory(error):
            raise
        pipe.send({"does_not_fit": f"{type(error).__name__}: {error}"[:200]})


def _is_about_memory(error: Exception) -> bool:
    words = ("allocate", "bad_alloc", "out of memory", "could not create")  # oneDNN says the last
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


class Worker:
    """A variant's process, from outside."""

    def __init__(self, variant: str, args: argparse.Namespace, most: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(variant, args, most, other), daemon=True)
        with _allocator(args.malloc):
            self._process.start()
        other.close()
        self._variant = variant

    def step(self) -> dict:
        """Seconds, loss and peak bytes. DoesNotFit where memory did not suffice."""
        return self._ask("step")

    def _ask(self, what: str) -> dict:
        with suppress(OSError):  # where it ended before, it has said why
            self._pipe.send(what)
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise Died(f"the {self._variant} step ended with {self._process.exitcode}") from None
        if "does_not_fit" in answer:
            raise DoesNotFit(answer["does_not_fit"])
        return answer

    def exact_loss(self) -> float:
        return self._ask("exact loss")["exact"]

    def stop(self) -> None:
        with suppress(OSError):  # it may have ended
            self._pipe.send("stop")
        self._process.join()


@contextmanager
def _allocator(malloc: str) -> Iterator[None]:
    """What processes started here get as their environment."""
    former = {name: os.environ.get(name) for name in machine.TUNED_MALLOC}
    for name, value in machine.TUNED_MALLOC.items():
        if malloc == "tuned":
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    yield
    for name, value in former.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# ---- one step


def measure(args: argparse.Namespace) -> dict:
    """All variants in turn. One that does not fit is left out, with the reason."""
    free = int(_SPARE * available(args.device))
    workers: dict[str, Worker] = {}
    steps: dict[str, list[dict]] = {}
    failed: dict[str, str] = {}
    for variant in args.variants:  # one after the other, so that the second is given what the first leaves
        worker = Worker(variant, args, free)
        try:
            steps[variant] = [worker.step()]
        except DoesNotFit as error:
            failed[variant] = f"does not fit in {free / 2**30:.1f} GiB: {error}"
            worker.stop()
            continue
        workers[variant] = worker
        free -= steps[variant][0]["peak_bytes"]
    for _ in range(args.steps - 1):
        for variant, worker in workers.items():
            steps[variant].append(worker.step())
    exact = [worker.exact_loss() for worker in workers.values()]
    for worker in workers.values():
        worker.stop()
    return summarise(args, steps, failed, exact)


def summarise(
    args: argparse.Namespace, steps: dict[str, list[dict]], failed: dict[str, str], exact: list[float]
) -> dict:
    """The result; `exact` are the variants' `exact_loss`es."""
    first = [runs[0]["loss"] for runs in steps.values()]
    for what, losses, tolerance in (("losses in float64", exact, _EXACT), ("first losses", first, _FLOAT32)):
        if losses and not max(losses) - min(losses) <= tolerance * abs(losses[0]):
            raise SystemExit(f"the variants disagree, so no speed is reported: {what} {losses}")
    result = {
        "model": args.model,
        "batch": args.batch,
        "points": args.points,
        "k": args.k,
        "threads": args.threads,
        **{
            name: value
            for name, value in machine.facts(args.device).items()
            if name not in ("threads", "malloc", "peers")
        },
        "malloc": args.malloc,
    }
    for variant, runs in steps.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        result[variant] = {
            "seconds": seconds,
            "shapes_per_second": args.batch / seconds,
            "seconds_all": [round(run["seconds"], 4) for run in runs],
            "peak_mib": round(max(run["peak_bytes"] for run in runs) / 2**20),
            "loss": runs[0]["loss"],
        }
    result |= {variant: {"failed": why} for variant, why in failed.items()}
    if set(VARIANTS) <= set(steps):
        pairs = zip(steps["plain"], steps["fused"], strict=True)
        result["speedup"] = statistics.median(p["seconds"] / f["seconds"] for p, f in pairs)
        result["memory_ratio"] = result["plain"]["peak_mib"] / result["fused"]["peak_mib"]
    return result


# ---- the largest batch


def largest_batch(args: argparse.Namespace, variant: str, most: int) -> dict:
    """The largest batch whose step a process of `most` bytes gets through, by trial: `batch` ran, `too_large` did not.

    Memory grows by the same amount with every cloud, once these take more than the optimizer does, which a few may not.
    So the first trial after two such batches is near; from there on by steps of a sixteenth, doubled each time, until
    the two are a sixteenth apart.
    """

    def trial(batch: int) -> dict | None:
        worker = Worker(variant, argparse.Namespace(**{**vars(args), "batch": batch}), most)
        try:
            return worker.step()
        except DoesNotFit:
            return None
        except Died:  # threads of libraries that cannot report a failed allocation end their process
            if batch == 2:
                raise
            return None
        finally:
            worker.stop()

    measured: list[tuple[int, int]] = []
    batch, too_large = 2, None
    while too_large is None:
        if (found := trial(batch)) is None:
            too_large = batch
            break
        measured.append((batch, found["peak_bytes"]))
        held = found["held_bytes"]
        if len(measured) > 1:
            (less, small), (fits, large) = measured[-2:]
            if large / small > 0.6 * fits / less:
                break
        batch *= 2 if batch == 2 else 4
    if len(measured) < 2:
        return {"batch": measured[0][0] if measured else None, "too_large": too_large}
    each = max(1, (large - small) // (fits - less))
    guess = fits + max(1, int((most - held - large) / each))
    if too_large is not None:
        guess = min(guess, too_large - 1)
    step = max(1, guess // 16)
    for _ in range(_TRIALS):
        if fitted := trial(guess) is not None:
            fits = guess
        else:
            too_large = guess
        if too_large is None:
            guess = fits + step
        elif too_large - fits <= max(1, fits // 16):
            break
        else:
            middle = (fits + too_large) // 2
            guess = min(middle, fits + step) if fitted else max(middle, too_large - step)
        step *= 2
    return {"batch": fits, "too_large": too_large}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="dgcnn")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--depth", type=int, choices=(18, 50), default=50, help="of crosspoint's ResNet")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--malloc", choices=("default", "tuned"), default="default")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--largest-batch",
        type=float,
        nargs="?",
        const=4.0,
        metavar="GIB",
        help="also the largest batch that a process of so many GiB (4 if none are named) gets through",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    result = measure(args)
    save(args.out, result)
    if args.largest_batch:
        most = int(min(args.largest_batch * 2**30, _SPARE * available(args.device)))
        found = {variant: largest_batch(args, variant, most) for variant in args.variants}
        result["largest_batch"] = {"limit_mib": most >> 20, **found}
        save(args.out, result)
    print(json.dumps(result, indent=2))


def save(path: Path | None, result: dict) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
