"""Interleaved ratios of the operators against plain PyTorch, after both gave the same answer.

    python -m benchmarks.ops --only knn_graph edge_conv --rounds 7 --malloc tuned --out ops.json

Every round runs plain, then ours; the ratio is the median over rounds of plain / ours, so that a change of the
machine's speed meets both. `--malloc tuned` starts again with glibc told to keep large blocks (see train_step.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain import edge_features, nearest
from benchmarks.train_step import TUNED_MALLOC
from crosspoint import ops

Case = tuple[str, Callable[[], object], Callable[[], object], Callable[[object, object], bool]]


def close(tolerance: float) -> Callable[[list[Tensor], list[Tensor]], bool]:
    """Whether all tensors agree, in the Euclidean norm: a few flipped near-ties are no disagreement."""
    return lambda ours, plain: all(
        (a - b).norm() <= tolerance * b.norm() for a, b in zip(ours, plain, strict=True)
    )


def same_neighbours(ours: Tensor, plain: Tensor) -> bool:
    """Whether the rows hold the same neighbours, but for one in ten thousand that the plain formula misplaces."""
    differ = (ours.sort(-1).values != plain.sort(-1).values).any(-1)
    return differ.double().mean().item() < 1e-2


def knn_cases() -> Iterator[Case]:
    for b, n, c, k in ((8, 1024, 3, 20), (8, 2048, 3, 20), (8, 1024, 64, 20), (8, 1024, 128, 20)):
        x = torch.randn(b, n, c)
        rows = x.transpose(1, 2).contiguous()
        yield (
            f"knn_graph ({b}, {n}, {c}), k={k}",
            lambda x=x, k=k: ops.knn_graph(x, k, impl="native"),
            lambda rows=rows, k=k: nearest(rows, k),
            same_neighbours,
        )


def edge_conv_cases(impl: str = "native", b: int = 8, n: int = 1024, k: int = 20) -> Iterator[Case]:
    for c_in, c_out in ((3, 64), (64, 64), (64, 128), (128, 256)):
        x = torch.randn(b, n, c_in)
        idx = ops.knn_graph(x, k)
        weight = torch.randn(c_out, 2 * c_in) / c_in**0.5
        gamma, beta = torch.rand(c_out) + 0.5, torch.randn(c_out)
        mean, var = torch.zeros(c_out), torch.ones(c_out)

        def leaves(*tensors: Tensor) -> list[Tensor]:
            return [t.detach().requires_grad_() for t in tensors]

        def ours(x=x, idx=idx, params=(weight, gamma, beta), mean=mean, var=var) -> list[Tensor]:
            x, weight, gamma, beta = values = leaves(x, *params)
            y = ops.edge_conv(x, idx, weight, gamma, beta, mean, var, training=True, impl=impl)
            y.square().mean().backward()
            return [y.detach(), *(v.grad for v in values)]

        def plain(x=x, idx=idx, params=(weight, gamma, beta), mean=mean, var=var) -> list[Tensor]:
            x, weight, gamma, beta = values = leaves(x, *params)
            edges = edge_features(x.transpose(1, 2), idx)
            h = F.batch_norm(F.conv2d(edges, weight[:, :, None, None]), mean, var, gamma, beta, training=True)
            y = F.leaky_relu(h, 0.2).max(dim=3).values.transpose(1, 2)
            y.square().mean().backward()
            return [y.detach(), *(v.grad for v in values)]

        yield f"edge_conv {c_in} -> {c_out}, forward + backward", ours, plain, close(1e-2)


def edge_conv2_cases() -> Iterator[Case]:
    b, n, k = 2, 1024, 20
    for c_in, c_mid, c_out in ((3, 64, 64), (64, 64, 64), (3, 64, 128)):
        x = torch.randn(b, n, c_in)
        idx = ops.knn_graph(x, k)
        layers = [
            tensor
            for columns, rows in ((2 * c_in, c_mid), (c_mid, c_out))
            for tensor in (
                torch.randn(rows, columns) / columns**0.5,
                torch.rand(rows) + 0.5,
                torch.randn(rows),
            )
        ]

        def step(layer: Callable[..., Tensor], x=x, layers=layers) -> list[Tensor]:
            values = [t.detach().requires_grad_() for t in (x, *layers)]
            y = layer(*values)
            y.square().mean().backward()
            return [y.detach(), *(v.grad for v in values)]

        def ours(x: Tensor, *layers: Tensor, idx=idx) -> Tensor:
            return ops.edge_conv2(x, idx, *layers, training=True, impl="native")

        def plain(x: Tensor, *layers: Tensor, idx=idx) -> Tensor:
            h = edge_features(x.transpose(1, 2), idx)
            for weight, gamma, beta in (layers[:3], layers[3:]):
                h = F.conv2d(h, weight[:, :, None, None])
                h = F.leaky_relu(F.batch_norm(h, None, None, gamma, beta, training=True), 0.2)
            return h.max(dim=3).values.transpose(1, 2)

        yield (
            f"edge_conv2 {c_in} -> {c_mid} -> {c_out}, forward + backward",
            lambda step=step, ours=ours: step(ours),
            lambda step=step, plain=plain: step(plain),
            close(1e-2),
        )


def conv_bn_act_pool_cases() -> Iterator[Case]:
    b, n, c_in, c_out = 8, 1024, 512, 1024
    x, grad = torch.randn(b, n, c_in), torch.randn(b, 2 * c_out)
    layer = torch.randn(c_out, c_in) / c_in**0.5, torch.rand(c_out) + 0.5, torch.randn(c_out)

    def step(pooled: Callable[..., Tensor]) -> list[Tensor]:
        values = [t.detach().requires_grad_() for t in (x, *layer)]
        y = pooled(*values)
        y.backward(grad)
        return [y.detach(), *(v.grad for v in values)]

    def plain(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        h = F.batch_norm(F.linear(x.flatten(0, 1), weight), None, None, gamma, beta, training=True)
        h = F.leaky_relu(h, 0.2, inplace=True).view(b, n, c_out)
        return torch.cat([h.max(1).values, h.mean(1)], 1)

    yield (
        f"conv_bn_act_pool ({b}, {n}, {c_in}) -> {c_out}, forward + backward",
        lambda: step(lambda *values: ops.conv_bn_act_pool(*values, training=True, impl="native")),
        lambda: step(plain),
        close(1e-2),
    )


def nt_xent_cases(impl: str = "native", sizes: Sequence[int] = (256, 1024, 4096)) -> Iterator[Case]:
    for n in sizes:
        z = torch.randn(2, n, 256)

        def step(loss: Callable[[Tensor, Tensor], Tensor], z=z) -> list[Tensor]:
            z1, z2 = z[0].detach().requires_grad_(), z[1].detach().requires_grad_()
            value = loss(z1, z2)
            value.backward()
            return [value.detach(), z1.grad, z2.grad]

        def plain(z1: Tensor, z2: Tensor, n=n) -> Tensor:
            z = F.normalize(torch.cat([z1, z2]), dim=1)
            similarity = (z @ z.t() / 0.1).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
            return F.cross_entropy(similarity, torch.arange(2 * n).roll(n))

        yield (
            f"nt_xent N={n}, D=256, forward + backward",
            lambda step=step: step(lambda a, b: ops.nt_xent(a, b, 0.1, impl=impl)),
            lambda step=step, plain=plain: step(plain),
            close(1e-4),
        )


CASES = {
    "knn_graph": knn_cases,
    "edge_conv": edge_conv_cases,
    "edge_conv2": edge_conv2_cases,
    "conv_bn_act_pool": conv_bn_act_pool_cases,
    "nt_xent": nt_xent_cases,
}


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(case: Case, rounds: int) -> dict:
    name, ours, plain, agree = case
    if not agree(ours(), plain()):
        return {"case": name, "agrees": False}
    repeats = max(1, round(0.03 / max(1e-6, seconds(ours))))  # short calls are timed in blocks

    def block() -> None:
        for _ in range(repeats):
            ours()

    times = [(seconds(plain), seconds(block) / repeats) for _ in range(rounds)]
    ratios = sorted(p / o for p, o in times)
    return {
        "case": name,
        "agrees": True,
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "ours_ms": 1e3 * statistics.median(o for _, o in times),
        "plain_ms": 1e3 * statistics.median(p for p, _ in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--malloc", choices=("default", "tuned"), default="default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.malloc == "tuned" and any(os.environ.get(k) != v for k, v in TUNED_MALLOC.items()):
        command = [sys.executable, "-m", "benchmarks.ops", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **TUNED_MALLOC})

    torch.manual_seed(0)
    results = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.malloc} malloc")
    for name in args.only:
        for case in CASES[name]():
            result = measure(case, args.rounds)
            results.append(result)
            if not result["agrees"]:
                print(f"{result['case']:45s} the answers differ: no speed is reported")
                continue
            low, high = result["ratio_range"]
            print(
                f"{result['case']:45s} {result['ours_ms']:9.2f} ms, plain {result['plain_ms']:9.1f} ms, "
                f"ratio {result['ratio']:6.1f} ({low:.1f} to {high:.1f})",
                flush=True,
            )
    if args.out:
        settings = {"torch": torch.__version__, "threads": torch.get_num_threads(), "malloc": args.malloc}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
