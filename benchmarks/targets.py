"""What each operator is to reach on a CPU with two cores and the tuned allocator: must, and aim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["BEST", "TARGETS", "Target"]

BEST = "best peer"  # the fastest that gave the right answer, plain PyTorch and what is made of it left out


class Target(NamedTuple):
    """`what`: "time" and "memory" are theirs / ours, at least; "MB" is our peak memory, at most."""

    case: str
    against: str
    must: float
    aim: float | None
    what: str = "time"
    malloc: str = "tuned"


def _targets() -> Iterator[Target]:
    for n, plain, best in ((1024, (20, 35), (8, 15)), (2048, (15, 25), (7, 12))):
        yield Target(f"knn_graph (8, {n}, 3), k=20", "plain", *plain)
        yield Target(f"knn_graph (8, {n}, 3), k=20", BEST, *best)
    for kind in ("uniform", "clusters", "scans"):
        yield Target(f"knn_graph (1, 100000, 3), k=16, {kind}", "scipy", 3, 7)
    for shape, plain, faiss in (
        ("(8, 1024, 64)", (6, 10), (4, 7)),
        ("(8, 1024, 128)", (4, 7), (2, 3.5)),
        ("(1, 16384, 64)", (3.5, 6), (1.9, 3.3)),
    ):
        yield Target(f"knn_graph {shape}, k=20", "plain", *plain)
        yield Target(f"knn_graph {shape}, k=20", "faiss", *faiss)
    for widths, plain, algebra in (
        ("3) -> 64", (20, 30), (10, 24)),
        ("64) -> 64", (20, 38), (5, 10)),
        ("64) -> 128", (15, 25), (5, 9)),
        ("128) -> 256", (12, 19), (3, 5)),
    ):
        name = f"edge_conv (8, 1024, {widths}, k=20, forward + backward"
        yield Target(name, "plain", *plain)
        yield Target(name, "algebra", *algebra)
        yield Target(name, "plain", 8, 12, "memory")
    for n, must, aim in ((256, 1.5, 2.1), (1024, 1.9, 2.4), (4096, 2.0, 2.4)):
        yield Target(f"nt_xent N={n}, D=256, forward + backward", "plain", must, aim)
    yield Target("nt_xent N=16384, D=256, forward + backward", "ours", 250, None, "MB")
    dgcnn = "dgcnn (8, 1024, 3), k=20, forward + backward"
    yield Target(dgcnn, "plain", 5, 6.8)
    yield Target(dgcnn, "plain", 8, 14, malloc="default")


TARGETS = tuple(_targets())
