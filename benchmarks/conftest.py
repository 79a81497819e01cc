"""Options of `pytest benchmarks --benchmark-only` (benchmarks/test_speed.py)."""

from benchmarks import registry


def pytest_addoption(parser):
    group = parser.getgroup("crosspoint benchmarks")
    group.addoption("--only", nargs="+", choices=registry.OPS, help="operators; default: all")
    group.addoption(
        "--size",
        nargs="+",
        choices=registry.SIZES,
        default=["layer"],
        help="groups of cases (benchmarks/registry.py)",
    )
    group.addoption("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    group.addoption(
        "--peers",
        nargs="*",
        default=["plain"],
        metavar="NAME",
        help="whom to measure against; all for everybody",
    )
