"""What a run reports while it trains: log.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from crosspoint._files import replace_file
from crosspoint._optional import require

__all__ = ["NoLog", "RunLog", "read_log"]


def read_log(path: str | Path) -> list[dict]:
    """The records of a log.jsonl, without a last line that was cut short."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class RunLog:
    """Writes the records of the steps after `first`, in place of any that an earlier process left there."""

    def __init__(self, folder: Path, *, first: int, total: int, batch_size: int) -> None:
        tensorboard = require("torch.utils.tensorboard", extra="train")
        tqdm = require("tqdm", extra="train")
        self._folder, path = folder, folder / "log.jsonl"
        kept = [r for r in read_log(path) if r["step"] <= first] if first and path.exists() else []
        text = "".join(json.dumps(record) + "\n" for record in kept)
        replace_file(path, lambda file: file.write(text.encode()))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = tensorboard.SummaryWriter(folder / "tensorboard", purge_step=first + 1)
        # Unlike a terminal, a log file keeps every line that the bar ever drew.
        self._bar = tqdm.tqdm(
            total=total, initial=first, unit="step", mininterval=0.1 if sys.stderr.isatty() else 30
        )
        self._batch_size = batch_size
        self._last_step, self._last_time = first, time.perf_counter()

    def advance(self, loss: float, epoch: str) -> None:
        """Move the bar by one step."""
        bar = self._bar.format_dict
        rate = bar["rate"] or (bar["n"] + 1 - bar["initial"]) / max(bar["elapsed"], 1e-9)
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate * self._batch_size:.1f} shapes/s", refresh=False)
        self._bar.update()

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Add one record; the speed is the mean since the one before. Raises OSError that says how to go on."""
        now = time.perf_counter()
        speed = self._batch_size * (step - self._last_step) / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        record = {"step": step, "epoch": epoch, **values, "shapes_per_second": round(speed, 3)}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, step)
        except OSError as error:
            with contextlib.suppress(OSError):  # which tries once more
                self._file.close()
            raise OSError(
                f"the log of step {step} could not be written to {self._folder} ({error}); "
                "the last checkpoint is intact: make room, then continue with --resume"
            ) from error

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


class NoLog:
    """What ranks write that are not the first: nothing."""

    def __init__(self, folder: Path, **_: int) -> None:
        pass

    def advance(self, loss: float, epoch: str) -> None:
        pass

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
