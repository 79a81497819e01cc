"""The contrastive losses by mma.sync, which is chosen, and by wgmma, which is not until it was measured here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.measure import runner
from benchmarks.registry import Case, build, cases
from benchmarks.truth import judge

__all__ = ["CASES", "SETTING", "asked", "measure"]

SETTING = "CROSSPOINT_WGMMA"
CASES = [case for case in cases(["nt_xent", "info_nce", "sup_con"], ["gpu"]) if case.dtype == torch.bfloat16]


@contextmanager
def asked(answer: str) -> Iterator[None]:
    before = os.environ.get(SETTING)
    os.environ[SETTING] = answer
    try:
        yield
    finally:
        if before is None:
            del os.environ[SETTING]
        else:
            os.environ[SETTING] = before


def measure(case: Case, device: str, clock: Callable[[Callable[[], object]], float]) -> Iterator[dict]:
    """Microseconds of both, of what is right."""
    problem = build(case, device)
    run, us, wrong = runner("native", problem), {}, {}
    for path, answer in (("mma", "0"), ("wgmma", "1")):
        with asked(answer):
            verdict = judge(problem, run(), is_ours=True)
            if verdict.right:
                us[path] = clock(run)
            else:
                wrong[path] = f"wrong by {verdict.error:.1e}"
    row = {"shape": list(case.sizes.values()), "us": us}
    yield {**row, "status": "failed", "why": str(wrong)} if wrong else row
