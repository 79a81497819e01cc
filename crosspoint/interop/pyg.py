"""Graphs and edge convolutions with the calls of `torch_geometric.nn` (PyG) and `torch_cluster`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspoint import ops
from crosspoint.interop._blocks import CannotFuse, max_over_edges, read_block
from crosspoint.interop._packed import packed_knn, packed_knn_graph, sizes_of

__all__ = ["CannotFuse", "DynamicEdgeConv", "EdgeConv", "knn", "knn_graph"]

_FLOWS = ("source_to_target", "target_to_source")
_AGGREGATIONS = ("max", "mean", "add", "sum")
_SLOTS_PER_EDGE = 64  # how far a padded neighbour list may outgrow the edges


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
    *,
    ptr_x: Tensor | None = None,
    ptr_y: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """For each element of `y`, the k nearest elements of `x` of the same example.

    Signature of `torch_geometric.nn.knn` (and `torch_cluster.knn`); `ptr_x` and `ptr_y` are added. The same:
    row 0 of the result counts in y and ascends, row 1 counts in x, nearest first; fewer than k where an
    example has fewer. See `knn_graph` for what differs, and for memory.

    Args:
        x: (N, F); y: (M, F) of x's dtype; one-dimensional tensors are columns.
        k: neighbours, at least 1.
        batch_x, batch_y: (N,), (M,) ascending integers, the example of each element; both or, for a single
            example, none.
        cosine, num_workers, batch_size, impl: as for `knn_graph`.
        ptr_x, ptr_y: in place of the batch vectors, (B + 1,) rows at which the examples begin, and N or M.

    Returns:
        (2, E) int64.
    """
    x, y = _as_rows("knn", "x", x), _as_rows("knn", "y", y)
    sizes_x = _sizes("knn", x, "x", batch_x, ptr_x, batch_size, ("batch_x", "ptr_x"))
    sizes_y = _sizes("knn", y, "y", batch_y, ptr_y, batch_size, ("batch_y", "ptr_y"))
    examples = max(len(sizes_x), len(sizes_y))
    for sizes, vector, name in ((sizes_x, batch_x, "x"), (sizes_y, batch_y, "y")):
        if len(sizes) < examples and vector is None:
            raise ValueError(
                f"knn: {name} is {len(sizes)} examples and the other side {examples}; say which is which "
                f"with batch_{name} or ptr_{name}"
            )
        sizes += [0] * (examples - len(sizes))
    if cosine:
        x, y = _directions(x), _directions(y)
    _, idx = packed_knn(y, x, k, sizes_y, sizes_x, impl=impl)
    full = all(theirs >= k or not ours for ours, theirs in zip(sizes_y, sizes_x, strict=True))
    return _edges(idx, full)


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
    *,
    ptr: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The edges from each element's k nearest elements of the same example to it.

    Signature of `torch_geometric.nn.knn_graph` (and `torch_cluster.knn_graph`); `ptr` is added. The same:
    with source_to_target, row 0 is the neighbour and row 1 the element, in ascending order of elements and
    nearest first (target_to_source swaps the rows); `loop` counts the element among its k neighbours; fewer
    than k where an example has fewer.

    Different: equal distances go by index. An element is told from its duplicates by its index: with loop it
    is always its own first neighbour, without it there are never k + 1. `cosine` runs on CPU too, as Euclidean
    search among the directions x / |x| (the order of 1 - cos; an all-zero row has none and stays at the
    origin). An unsorted batch raises; the original gives wrong edges. No integer dtypes, no `num_workers`:
    it is accepted, and has no effect, since torch's threads share the work.

    Args:
        x: (N, F) floating point; a one-dimensional tensor is a column.
        k: neighbours, at least 1.
        batch: (N,) ascending integers, the example of each element; one example by default.
        batch_size: examples, where the last may be empty.
        ptr: in place of batch, (B + 1,) rows at which the examples begin, and N.
        impl: backend of `crosspoint.ops.knn_graph`.

    Returns:
        (2, E) int64, without a gradient.

    Memory: (N, k) indices and the edges. Examples of like size are searched together, padded to less than
    twice their size, one such group at a time: no N x N matrix, and no (examples, largest) padding however
    uneven they are. Reading batch or ptr waits for a GPU; a single example does not.
    """
    if flow not in _FLOWS:
        raise ValueError(f"knn_graph: flow must be one of {_FLOWS}, got {flow!r}")
    x = _as_rows("knn_graph", "x", x)
    sizes = _sizes("knn_graph", x, "x", batch, ptr, batch_size, ("batch", "ptr"))
    if cosine:
        x = _directions(x)
    idx = packed_knn_graph(x, k, sizes, include_self=loop, impl=impl)
    edges = _edges(idx, full=all(size >= k + (not loop) or not size for size in sizes))
    return edges.flip(0) if flow == "source_to_target" else edges


