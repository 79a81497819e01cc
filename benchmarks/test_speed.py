"""The registry's cases under pytest-benchmark, grouped by operator and shape.

    pytest benchmarks --benchmark-only --size layer small --peers plain scipy --benchmark-json speed.json

Nothing is timed before its answer was judged: ours wrong fails the test, and then nobody in that case has a time; a
peer that is wrong, or cannot take part, is skipped with the reason. pytest-benchmark times one side after the other, so
a ratio of its figures is rougher than one of benchmarks.run, where the sides take turns.
"""

import functools

import pytest
import torch

from benchmarks import peers, registry
from benchmarks.measure import backends, runner
from benchmarks.truth import judge


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    names = list(peers.PEERS) if "all" in option("--peers") else option("--peers")
    if unknown := set(names) - set(peers.PEERS):
        raise pytest.UsageError(
            f"--peers: {', '.join(sorted(unknown))} unknown; there are {', '.join(peers.PEERS)}"
        )
    found = [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in registry.cases(option("--only"), option("--size"), option("--case"))
        for name in ["ours", *(name for name in names if name in peers.of(case.op))]
    ]
    if not found:
        raise pytest.UsageError(
            f"no case in {', '.join(option('--size'))} has {option('--case')!r} in its name"
        )
    metafunc.parametrize(("case", "name"), found)


@functools.lru_cache(maxsize=1)  # the sides of a case follow each other
def judged(case_name):
    """The problem of a case, our call on it and the verdict."""
    case = next(case for case in registry.cases(None, registry.SIZES) if case.name == case_name)
    problem = registry.build(case)
    run = runner(next(iter(backends(case.op, "cpu")), "reference"), problem)
    return problem, run, judge(problem, run(), is_ours=True)


def test_speed(benchmark, case, name):
    problem, run, verdict = judged(case.name)
    benchmark.group = case.name
    if not verdict.right:
        pytest.fail(f"our answer is wrong by {verdict.error:.1e}: no speed is reported")
    if name != "ours":
        if why := peers.why_not(name, case, "cpu"):
            pytest.skip(why)
        try:
            run = runner(name, problem)
            verdict = judge(problem, run(), is_ours=False)
        except Exception as error:  # a peer's own limits come as errors of any kind
            pytest.skip(f"{name}: {type(error).__name__}: {error}"[:300])
        if not verdict.right:
            pytest.skip(f"{name} is wrong by {verdict.error:.1e}: no speed is reported")
    floor = registry.ENTRIES[case.op].floor(case)
    benchmark.extra_info.update(
        op=case.op, sizes=case.sizes, source=problem.source, threads=torch.get_num_threads(),
        error=verdict.error, floor_flops=floor.flops, floor_bytes=floor.bytes,
    )  # fmt: skip
    benchmark(run)
