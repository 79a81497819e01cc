"""What is measured, in one place: per operator its cases, their inputs, how it is called, and the least work that
it takes.

A case has a name, sizes, and a group (`size`): tiny (tests, rehearsals), small, layer (DGCNN's, the default),
large, batch, kinds (one shape, all kinds of clouds), gpu (issue-sized, with the target in microseconds where there
is one). `build` makes a case's inputs; `Entry.apply` turns a table of functions (ours by backend, or a peer's:
benchmarks/peers.py) into a call on them. Besides the operators there are two compositions of them: `dgcnn_backbone`
(the four edge convolutions on fixed graphs) and `dgcnn` (graphs, edge convolutions, last layer and pooling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import clouds
from crosspoint import ops

__all__ = ["ENTRIES", "OPS", "SIZES", "Case", "Floor", "Problem", "build", "cases", "ours"]

SIZES = ("tiny", "small", "layer", "large", "batch", "kinds", "gpu")
TEMPERATURE = 0.1

Functions = Mapping[str, Callable[..., Tensor]]


@dataclass(frozen=True)
class Case:
    """One shape of one operator; `sizes` by the names that the operators' docstrings use."""

    op: str
    size: str
    sizes: dict[str, int]
    kind: str = "normal"
    backward: bool = False
    dtype: torch.dtype = torch.float32
    target_us: float | None = None

    @property
    def name(self) -> str:
        marks = [ENTRIES[self.op].title.format(**self.sizes)]
        marks += [self.kind] if self.kind != "normal" else []
        marks += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        marks += ["forward + backward"] if self.backward else []
        return f"{self.op} {', '.join(marks)}"