class _EdgeConvBase(nn.Module):
    """`nn` on [x_i, x_j - x_i], aggregated over the edges into i."""

    def __init__(self, nn: nn.Module, aggr: str, strict: bool, impl: str):
        super().__init__()
        if aggr not in _AGGREGATIONS:
            raise ValueError(f"{type(self).__name__}: aggr must be one of {_AGGREGATIONS}, got {aggr!r}")
        self.nn = nn
        self.aggr = aggr
        self.strict = strict
        self.impl = impl
        if strict:
            self._block()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise `nn` anew, as PyG does; the constructor calls it, there too."""
        _reset(self.nn)

    @property
    def fused(self) -> bool:
        """Whether calls run on the fused operator."""
        try:
            self._block()
        except CannotFuse:
            return False
        return True

    def _block(self):
        """What the fused operator needs of `nn`, read at every call because modules can be changed."""
        name = type(self).__name__
        plain = f"{name}(..., strict=False) computes it edge by edge, as PyG does"
        if self.aggr != "max":
            raise CannotFuse(f"{name}: only aggr='max' is fused, got {self.aggr!r}; {plain}")
        try:
            return read_block(self.nn, nn.Linear, nn.BatchNorm1d)
        except CannotFuse as reason:
            raise CannotFuse(f"{name}: nn cannot be fused: {reason}. {plain}") from None

    def _rows(self, x: Tensor) -> Tensor:
        if isinstance(x, tuple):
            if len(x) != 2 or x[0] is not x[1]:
                raise CannotFuse(f"{type(self).__name__}: x of two sets (bipartite graphs) is not supported")
            x = x[0]
        if x.dim() != 2:
            raise ValueError(f"{type(self).__name__}: x must be (N, F), got shape {tuple(x.shape)}")
        return x

    def _on_lists(self, x: Tensor, idx: Tensor) -> Tensor:
        """x (B, N, C), idx (B, N, k) -> (B, N, C_out), fused."""
        block = self._block()
        channels = x.shape[2]
        if block.weight.shape[1] != 2 * channels:
            raise ValueError(
                f"{type(self).__name__}: nn takes {block.weight.shape[1]} features, but [x_i, x_j - x_i] has "
                f"2 * {channels}"
            )
        centre, offset = block.weight.split(channels, dim=1)  # PyG's edge feature, swapped
        return max_over_edges(x, idx, torch.cat([offset, centre], dim=1), block, self.impl)

    def _on_edges(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """The same in plain PyTorch, edge by edge; any nn, any aggregation."""
        centre = x[target]
        h = self.nn(torch.cat([centre, x[source] - centre], dim=-1))
        reduce = {"max": "amax", "mean": "mean"}.get(self.aggr, "sum")
        out = h.new_zeros(x.shape[0], h.shape[1])
        return out.scatter_reduce(0, target[:, None].expand_as(h), h, reduce, include_self=False)

    def extra_repr(self) -> str:
        return f"aggr={self.aggr!r}, strict={self.strict}, impl={self.impl!r}"


class EdgeConv(_EdgeConvBase):
    """aggr over the edges (j, i) of nn([x_i, x_j - x_i]).

    Constructor and call of `torch_geometric.nn.EdgeConv`, with its state_dict; `nn` is initialised anew by the
    constructor, as there. Fused for aggr="max" and `nn` a Linear, or a Sequential of Linear, then perhaps
    BatchNorm1d, then perhaps ReLU or LeakyReLU. Any other raises CannotFuse, unless strict=False: then it
    runs edge by edge in plain PyTorch, as in PyG (`fused` tells which).

    The same: values, gradients and running statistics (over the edges); nodes without edges give 0; an edge
    given twice counts twice. Different: where edges tie for the maximum, one of them takes the gradient
    instead of a share each; edge_index must be a (2, E) tensor; one set of nodes, no bipartite pair.

    Args:
        nn: takes 2 F features.
        aggr: "max"; with strict=False also "mean", "add", "sum".
        flow: "source_to_target" (edge_index[1] aggregates) or "target_to_source".
        strict: whether what cannot be fused raises.
        impl: backend of `crosspoint.ops.edge_conv`.

    Shapes: x (N, F), edge_index (2, E) int64 -> (N, C_out). Calls read the largest degree on the host.

    Memory: neighbour lists of N x (largest degree) indices, refused where that is above 64 per edge and a
    million, and what `crosspoint.ops.edge_conv` keeps; nothing with an edge axis and a channel axis.
    """

    def __init__(
        self,
        nn: nn.Module,
        aggr: str = "max",
        *,
        flow: str = "source_to_target",
        strict: bool = True,
        impl: str = "auto",
    ):
        super().__init__(nn, aggr, strict, impl)
        if flow not in _FLOWS:
            raise ValueError(f"EdgeConv: flow must be one of {_FLOWS}, got {flow!r}")
        self.flow = flow

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor) -> Tensor:
        x = self._rows(x)
        source, target = self._check(x, edge_index)
        if not self.strict and not self.fused:
            return self._on_edges(x, source, target)
        return self._on_lists(x[None], self._lists(source, target, x.shape[0])[None])[0]

    def _check(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
            raise TypeError(
                "EdgeConv: edge_index must be a dense (2, E) tensor; convert sparse adjacencies first"
            )
        if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
            raise ValueError(
                f"EdgeConv: edge_index must be (2, E) int64, got {tuple(edge_index.shape)} {edge_index.dtype}"
            )
        if edge_index.numel():
            low, high = edge_index.aminmax()
            if low < 0 or high >= x.shape[0]:
                raise IndexError(
                    f"EdgeConv: edge_index holds {int(low)} to {int(high)}, but x has {x.shape[0]} rows"
                )
        source, target = edge_index
        return (source, target) if self.flow == "source_to_target" else (target, source)

    def _lists(self, source: Tensor, target: Tensor, nodes: int) -> Tensor:
        """The sources of each target as rows (N, largest degree), -1 behind them, in the order of the edges."""
        edges = source.numel()
        block = self._block()
        if edges == 1 and block.bn is not None and block.bn.training:
            raise ValueError("EdgeConv: expected more than 1 edge when training with a batch norm")
        degree = torch.bincount(target, minlength=nodes)
        largest = int(degree.max()) if edges else 0
        if nodes * largest > max(1_000_000, _SLOTS_PER_EDGE * edges):
            raise ValueError(
                f"EdgeConv: one node has {largest} of the {edges} edges, so neighbour lists would take {nodes} x "
                f"{largest} indices; for graphs with such hubs use torch_geometric.nn.EdgeConv"
            )
        order = target.argsort(stable=True)
        target = target[order]
        slot = torch.arange(edges, device=target.device) - (degree.cumsum(0) - degree)[target]
        lists = torch.full((nodes, largest), -1, dtype=torch.int64, device=target.device)
        lists[target, slot] = source[order]
        return lists

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, flow={self.flow!r}"


class DynamicEdgeConv(_EdgeConvBase):
    """EdgeConv on the k-NN graph of its own input, built anew at every call; each element is its own neighbour.

    Constructor and call of `torch_geometric.nn.DynamicEdgeConv`; see `EdgeConv` for `nn`, `strict`, what is
    the same and what differs, and `knn_graph` for ties. `ptr` may replace `batch`. No bipartite pair.

    Args:
        nn, aggr, strict, impl: as for `EdgeConv`.
        k: neighbours; an example with fewer elements uses all of them.
        num_workers: accepted; has no effect, as there for batches.

    Shapes: x (N, F), batch (N,) ascending integers or None -> (N, C_out).

    Memory: that of `knn_graph` and of `crosspoint.ops.edge_conv`.
    """

    def __init__(
        self,
        nn: nn.Module,
        k: int,
        aggr: str = "max",
        num_workers: int = 1,
        *,
        strict: bool = True,
        impl: str = "auto",
    ):
        super().__init__(nn, aggr, strict, impl)
        if k < 1:
            raise ValueError(f"DynamicEdgeConv: k must be at least 1, got {k}")
        self.k = k
        self.num_workers = num_workers

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], batch: Tensor | None = None, *, ptr: Tensor | None = None
    ) -> Tensor:
        x = self._rows(x)
        sizes = _sizes("DynamicEdgeConv", x, "x", batch, ptr, None, ("batch", "ptr"))
        fused = self.strict or self.fused
        if fused and len(set(sizes)) == 1 and sizes[0]:
            clouds = x.reshape(len(sizes), sizes[0], x.shape[1])  # faster backward than one cloud of them all
            return self._on_lists(clouds, ops.knn_graph(clouds, self.k, impl=self.impl)).flatten(0, 1)
        idx = packed_knn_graph(x, self.k, sizes, include_self=True, impl=self.impl)
        if fused:
            return self._on_lists(x[None], idx[None])[0]
        source, target = _edges(idx, full=False).flip(0)
        return self._on_edges(x, source, target)

    def extra_repr(self) -> str:
        return f"k={self.k}, {super().extra_repr()}"


def _reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
        return
    for child in module.children():
        _reset(child)


def _as_rows(op: str, name: str, x: Tensor) -> Tensor:
    if x.dim() not in (1, 2):
        raise ValueError(f"{op}: {name} must be (N, F), got shape {tuple(x.shape)}")
    return x[:, None] if x.dim() == 1 else x


def _directions(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def _edges(idx: Tensor, full: bool) -> Tensor:
    """Neighbour lists (M, k) as edges (2, E): the list, and what is in it, row by row."""
    owner = torch.arange(idx.shape[0], device=idx.device)[:, None].expand_as(idx)
    if full:
        return torch.stack([owner.reshape(-1), idx.reshape(-1)])
    exists = idx >= 0
    return torch.stack([owner[exists], idx[exists]])


def _sizes(
    op: str,
    x: Tensor,
    of: str,
    batch: Tensor | None,
    ptr: Tensor | None,
    batch_size: int | None,
    names: tuple[str, str],
) -> list[int]:
    """The number of elements of each example, on the host."""
    batch_name, ptr_name = names
    if batch is not None and ptr is not None:
        raise ValueError(f"{op}: {batch_name} and {ptr_name} say the same; pass one of them")
    vector, name = (ptr, ptr_name) if batch is None else (batch, batch_name)
    if vector is None:
        return [x.shape[0]]
    if vector.dim() != 1 or vector.is_floating_point() or vector.dtype == torch.bool:
        raise ValueError(
            f"{op}: {name} must hold integers in one dimension, got {tuple(vector.shape)} {vector.dtype}"
        )
    if batch is None:
        first, *ends = ptr.tolist() or [None]
        if first != 0 or (batch_size is not None and len(ends) != batch_size):
            raise ValueError(
                f"{op}: {ptr_name} must hold 0 and then the end of each example"
                + (f", batch_size = {batch_size} of them" if batch_size is not None else "")
                + f"; got {ptr.numel()} numbers that begin with {first}"
            )
        return sizes_of(ends, x.shape[0], f"{op}: {ptr_name}", of)
    if batch.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: {batch_name} must name the example of each of the {x.shape[0]} rows of {of}, got "
            f"{batch.shape[0]} numbers"
        )
    if batch.numel() == 0:
        return [0] * (batch_size or 0)
    if (batch[1:] < batch[:-1]).any() or batch[0] < 0:
        raise ValueError(
            f"{op}: {batch_name} must ascend from 0 or more: the rows of an example lie one behind the other. "
            f"Sort first: order = {batch_name}.argsort(stable=True), then {of}[order] and {batch_name}[order]"
        )
    if batch_size is not None and batch[-1] >= batch_size:
        raise ValueError(f"{op}: batch_size is {batch_size}, but {batch_name} names example {int(batch[-1])}")
    return torch.bincount(batch, minlength=batch_size or 0).tolist()
