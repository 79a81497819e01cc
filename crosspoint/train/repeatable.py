"""What makes a training repeatable: seeds from keys, an isolated random state, interrupts that let a step end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["Signals", "derive_seed", "isolated"]


def derive_seed(seed: int, *key: int) -> int:
    """One seed of many: what is drawn under another key is independent of it."""
    # 63 bits, the range that every generator takes.
    return int(np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Leave the caller's random state alone, and let cuDNN choose no kernel that adds in varying order."""
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        yield


class Signals:
    """Turns SIGINT and SIGTERM into a note, so that the step in progress can end; a second acts at once."""

    received = ""

    def __enter__(self) -> Signals:
        self._former = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.received:
            raise KeyboardInterrupt(f"stopped at once by a second {signal.Signals(number).name}")
        self.received = signal.Signals(number).name
