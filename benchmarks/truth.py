"""Whether an answer is right, by float64: no speed is reported for one that is not.

Neighbours: the float64 distances of what was found against the smallest there are, on rows drawn evenly. Ours must
be right in every row, up to `crosspoint.testing.tie_tolerance`; a peer in 99 % of the rows to 1e-5 of the distance,
because formulas that expand the square misplace near ties. Values: the Euclidean norm of the error of the output
and of each gradient against the reference in float64 (of contrastive losses too large for it: loss, and gradients
of some rows, by blocks of rows).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import ENTRIES, TEMPERATURE, Problem, ours
from crosspoint.testing import tie_tolerance

__all__ = ["Verdict", "judge", "step"]

# Largest relative error of the output, and of gradients. Where a maximum is taken, one near tie that goes the other way
# moves a gradient by far more than rounding; a graph of features that flips a neighbour moves it more still, so `dgcnn`
# is judged by its output.
_SMOOTH = (1e-4, 1e-4)
_MAXIMUM = (1e-3, 2e-2)
_LIMITS = {
    "nt_xent": _SMOOTH,
    "info_nce": _SMOOTH,
    "sup_con": _SMOOTH,
    "neighbor_sum": _SMOOTH,
    "dgcnn": (2e-2, None),
}
_HALF = (2e-2, 5e-2)
_ROWS = 256  # checked, of a graph or a large loss
_LOGITS_AT_MOST = 1 << 26  # of a loss that the reference computes whole


class Verdict(NamedTuple):
    right: bool
    error: float  # the largest; of graphs, the share of wrong rows


def step(problem: Problem, f: Callable[..., Tensor]) -> list[Tensor]:
    """The output, and where the case has a backward pass, the gradients of all inputs."""
    if not problem.case.backward:
        with torch.no_grad():
            return [f(*problem.inputs)]
    leaves = [x.detach().requires_grad_() for x in problem.inputs]
    out = f(*leaves)
    out.backward(problem.grad)
    return [out.detach(), *(x.grad for x in leaves)]


def judge(problem: Problem, answer: Sequence[Tensor], *, is_ours: bool) -> Verdict:
    """Compare what `step` returned with the truth, which is computed once per problem."""
    truth = problem.extra.setdefault("truth", _Truth(problem))
    return (
        truth.graph(answer[0], is_ours) if problem.case.op in ("knn_graph", "knn") else truth.values(answer)
    )


class _Truth:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    # ---- graphs

    @functools.cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Which clouds and rows are looked at."""
        batch, n = self.problem.inputs[0].shape[:2]
        cloud = torch.linspace(0, batch - 1, min(batch, 8)).long().unique()
        row = torch.linspace(0, n - 1, min(n, _ROWS // len(cloud))).long().unique()
        return torch.cartesian_prod(cloud, row).unbind(1)

    def distances(self, idx: Tensor) -> Tensor:
        """(rows, k) -> squared distances in float64."""
        cloud, row = self.rows
        query, points = self.problem.inputs[0].cpu().double(), self.problem.inputs[-1].cpu().double()
        return (points[cloud[:, None], idx] - query[cloud, row][:, None]).square().sum(-1)

    @functools.cached_property
    def smallest(self) -> Tensor:
        cloud, row = self.rows
        query, points = self.problem.inputs[0].cpu().double(), self.problem.inputs[-1].cpu().double()
        k = min(self.problem.extra["k"], points.shape[1])
        found = [
            (points[c] - query[c, r]).square().sum(-1).topk(k, largest=False).values
            for c, r in zip(cloud.tolist(), row.tolist(), strict=True)
        ]
        return torch.stack(found)

    def graph(self, idx: Tensor, is_ours: bool) -> Verdict:
        query, points = self.problem.inputs[0], self.problem.inputs[-1]
        k = self.smallest.shape[1]
        if idx.shape != (*query.shape[:2], k) or int(idx.min()) < 0 or int(idx.max()) >= points.shape[1]:
            return Verdict(False, 1.0)
        cloud, row = self.rows
        chosen = idx.cpu().long()[cloud, row]
        distance = self.distances(chosen).sort(1).values
        tolerance = tie_tolerance(points.shape[2], points.dtype) if is_ours else 1e-5
        wrong = ((distance - self.smallest).abs() > tolerance * distance).any(1)
        ordered = chosen.sort(1).values
        wrong |= (ordered[:, 1:] == ordered[:, :-1]).any(1)  # a neighbour twice
        share = wrong.double().mean().item()
        return Verdict(share <= (0 if is_ours else 0.01), share)

    # ---- values

    @functools.cached_property
    def sampled(self) -> Tensor | None:
        """The rows of the gradients that are compared; None for all."""
        x = self.problem.inputs[0]
        if ENTRIES[self.problem.case.op].title.startswith("N=") and 4 * len(x) ** 2 > _LOGITS_AT_MOST:
            return torch.linspace(0, len(x) - 1, _ROWS, device=x.device).long()
        return None

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        problem = self.problem.to(torch.float64)
        if self.sampled is not None:
            return contrast_rows(problem, self.sampled)
        return step(problem, ENTRIES[problem.case.op].apply(ours("reference"), problem))

    def values(self, answer: Sequence[Tensor]) -> Verdict:
        output, gradients = _LIMITS.get(self.problem.case.op, _MAXIMUM)
        if self.problem.case.dtype.itemsize == 2:
            output, gradients = _HALF
        worst, right = 0.0, len(answer) == len(self.expected)
        for place, (actual, expected) in enumerate(zip(answer, self.expected, strict=False)):
            limit = output if place == 0 else gradients
            if limit is None:
                continue
            if place > 0 and self.sampled is not None:
                actual = actual[self.sampled]
            if actual.shape != expected.shape:
                return Verdict(False, float("inf"))
            error = ((actual.double() - expected).norm() / expected.norm()).item()
            right &= error <= limit
            worst = max(worst, error)
        return Verdict(right, worst)


def contrast_rows(problem: Problem, rows: Tensor, block: int = 1024) -> list[Tensor]:
    """A loss and the gradients of some rows, by blocks of rows: what the reference gives, for any number of pairs."""
    z = [F.normalize(x, dim=1) for x in problem.inputs]
    n, op = len(z[0]), problem.case.op
    sides = [(z[0], z[1]), (z[1], z[0])] if op == "info_nce" else [(torch.cat(z), torch.cat(z))]
    every = torch.arange(len(sides[0][1]), device=rows.device)

    def logits(side: tuple[Tensor, Tensor], part: Tensor) -> Tensor:
        s = side[0][part] @ side[1].t() / TEMPERATURE
        return s if op == "info_nce" else s.masked_fill(part[:, None] == every, -torch.inf)

    def wanted(part: Tensor) -> Tensor:
        """(len(part), M): the share of each column among a row's positives; the same from both ends of a pair."""
        if op == "sup_con":
            labels = problem.extra["labels"]
            same = ((labels[part, None] == labels) & (part[:, None] != every)).double()
            return same / same.sum(1, keepdim=True).clamp_min(1)
        return F.one_hot((part + n) % (2 * n) if op == "nt_xent" else part, len(every)).double()

    lse, counts, total = [], [], 0.0
    for side in sides:
        parts = []
        for part in every.split(block):
            s, share = logits(side, part), wanted(part)
            sums, has = s.logsumexp(1), share.sum(1).round()
            total = total + (sums * has - (share * s.masked_fill(share == 0, 0)).sum(1)).sum()
            parts.append((sums, has))
        lse.append(torch.cat([sums for sums, _ in parts]))
        counts.append(torch.cat([has for _, has in parts]))  # 1 for a row with positives, else 0
    count = sum(has.sum() for has in counts)

    gradients = []
    for place, x in enumerate(problem.inputs):
        here, there = (place, 1 - place) if op == "info_nce" else (0, 0)
        part = rows + place * n if op == "nt_xent" else rows
        s = logits(sides[here], part)
        pushed = (s - lse[here][part, None]).exp() * counts[here][part, None]  # by the row's own softmax
        pushed += (s - lse[there]).exp() * counts[there]  # by those of the columns
        g = (pushed - 2 * wanted(part)) @ sides[here][1] / (TEMPERATURE * count)
        unit = sides[here][0][part]
        gradients.append((g - (g * unit).sum(1, keepdim=True) * unit) / x[rows].norm(dim=1, keepdim=True))
    return [total / count, *gradients]
