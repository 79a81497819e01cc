"""Small calls of every operator, for scripts/gpu_check.sh: its sanitizers, graphs, streams and determinism run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.knn_paths import forced
from crosspoint import ops

__all__ = ["Small", "small_calls"]


class Small(NamedTuple):
    """A call whose inputs can be changed in place; those that floats are differentiate."""

    op: str
    name: str
    inputs: list[Tensor]
    call: Callable[..., object]  # (impl, *inputs)


def small_calls(device: str, only: str | None) -> Iterator[Small]:
    """Awkward shapes of every operator, a few blocks each. Inputs are made on the host: copies count as written."""
    for op, calls in CALLS.items():
        if only in (None, op):
            torch.manual_seed(0)
            for name, inputs, call in calls(device):
                yield Small(op, name, [x.to(device) for x in inputs], call)


def knn_graph_calls(device: str) -> Iterator[tuple]:
    lengths = torch.tensor([77, 5, 0]).to(device)

    def graph(k: int, **options: object) -> Callable[..., object]:
        return lambda impl, x: ops.knn_graph(x, k, impl=impl, **options)

    yield "(3, 77, 3), k=20, lengths", [torch.randn(3, 77, 3)], graph(20, lengths=lengths)
    yield "(1, 300, 37), k=20", [torch.randn(1, 300, 37)], graph(20, include_self=False)
    yield "(1, 1500, 3), k=16", [torch.randn(1, 1500, 3)], graph(16)
    yield "(1, 200, 5), k=150", [torch.randn(1, 200, 5)], graph(150)

    def by_tree(impl: str, x: Tensor) -> Tensor:
        with forced("tree"):
            return ops.knn_graph(x, 9, impl=impl)

    yield "(2, 700, 3), k=9, tree", [torch.randn(2, 700, 3)], by_tree


def knn_calls(device: str) -> Iterator[tuple]:
    inputs = [torch.randn(2, 33, 3), torch.randn(2, 129, 3)]
    yield "(2, 33, 3) in (2, 129, 3), k=5", inputs, lambda impl, x, y: ops.knn(x, y, 5, impl=impl)
    inputs = [torch.randn(1, 40, 24), torch.randn(1, 70, 24)]
    yield "(1, 40, 24) in (1, 70, 24), k=9", inputs, lambda impl, x, y: ops.knn(x, y, 9, impl=impl)


def graph_of(device: str, nodes: int, k: int) -> Tensor:
    """idx (2, nodes, k) with places left empty."""
    idx = torch.randint(0, nodes, (2, nodes, k))
    idx[1, nodes // 2 :, k // 2 :] = -1
    return idx.to(device)


def norm_of(channels: int) -> list[Tensor]:
    """gamma of both signs, beta."""
    return [torch.randn(channels), torch.randn(channels)]


def edge_conv_calls(device: str) -> Iterator[tuple]:
    for nodes, k, c_in, c_out in ((61, 7, 3, 32), (45, 5, 20, 70)):
        idx = graph_of(device, nodes, k)
        inputs = [torch.randn(2, nodes, c_in), torch.randn(c_out, 2 * c_in), *norm_of(c_out)]

        def call(impl: str, *values: Tensor, idx: Tensor = idx) -> Tensor:
            return ops.edge_conv(values[0], idx, *values[1:], training=True, impl=impl)

        yield f"(2, {nodes}, {c_in}) -> {c_out}, k={k}", inputs, call


def edge_conv2_calls(device: str) -> Iterator[tuple]:
    for nodes, k, c_in, c_mid, c_out in ((53, 6, 3, 32, 64), (40, 5, 20, 64, 24)):
        idx = graph_of(device, nodes, k)
        layers = [torch.randn(c_mid, 2 * c_in), *norm_of(c_mid), torch.randn(c_out, c_mid), *norm_of(c_out)]

        def call(impl: str, *values: Tensor, idx: Tensor = idx) -> Tensor:
            return ops.edge_conv2(values[0], idx, *values[1:], training=True, impl=impl)

        yield (
            f"(2, {nodes}, {c_in}) -> {c_mid} -> {c_out}, k={k}",
            [torch.randn(2, nodes, c_in), *layers],
            call,
        )


def conv_bn_act_pool_calls(device: str) -> Iterator[tuple]:
    for shape, c_out, lengths in (((2, 70, 40), 72, None), ((3, 50, 20), 33, torch.tensor([50, 7, 1]))):
        given = None if lengths is None else lengths.to(device)
        inputs = [torch.randn(shape), torch.randn(c_out, shape[2]), *norm_of(c_out)]

        def call(impl: str, *values: Tensor, lengths: Tensor | None = given) -> Tensor:
            return ops.conv_bn_act_pool(*values, lengths=lengths, training=True, impl=impl)

        yield f"{shape} -> {c_out}{'' if given is None else ', lengths'}", inputs, call


def gather_max_calls(device: str) -> Iterator[tuple]:
    idx = graph_of(device, 61, 7)
    yield "(2, 61, 37), k=7", [torch.randn(2, 61, 37)], lambda impl, x: ops.gather_max(x, idx, impl=impl)


def neighbor_sum_calls(device: str) -> Iterator[tuple]:
    idx = graph_of(device, 61, 7)
    yield "(2, 61, 37), k=7", [torch.randn(2, 61, 37)], lambda impl, x: ops.neighbor_sum(x, idx, impl=impl)


def pair_calls(loss: Callable[..., Tensor]) -> Callable[[str], Iterator[tuple]]:
    def calls(device: str) -> Iterator[tuple]:
        for shape in ((65, 40), (130, 128)):
            inputs = [torch.randn(shape), torch.randn(shape), torch.tensor(0.2)]
            yield f"{shape}", inputs, lambda impl, a, b, t: loss(a, b, t.square() + 0.05, impl=impl)

    return calls


def sup_con_calls(device: str) -> Iterator[tuple]:
    labels = torch.randint(0, 9, (97,)).to(device)
    inputs = [torch.randn(97, 40), torch.tensor(0.2)]
    yield (
        "(97, 40), 9 classes",
        inputs,
        lambda impl, z, t: ops.sup_con(z, labels, t.square() + 0.05, impl=impl),
    )


CALLS: dict[str, Callable[[str], Iterator[tuple]]] = {
    "knn_graph": knn_graph_calls,
    "knn": knn_calls,
    "edge_conv": edge_conv_calls,
    "edge_conv2": edge_conv2_calls,
    "conv_bn_act_pool": conv_bn_act_pool_calls,
    "gather_max": gather_max_calls,
    "neighbor_sum": neighbor_sum_calls,
    "nt_xent": pair_calls(ops.nt_xent),
    "info_nce": pair_calls(ops.info_nce),
    "sup_con": sup_con_calls,
}