@dataclass
class Problem:
    """A case's tensors: `inputs`, of which gradients are taken; `extra`, the rest; `grad`, which arrives."""

    case: Case
    inputs: list[Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = "random"
    grad: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        grad = None if self.grad is None else self.grad.to(dtype)
        return Problem(self.case, [x.to(dtype) for x in self.inputs], self.extra, self.source, grad)


class Floor(NamedTuple):
    """The least that the best known algorithm moves to and from memory, and computes."""

    bytes: float
    flops: float


class Entry(NamedTuple):
    title: str  # of a case, from its sizes
    backends_of: str  # the operator whose backends this has
    build: Callable[[Case], Problem]
    apply: Callable[[Functions, Problem], Callable[..., Tensor]]
    floor: Callable[[Case], Floor]
    cases: Sequence[Case]


def ours(impl: str) -> Functions:
    """Our operators on one backend, with the signatures of those in benchmarks/plain.py."""

    def edge_conv(x: Tensor, idx: Tensor, *layers: Tensor) -> Tensor:
        op = ops.edge_conv if len(layers) == 3 else ops.edge_conv2
        return op(x, idx, *layers, training=True, impl=impl)

    return {
        "knn_graph": lambda x, k: ops.knn_graph(x, k, impl=impl),
        "knn": lambda query, points, k: ops.knn(query, points, k, impl=impl)[1],
        "edge_conv": edge_conv,
        "edge_conv2": edge_conv,
        "conv_bn_act_pool": lambda *tensors: ops.conv_bn_act_pool(*tensors, training=True, impl=impl),
        "gather_max": lambda x, idx: ops.gather_max(x, idx, impl=impl)[0],
        "neighbor_sum": lambda x, idx: ops.neighbor_sum(x, idx, impl=impl),
        "nt_xent": lambda z1, z2: ops.nt_xent(z1, z2, TEMPERATURE, impl=impl),
        "info_nce": lambda z1, z2: ops.info_nce(z1, z2, TEMPERATURE, impl=impl),
        "sup_con": lambda z, labels: ops.sup_con(z, labels, TEMPERATURE, impl=impl),
    }


def cases(
    only: Sequence[str] | None = None, sizes: Sequence[str] = ("layer",), match: str = ""
) -> Iterator[Case]:
    """The cases of these operators and groups whose name contains `match`."""
    for op, entry in ENTRIES.items():
        if only is None or op in only:
            yield from (case for case in entry.cases if case.size in sizes and match in case.name)


def build(case: Case, device: str = "cpu") -> Problem:
    """The tensors of a case; the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        problem = ENTRIES[case.op].build(case)
        if case.backward and problem.grad is None:
            problem.grad = torch.randn(problem.extra.pop("out_shape"))
    extra = {name: _moved(value, device) for name, value in problem.extra.items()}
    inputs = [x.to(device, case.dtype) for x in problem.inputs]
    grad = None if problem.grad is None else problem.grad.to(device, case.dtype)
    return Problem(case, inputs, extra, problem.source, grad)


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [x.to(device) for x in value]
    return value.to(device) if isinstance(value, Tensor) else value


# ---- graphs


def _graph_problem(case: Case) -> Problem:
    s = case.sizes
    points, source = clouds(case.kind, s["B"], s["N"], s["C"])
    if case.op == "knn":
        query, _ = clouds(case.kind, s["B"], s["M"], s["C"], seed=1)
        return Problem(case, [query, points], {"k": s["k"]}, source)
    return Problem(case, [points], {"k": s["k"]}, source)


def _graph_floor(case: Case) -> Floor:
    b, n, c, k = (case.sizes[name] for name in ("B", "N", "C", "k"))
    m = case.sizes.get("M", n)
    # A grid visits some 300 candidates a query; products of features take 2 C a pair, differences of points 3 C.
    candidates = min(n, 300) if c <= 3 else n
    flops = b * m * candidates * (3 * c if c <= 8 else 2 * c)
    return Floor(4 * b * c * (n if m is n else n + m) + 8 * b * m * k, flops)


def _graph_cases(op: str, size: str, shapes: Sequence[Sequence[int]], **options: Any) -> list[Case]:
    names = ("B", "N", "C", "k") if op == "knn_graph" else ("B", "M", "N", "C", "k")
    return [Case(op, size, dict(zip(names, shape, strict=True)), **options) for shape in shapes]


_POINT_KINDS = ("uniform", "surfaces", "clusters", "duplicates", "meshes", "scans")
_KNN_GRAPH_CASES = [
    *_graph_cases("knn_graph", "tiny", [(2, 100, 3, 5), (1, 80, 16, 5)]),
    *(
        case
        for kind in _POINT_KINDS
        for case in _graph_cases("knn_graph", "tiny", [(1, 90, 3, 4)], kind=kind)
    ),
    *_graph_cases(
        "knn_graph", "small", [(1, 1024, 3, 20), (1, 1024, 64, 20), (128, 128, 3, 20), (128, 128, 64, 20)]
    ),
    *_graph_cases(
        "knn_graph", "layer", [(8, 1024, 3, 20), (8, 2048, 3, 20), (8, 1024, 64, 20), (8, 1024, 128, 20)]
    ),
    *(
        case
        for kind in ("uniform", "clusters", "meshes", "scans")
        for case in _graph_cases("knn_graph", "large", [(1, 100_000, 3, 16)], kind=kind)
    ),
    *_graph_cases("knn_graph", "large", [(1, 16384, 64, 20)]),
    *_graph_cases("knn_graph", "batch", [(40, 2048, 3, 15), (64, 1024, 3, 20), (64, 1024, 64, 20)]),
    *(
        case
        for kind in _POINT_KINDS
        for case in _graph_cases("knn_graph", "kinds", [(8, 2048, 3, 20)], kind=kind)
    ),
]
_GPU_GRAPHS = [
    ((32, 1024, 3, 20), 20.0),
    ((32, 1024, 64, 20), 60.0),
    ((32, 1024, 128, 20), 110.0),
    ((64, 2048, 3, 20), None),
    ((1, 16384, 64, 20), None),
    ((1, 100_000, 3, 20), 150.0),
    ((1, 1_000_000, 3, 16), 1200.0),
]
for _shape, _target in _GPU_GRAPHS:
    _KNN_GRAPH_CASES += _graph_cases("knn_graph", "gpu", [_shape], target_us=_target)
_KNN_CASES = [
    *_graph_cases("knn", "tiny", [(2, 40, 100, 3, 5)]),
    *_graph_cases("knn", "small", [(1, 256, 1024, 3, 3)]),
    *_graph_cases("knn", "layer", [(8, 1024, 1024, 3, 20), (8, 1024, 1024, 64, 20)]),
    *_graph_cases("knn", "large", [(1, 10_000, 100_000, 3, 16)], kind="uniform"),
    *_graph_cases("knn", "batch", [(64, 512, 2048, 3, 16)]),
    *_graph_cases(
        "knn", "gpu", [(32, 1024, 1024, 3, 20), (32, 1024, 1024, 64, 20), (1, 100_000, 100_000, 3, 20)]
    ),
]


# ---- layers on graphs


def _norm_layer(rows: int, columns: int) -> list[Tensor]:
    return [torch.randn(rows, columns) / columns**0.5, torch.rand(rows) + 0.5, torch.randn(rows)]


def _layer_problem(case: Case) -> Problem:
    s = case.sizes
    x, source = clouds(case.kind, s["B"], s["N"], s["C"])
    extra = {"idx": ops.knn_graph(x, s["k"]), "out_shape": (s["B"], s["N"], s.get("C_out", s["C"]))}
    layers = []
    if case.op == "edge_conv":
        layers = _norm_layer(s["C_out"], 2 * s["C"])
    if case.op == "edge_conv2":
        layers = _norm_layer(s["C_mid"], 2 * s["C"]) + _norm_layer(s["C_out"], s["C_mid"])
    return Problem(case, [x, *layers], extra, source)


def _layer_apply(functions: Functions, problem: Problem) -> Callable[..., Tensor]:
    layer, idx = functions[problem.case.op], problem.extra["idx"]
    return lambda x, *layers: layer(x, idx, *layers)


def _edge_conv_floor(case: Case) -> Floor:
    s = case.sizes
    nodes, edges = s["B"] * s["N"], s["B"] * s["N"] * s["k"]
    moved = 4 * nodes * (s["C"] + s["C_out"]) + 8 * edges
    flops = 4 * nodes * s["C"] * s["C_out"] + 3 * edges * s["C_out"]
    if case.backward:  # x, dx, dy, and a byte for each winner; dx and dW are two more products each
        moved += 4 * nodes * (2 * s["C"] + s["C_out"]) + 2 * nodes * s["C_out"] + 8 * edges
        flops = 12 * nodes * s["C"] * s["C_out"] + 5 * edges * s["C_out"]
    return Floor(moved, flops)


def _edge_conv2_floor(case: Case) -> Floor:
    s = case.sizes
    first = _edge_conv_floor(Case("edge_conv", "", {**s, "C_out": s["C_mid"]}, backward=case.backward))
    edges = s["B"] * s["N"] * s["k"]
    backward = 4 * edges * s["C_mid"] ** 2 if case.backward else 0
    return Floor(first.bytes, first.flops + 2 * edges * s["C_mid"] * s["C_out"] + backward)


def _gather_floor(case: Case) -> Floor:
    s = case.sizes
    nodes, edges = s["B"] * s["N"], s["B"] * s["N"] * s["k"]
    times = 2 if case.backward else 1
    return Floor(times * (8 * nodes * s["C"] + 8 * edges), times * edges * s["C"])


def _layer_cases(
    op: str, size: str, names: str, shapes: Sequence[Sequence[int]], **options: Any
) -> list[Case]:
    options = {"backward": True, **options}
    return [Case(op, size, dict(zip(names.split(), shape, strict=True)), **options) for shape in shapes]


_DGCNN_WIDTHS = ((3, 64), (64, 64), (64, 128), (128, 256))
_EDGE = "B N k C C_out"
_EDGE_CONV_CASES = [
    *_layer_cases("edge_conv", "tiny", _EDGE, [(1, 30, 4, 3, 8)]),
    *_layer_cases("edge_conv", "tiny", _EDGE, [(2, 25, 4, 5, 7)], backward=False),
    *_layer_cases(
        "edge_conv", "small", _EDGE, [(1, 1024, 20, 3, 64), (1, 1024, 20, 64, 64), (64, 128, 20, 64, 64)]
    ),
    *_layer_cases("edge_conv", "layer", _EDGE, [(8, 1024, 20, *widths) for widths in _DGCNN_WIDTHS]),
    *_layer_cases("edge_conv", "large", _EDGE, [(1, 16384, 20, 64, 64)]),
    *_layer_cases("edge_conv", "batch", _EDGE, [(32, 1024, 20, 64, 64)]),
    *_layer_cases("edge_conv", "kinds", _EDGE, [(8, 1024, 20, 3, 64)], kind="duplicates"),
    *_layer_cases("edge_conv", "kinds", _EDGE, [(8, 1024, 20, 3, 64)], kind="meshes"),
]
for _widths in _DGCNN_WIDTHS:
    for _backward, _target in ((False, 30.0), (True, 120.0)):
        _EDGE_CONV_CASES += _layer_cases(
            "edge_conv", "gpu", _EDGE, [(32, 1024, 20, *_widths)],
            backward=_backward, target_us=_target if _widths == (64, 64) else None,
        )  # fmt: skip
_EDGE2 = "B N k C C_mid C_out"
_PART_WIDTHS = ((3, 64, 64), (64, 64, 64), (3, 64, 128))
_EDGE_CONV2_CASES = [
    *_layer_cases("edge_conv2", "tiny", _EDGE2, [(1, 30, 4, 3, 8, 9)]),
    *_layer_cases("edge_conv2", "small", _EDGE2, [(1, 256, 20, 64, 64, 64)]),
    *_layer_cases("edge_conv2", "layer", _EDGE2, [(2, 1024, 20, *widths) for widths in _PART_WIDTHS]),
    *_layer_cases("edge_conv2", "batch", _EDGE2, [(8, 1024, 20, 64, 64, 64)]),
    *_layer_cases("edge_conv2", "gpu", _EDGE2, [(32, 1024, 20, *widths) for widths in _PART_WIDTHS]),
]


def _gather_cases(op: str) -> list[Case]:
    names = "B N k C"
    return [
        *_layer_cases(op, "tiny", names, [(2, 30, 4, 5)]),
        *_layer_cases(op, "small", names, [(1, 1024, 20, 64)]),
        *_layer_cases(op, "layer", names, [(8, 1024, 20, 64), (8, 1024, 20, 256)]),
        *_layer_cases(op, "large", names, [(1, 16384, 20, 64)]),
        *_layer_cases(op, "gpu", names, [(32, 1024, 20, 64), (32, 1024, 20, 256)]),
    ]


# ---- pooling


def _pool_problem(case: Case) -> Problem:
    s = case.sizes
    x, source = clouds(case.kind, s["B"], s["N"], s["C"])
    layer = _norm_layer(s["C_out"], s["C"])
    return Problem(case, [x, *layer], {"out_shape": (s["B"], 2 * s["C_out"])}, source)


def _pool_floor(case: Case) -> Floor:
    s = case.sizes
    product = 2 * s["B"] * s["N"] * s["C"] * s["C_out"]
    moved = 4 * (s["B"] * s["N"] * s["C"] + s["C"] * s["C_out"])
    # Backward: dx and dW; h is either kept or computed again, which is not counted.
    return Floor(3 * moved, 3 * product) if case.backward else Floor(moved, product)


_POOL = "B N C C_out"
_POOL_CASES = [
    *_layer_cases("conv_bn_act_pool", "tiny", _POOL, [(3, 20, 6, 10)]),
    *_layer_cases("conv_bn_act_pool", "small", _POOL, [(1, 1024, 512, 1024)]),
    *_layer_cases("conv_bn_act_pool", "layer", _POOL, [(8, 1024, 512, 1024)]),
    *_layer_cases("conv_bn_act_pool", "batch", _POOL, [(32, 1024, 512, 1024)]),
    *_layer_cases("conv_bn_act_pool", "gpu", _POOL, [(32, 1024, 512, 1024)], backward=False),
    *_layer_cases("conv_bn_act_pool", "gpu", _POOL, [(32, 1024, 512, 1024)]),
]


# ---- contrastive losses


def _loss_problem(case: Case) -> Problem:
    n, d = case.sizes["N"], case.sizes["D"]
    if case.op == "sup_con":
        labels = torch.randint(0, case.sizes["classes"], (n,))
        return Problem(case, [torch.randn(n, d)], {"labels": labels}, grad=torch.ones(()))
    return Problem(case, [torch.randn(n, d), torch.randn(n, d)], grad=torch.ones(()))


def _loss_apply(functions: Functions, problem: Problem) -> Callable[..., Tensor]:
    loss = functions[problem.case.op]
    if problem.case.op == "sup_con":
        return lambda z: loss(z, problem.extra["labels"])
    return loss


def _loss_floor(case: Case) -> Floor:
    """Products of the similarities (half of them, where they are symmetric) and, backward, of what is not kept."""
    n, d = case.sizes["N"], case.sizes["D"]
    rows = 2 * n if case.op == "nt_xent" else n
    unit = 2 * rows * rows * d
    forward, both = (1, 4) if case.op == "info_nce" else (0.5, 2)
    vectors = n if case.op == "sup_con" else 2 * n
    return Floor(
        case.dtype.itemsize * vectors * d * (2 if case.backward else 1),
        (both if case.backward else forward) * unit,
    )


def _loss_cases(op: str, size: str, shapes: Sequence[Sequence[int]], **options: Any) -> list[Case]:
    names = "N D classes" if op == "sup_con" else "N D"
    return _layer_cases(op, size, names, shapes, **options)


_BF16_TARGETS = {8192: 700.0, 32768: 11_000.0, 131072: 175_000.0}
_NT_XENT_CASES = [
    *_loss_cases("nt_xent", "tiny", [(16, 24)]),
    *_loss_cases("nt_xent", "small", [(20, 256), (64, 256)]),
    *_loss_cases("nt_xent", "layer", [(256, 256), (1024, 256), (4096, 256)]),
    *_loss_cases("nt_xent", "large", [(16384, 256)]),
    *_loss_cases("nt_xent", "gpu", [(1024, 256), (8192, 256)]),
]
_INFO_NCE_CASES = [
    *_loss_cases("info_nce", "tiny", [(16, 24)]),
    *_loss_cases("info_nce", "small", [(64, 256)]),
    *_loss_cases("info_nce", "layer", [(1024, 256), (4096, 256)]),
    *_loss_cases("info_nce", "large", [(16384, 256)]),
]
for _pairs in (1024, 8192, 32768, 131072):
    for _width in (128, 256):
        _NT_XENT_CASES += _loss_cases(
            "nt_xent", "gpu", [(_pairs, _width)], dtype=torch.bfloat16,
            target_us=_BF16_TARGETS.get(_pairs) if _width == 256 else None,
        )  # fmt: skip
    _INFO_NCE_CASES += _loss_cases("info_nce", "gpu", [(_pairs, 256)], dtype=torch.bfloat16)
_SUP_CON_CASES = [
    *_loss_cases("sup_con", "tiny", [(30, 24, 3)]),
    *_loss_cases("sup_con", "small", [(128, 256, 10)]),
    *_loss_cases("sup_con", "layer", [(2048, 256, 10), (2048, 256, 1000)]),
    *_loss_cases("sup_con", "large", [(16384, 256, 10)]),
    *_loss_cases("sup_con", "gpu", [(8192, 256, 10)], dtype=torch.bfloat16),
]


# ---- compositions


def _dgcnn_problem(case: Case) -> Problem:
    s = case.sizes
    points, source = clouds(case.kind, s["B"], s["N"])
    layers = [tensor for c_in, c_out in _DGCNN_WIDTHS for tensor in _norm_layer(c_out, 2 * c_in)]
    if case.op == "dgcnn":
        out_shape = (s["B"], 2048)
        return Problem(
            case, [points, *layers, *_norm_layer(1024, 512)], {"k": s["k"], "out_shape": out_shape}, source
        )
    graphs, x = [], points
    for i in range(4):
        graphs.append(ops.knn_graph(x, s["k"]))
        x = ops.edge_conv(x, graphs[i], *layers[3 * i : 3 * i + 3], training=True)
    return Problem(case, [points, *layers], {"graphs": graphs, "out_shape": (s["B"], s["N"], 512)}, source)


def _dgcnn_apply(functions: Functions, problem: Problem) -> Callable[..., Tensor]:
    edge_conv, graphs = functions["edge_conv"], problem.extra.get("graphs")

    def forward(x: Tensor, *layers: Tensor) -> Tensor:
        stages = []
        for i in range(4):
            idx = graphs[i] if graphs else functions["knn_graph"](x.detach(), problem.extra["k"])
            x = edge_conv(x, idx, *layers[3 * i : 3 * i + 3])
            stages.append(x)
        x = torch.cat(stages, 2)
        return x if graphs else functions["conv_bn_act_pool"](x, *layers[12:])

    return forward


def _dgcnn_floor(case: Case) -> Floor:
    s = case.sizes
    nodes = {name: s[name] for name in ("B", "N", "k")}
    parts = [
        _edge_conv_floor(Case("edge_conv", "", {**nodes, "C": c_in, "C_out": c_out}, backward=case.backward))
        for c_in, c_out in _DGCNN_WIDTHS
    ]
    if case.op == "dgcnn":
        parts += [_graph_floor(Case("knn_graph", "", {**nodes, "C": c_in})) for c_in, _ in _DGCNN_WIDTHS]
        pooled = {**nodes, "C": 512, "C_out": 1024}
        parts.append(_pool_floor(Case("conv_bn_act_pool", "", pooled, backward=case.backward)))
    return Floor(sum(part.bytes for part in parts), sum(part.flops for part in parts))


_CLOUDS = "B N k"
_BACKBONE_CASES = [
    *_layer_cases("dgcnn_backbone", "tiny", _CLOUDS, [(1, 30, 4)]),
    *_layer_cases("dgcnn_backbone", "layer", _CLOUDS, [(8, 1024, 20)]),
    *_layer_cases("dgcnn_backbone", "gpu", _CLOUDS, [(32, 1024, 20)], target_us=700.0),
]
_DGCNN_CASES = [
    *_layer_cases("dgcnn", "tiny", _CLOUDS, [(3, 30, 4)]),
    *_layer_cases("dgcnn", "layer", _CLOUDS, [(8, 1024, 20)]),
    *_layer_cases("dgcnn", "gpu", _CLOUDS, [(32, 1024, 20)]),
]


ENTRIES = {
    "knn_graph": Entry(
        "({B}, {N}, {C}), k={k}", "knn_graph", _graph_problem,
        lambda functions, p: lambda x: functions["knn_graph"](x, p.extra["k"]),
        _graph_floor, _KNN_GRAPH_CASES,
    ),
    "knn": Entry(
        "({B}, {M}, {C}) in ({B}, {N}, {C}), k={k}", "knn", _graph_problem,
        lambda functions, p: lambda x, y: functions["knn"](x, y, p.extra["k"]),
        _graph_floor, _KNN_CASES,
    ),
    "edge_conv": Entry(
        "({B}, {N}, {C}) -> {C_out}, k={k}", "edge_conv",
        _layer_problem, _layer_apply, _edge_conv_floor, _EDGE_CONV_CASES,
    ),
    "edge_conv2": Entry(
        "({B}, {N}, {C}) -> {C_mid} -> {C_out}, k={k}", "edge_conv2",
        _layer_problem, _layer_apply, _edge_conv2_floor, _EDGE_CONV2_CASES,
    ),
    "conv_bn_act_pool": Entry(
        "({B}, {N}, {C}) -> {C_out}", "conv_bn_act_pool", _pool_problem,
        lambda functions, p: functions["conv_bn_act_pool"], _pool_floor, _POOL_CASES,
    ),
    "gather_max": Entry(
        "({B}, {N}, {C}), k={k}", "gather_max", _layer_problem, _layer_apply, _gather_floor, _gather_cases("gather_max")
    ),
    "neighbor_sum": Entry(
        "({B}, {N}, {C}), k={k}", "neighbor_sum", _layer_problem, _layer_apply, _gather_floor,
        _gather_cases("neighbor_sum"),
    ),
    "nt_xent": Entry("N={N}, D={D}", "nt_xent", _loss_problem, _loss_apply, _loss_floor, _NT_XENT_CASES),
    "info_nce": Entry("N={N}, D={D}", "info_nce", _loss_problem, _loss_apply, _loss_floor, _INFO_NCE_CASES),
    "sup_con": Entry(
        "N={N}, D={D}, {classes} classes", "sup_con", _loss_problem, _loss_apply, _loss_floor, _SUP_CON_CASES
    ),
    "dgcnn_backbone": Entry(
        "({B}, {N}, 3), k={k}", "edge_conv", _dgcnn_problem, _dgcnn_apply, _dgcnn_floor, _BACKBONE_CASES
    ),
    "dgcnn": Entry("({B}, {N}, 3), k={k}", "edge_conv", _dgcnn_problem, _dgcnn_apply, _dgcnn_floor, _DGCNN_CASES),
}  # fmt: skip
OPS = tuple(ENTRIES)
