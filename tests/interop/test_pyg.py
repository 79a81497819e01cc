"""Against torch_geometric. Its k-NN kernels (pyg-lib) are not on PyPI: a plain search stands in for `pyg::knn`."""

import copy
import math
import subprocess
import sys
from inspect import Parameter, signature

import pytest
import torch
import torch_geometric
from torch import nn
from torch_geometric import nn as theirs

from crosspoint.interop import pyg

UNEVEN = [7, 1, 0, 40, 12, 13, 0]


def plain_knn(x, y, ptr_x, ptr_y, k, cosine, num_workers):
    """Rows of y ascending, and for each the rows of x of its example, nearest first."""
    ptr_x = [0, len(x)] if ptr_x is None else ptr_x.tolist()
    ptr_y = [0, len(y)] if ptr_y is None else ptr_y.tolist()
    edges = []
    for b in range(len(ptr_y) - 1):
        points = x[ptr_x[b] : ptr_x[b + 1]]
        for i in range(ptr_y[b], ptr_y[b + 1]):
            direct = (points - y[i]).square().sum(1)
            far = 1 - torch.cosine_similarity(points, y[i][None]) if cosine else direct
            near = far.argsort(stable=True)[:k] + ptr_x[b]
            edges += [(i, int(j)) for j in near]
    return torch.tensor(edges, dtype=torch.int64).view(-1, 2).t()


@pytest.fixture(scope="module", autouse=True)
def kernels():
    library = torch.library.Library("pyg", "FRAGMENT")
    library.define(
        "knn(Tensor x, Tensor y, Tensor? ptr_x, Tensor? ptr_y, int k, bool cosine, int num_workers) -> Tensor"
    )
    library.impl("knn", plain_knn, "CPU")
    before = torch_geometric.typing.WITH_KNN
    torch_geometric.typing.WITH_KNN = True
    yield
    torch_geometric.typing.WITH_KNN = before
    library._destroy()


def batch_of(sizes):
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def ptr_of(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def points(sizes, channels=3, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.randn(sum(sizes), channels, dtype=dtype)


@pytest.mark.parametrize("name", ["knn", "knn_graph", "EdgeConv", "DynamicEdgeConv"])
def test_signatures(name):
    """Every argument of theirs, in their order with their defaults; ours adds keywords only."""
    ours, other = (signature(getattr(module, name)).parameters for module in (pyg, theirs))
    shared = [p for p in other.values() if p.kind is not Parameter.VAR_KEYWORD]
    assert [(p.name, p.default) for p in shared] == [
        (p.name, p.default) for p in ours.values() if p.kind is not Parameter.KEYWORD_ONLY
    ]


@pytest.mark.parametrize("sizes", [[30], [30, 30, 30], UNEVEN], ids=["one", "even", "uneven"])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("cosine", [False, True])
def test_knn_graph(sizes, loop, flow, cosine):
    x, batch = points(sizes), batch_of(sizes)
    options = {"loop": loop, "flow": flow, "cosine": cosine}
    want = theirs.knn_graph(x, 5, batch, **options)
    assert torch.equal(pyg.knn_graph(x, 5, batch, **options), want)
    assert torch.equal(pyg.knn_graph(x, 5, ptr=ptr_of(sizes), **options), want)
    assert torch.equal(pyg.knn_graph(x, 5, batch, batch_size=len(sizes) + 2, **options), want)
    if len(sizes) == 1:
        assert torch.equal(pyg.knn_graph(x, 5, **options), want)


@pytest.mark.parametrize("sizes", [UNEVEN, [5, 5, 5, 5, 5, 5, 5]], ids=["uneven", "even"])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_knn(sizes, cosine, k):
    queries = [3, 0, 2, 20, 1, 5, 0]
    x, y = points(sizes), points(queries, seed=1)
    want = theirs.knn(x, y, k, batch_of(sizes), batch_of(queries), cosine, batch_size=7)
    assert torch.equal(pyg.knn(x, y, k, batch_of(sizes), batch_of(queries), cosine), want)
    assert torch.equal(pyg.knn(x, y, k, cosine=cosine, ptr_x=ptr_of(sizes), ptr_y=ptr_of(queries)), want)
    assert torch.equal(pyg.knn(x, y, k), theirs.knn(x, y, k))


def test_documented_examples():
    """The examples of the two docstrings in torch_geometric; their results follow from the square by hand."""
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    batch = torch.tensor([0, 0, 0, 0])
    edges = pyg.knn_graph(x, k=2, batch=batch, loop=False)
    assert edges.tolist() == [[1, 2, 0, 3, 0, 3, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3]]
    y = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert pyg.knn(x, y, 2, batch, torch.tensor([0, 0])).tolist() == [[0, 0, 1, 1], [0, 1, 2, 3]]


def test_duplicates_do_not_add_edges():
    x = torch.zeros(6, 3)
    edges = pyg.knn_graph(x, 2)
    assert (torch.bincount(edges[1]) == 2).all() and (edges[0] != edges[1]).all()
    assert torch.equal(pyg.knn_graph(x, 1, loop=True), torch.arange(6).expand(2, 6))


def test_small_and_empty():
    assert pyg.knn_graph(torch.randn(1, 3), 4).shape == (2, 0)
    assert pyg.knn_graph(torch.randn(1, 3), 4, loop=True).tolist() == [[0], [0]]
    none = torch.zeros(0, dtype=torch.int64)
    for options in ({}, {"batch": none}, {"batch": none, "batch_size": 3}, {"ptr": torch.tensor([0, 0])}):
        edges = pyg.knn_graph(torch.randn(0, 3), 4, **options)
        assert edges.shape == (2, 0) and edges.dtype == torch.int64
    assert pyg.knn(torch.randn(0, 3), torch.randn(5, 3), 2).shape == (2, 0)
    assert pyg.knn(torch.randn(5, 3), torch.randn(0, 3), 2).shape == (2, 0)
    assert torch.equal(pyg.knn_graph(torch.tensor([0.0, 5.0, 1.0]), 1), torch.tensor([[2, 2, 0], [0, 1, 2]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cosine", [False, True])
def test_half(dtype, cosine):
    x = points(UNEVEN, dtype=torch.float32).to(dtype)
    batch = batch_of(UNEVEN)
    assert torch.equal(
        pyg.knn_graph(x, 3, batch, cosine=cosine), pyg.knn_graph(x.float(), 3, batch, cosine=cosine)
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": torch.tensor([0, 1, 0])}, "must ascend"),
        ({"batch": torch.tensor([-1, 0, 0])}, "must ascend"),
        ({"batch": torch.tensor([0, 0])}, "each of the 3 rows"),
        ({"batch": torch.zeros(3)}, "integers"),
        ({"batch": torch.tensor([0, 0, 2]), "batch_size": 2}, "batch_size is 2"),
        ({"ptr": torch.tensor([0, 2])}, "must end with the 3 rows"),
        ({"ptr": torch.tensor([0, 4, 3])}, "must not decrease"),
        ({"ptr": torch.tensor([1, 3])}, "must hold 0"),
        ({"ptr": torch.tensor([0, 3]), "batch_size": 2}, "batch_size = 2"),
        ({"ptr": torch.tensor([0, 3]), "batch": torch.zeros(3, dtype=torch.int64)}, "say the same"),
        ({"flow": "up"}, "flow must be one of"),
        ({"k": 0}, "at least 1"),
    ],
)
def test_bad_graphs(options, says):
    with pytest.raises(ValueError, match=says):
        pyg.knn_graph(torch.randn(3, 2), **{"k": 2, **options})


def test_bad_searches():
    with pytest.raises(ValueError, match="batch_y or ptr_y"):
        pyg.knn(torch.randn(3, 2), torch.randn(3, 2), 1, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"must be \(N, F\)"):
        pyg.knn_graph(torch.randn(1, 3, 2), 1)
    with pytest.raises(TypeError, match="floating point"):
        pyg.knn_graph(torch.ones(3, 2, dtype=torch.int64), 1)


def test_memory_of_very_uneven_clouds():
    """One cloud of 40,000 points and 4,000 of 10: N x N distances take 26 GB, clouds padded to the largest 2 GB."""
    code = """
import resource, torch
from crosspoint.interop.pyg import knn_graph
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
sizes = [10] * 2000 + [40_000] + [10] * 2000
x = torch.randn(sum(sizes), 3)
batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
knn_graph(x[:100], 8, batch[:100])
before = peak()
edges = knn_graph(x, 8, batch)
assert edges.shape == (2, 80_000 * 8)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100  # MiB; the edges alone are 10


def stack(*parts):
    return nn.Sequential(*parts)


FUSABLE = {
    "linear": lambda: nn.Linear(8, 6),
    "linear without bias": lambda: nn.Linear(8, 6, bias=False),
    "relu": lambda: stack(nn.Linear(8, 6), nn.ReLU()),
    "norm": lambda: stack(nn.Linear(8, 6), nn.BatchNorm1d(6)),
    "norm, relu": lambda: stack(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()),
    "norm, leaky": lambda: stack(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.LeakyReLU(0.2)),
    "cumulative": lambda: stack(nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=None), nn.ReLU()),
    "no affine": lambda: stack(nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(inplace=True)),
    "no statistics": lambda: stack(nn.Linear(8, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU()),
}


def twins(kind, make, *args, **options):
    """Ours and theirs, with equal weights that are not those of a fresh norm."""
    torch.manual_seed(3)
    ours = getattr(pyg, kind)(make(), *args, **options)
    options.pop("strict", None)
    other = getattr(theirs, kind)(make(), *args, **options)
    for module in (ours, other):
        module.double()
    with torch.no_grad():
        for value in ours.state_dict().values():
            if value.is_floating_point():
                value.copy_(
                    torch.randn_like(value).abs() + 0.1 if value.dim() == 1 else torch.randn_like(value)
                )
    assert list(ours.state_dict()) == list(other.state_dict())
    other.load_state_dict(ours.state_dict())
    return ours, other


def assert_same(ours, other, call, x):
    """Two steps in training and one in evaluation: outputs, gradients, running statistics."""
    for step in range(3):
        ours.train(step < 2)
        other.train(step < 2)
        outputs, gradients = [], []
        for module in (ours, other):
            leaf = x.clone().requires_grad_()
            out = call(module, leaf)
            g = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(step))
            outputs.append(out)
            gradients.append(torch.autograd.grad(out, [leaf, *module.parameters()], g))
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-11)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        for (name, a), (_, b) in zip(ours.named_buffers(), other.named_buffers(), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )


def random_graph(nodes=25, edges=90):
    """Degrees from 0 up, some edges twice, in no order."""
    torch.manual_seed(5)
    edge_index = torch.randint(0, nodes - 5, (2, edges))
    edge_index[1, :12] = 3
    return torch.cat([edge_index, edge_index[:, :4]], dim=1)


@pytest.mark.parametrize("name", FUSABLE)
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_edge_conv(name, flow):
    ours, other = twins("EdgeConv", FUSABLE[name], flow=flow)
    assert ours.fused
    edge_index = random_graph()
    assert_same(ours, other, lambda module, x: module(x, edge_index), points([25], 4))


@pytest.mark.parametrize("name", FUSABLE)
@pytest.mark.parametrize("sizes", [None, [15, 15], UNEVEN])
def test_dynamic_edge_conv(name, sizes):
    ours, other = twins("DynamicEdgeConv", FUSABLE[name], 5)
    batch = None if sizes is None else batch_of(sizes)
    x = points(sizes or [20], 4)
    assert_same(ours, other, lambda module, x: module(x, batch), x)
    if sizes:
        assert torch.equal(ours(x, ptr=ptr_of(sizes)), ours(x, batch))


def test_edges_of_our_graph_feed_their_module_and_ours():
    x, batch = points(UNEVEN, 4), batch_of(UNEVEN)
    ours, other = twins("EdgeConv", FUSABLE["norm, leaky"])
    edge_index = pyg.knn_graph(x, 4, batch, loop=True)
    assert_same(ours, other, lambda module, x: module(x, edge_index), x)


def test_float32_is_close():
    ours, other = twins("DynamicEdgeConv", FUSABLE["norm, relu"], 5)
    x, batch = points(UNEVEN, 4), batch_of(UNEVEN)
    want = other(x, batch)
    torch.testing.assert_close(ours.float()(x.float(), batch).double(), want, rtol=0, atol=1e-4)


def test_constructor_initialises_nn_anew():
    layers = []
    for module in (pyg, theirs):
        layer = nn.Linear(8, 6)
        torch.manual_seed(9)
        layers.append(module.EdgeConv(layer).nn.weight)
    assert torch.equal(*layers)


UNFUSABLE = {
    "Linear, ReLU, Linear": (lambda: stack(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6)), "Linear on edges"),
    "ReLU before the norm": (
        lambda: stack(nn.Linear(8, 6), nn.ReLU(), nn.BatchNorm1d(6)),
        "BatchNorm1d on edges",
    ),
    "Tanh": (lambda: stack(nn.Linear(8, 6), nn.Tanh()), "Tanh on edges"),
    "falling": (lambda: stack(nn.Linear(8, 6), nn.LeakyReLU(-0.5)), "slope -0.5"),
    "MLP": (lambda: theirs.MLP([8, 6, 6]), "MLP does not begin with Linear"),
    "nothing": (stack, r"Sequential\(\) does not begin"),
}


@pytest.mark.parametrize("name", UNFUSABLE)
def test_refuses_other_networks_unless_told(name):
    make, says = UNFUSABLE[name]
    with pytest.raises(pyg.CannotFuse, match=says) as error:
        pyg.EdgeConv(make())
    assert "strict=False" in str(error.value)
    with pytest.raises(pyg.CannotFuse, match=says):
        pyg.DynamicEdgeConv(make(), 4)
    if name == "nothing":
        return
    ours, other = twins("EdgeConv", make, strict=False)
    assert not ours.fused
    edge_index = random_graph()
    assert_same(ours, other, lambda module, x: module(x, edge_index), points([25], 4))


@pytest.mark.parametrize("aggr", ["mean", "add", "sum"])
def test_other_aggregations_are_not_fused(aggr):
    with pytest.raises(pyg.CannotFuse, match="only aggr='max'"):
        pyg.DynamicEdgeConv(nn.Linear(8, 6), 4, aggr)
    ours, other = twins("DynamicEdgeConv", FUSABLE["relu"], 4, aggr, strict=False)
    batch = batch_of(UNEVEN)
    assert_same(ours, other, lambda module, x: module(x, batch), points(UNEVEN, 4))
    with pytest.raises(ValueError, match="aggr must be one of"):
        pyg.EdgeConv(nn.Linear(8, 6), "median")


def test_looks_again_after_a_module_was_changed():
    conv = pyg.EdgeConv(stack(nn.Linear(8, 6), nn.BatchNorm1d(6)))
    conv.nn[0].register_forward_hook(lambda *_: None)
    with pytest.raises(pyg.CannotFuse, match="has hooks"):
        conv(torch.randn(5, 4), torch.tensor([[0, 1], [1, 2]]))
    conv = nn.SyncBatchNorm.convert_sync_batchnorm(pyg.EdgeConv(stack(nn.Linear(8, 6), nn.BatchNorm1d(6))))
    with pytest.raises(pyg.CannotFuse, match="SyncBatchNorm"):
        conv(torch.randn(5, 4), torch.tensor([[0, 1], [1, 2]]))


def test_graphs_without_edges():
    for name in ("linear", "norm, relu"):
        ours, other = twins("EdgeConv", FUSABLE[name])
        none = torch.zeros(2, 0, dtype=torch.int64)
        before = copy.deepcopy(ours.state_dict())
        for x in (points([4], 4), points([0], 4)):
            assert torch.equal(ours(x, none), other(x, none)) and ours(x, none).shape == (len(x), 6)
        for key, value in ours.state_dict().items():
            assert "num_batches" in key or torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("x", "edge_index", "error", "says"),
    [
        (torch.randn(5, 4), torch.tensor([[0], [5]]), IndexError, "0 to 5, but x has 5 rows"),
        (torch.randn(5, 4), torch.tensor([[-1], [0]]), IndexError, "-1 to 0"),
        (torch.randn(5, 4), torch.zeros(3, 2, dtype=torch.int64), ValueError, r"\(2, E\) int64"),
        (torch.randn(5, 4), torch.zeros(2, 2), ValueError, r"\(2, E\) int64"),
        (torch.randn(5, 4), torch.eye(5).to_sparse(), TypeError, "dense"),
        (torch.randn(5, 3), torch.tensor([[0, 1], [1, 2]]), ValueError, "nn takes 8 features"),
        (torch.randn(2, 5, 4), torch.tensor([[0], [1]]), ValueError, r"x must be \(N, F\)"),
        ((torch.randn(5, 4), torch.randn(5, 4)), torch.tensor([[0], [1]]), TypeError, "bipartite"),
        (torch.randn(5, 4), torch.tensor([[0], [1]]), ValueError, "more than 1 edge"),
    ],
)
def test_bad_calls(x, edge_index, error, says):
    with pytest.raises(error, match=says):
        pyg.EdgeConv(stack(nn.Linear(8, 6), nn.BatchNorm1d(6)))(x, edge_index)


def test_refuses_hubs_that_would_fill_memory():
    star = torch.stack([torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)])
    with pytest.raises(ValueError, match="one node has 20000 of the 20000 edges"):
        pyg.EdgeConv(nn.Linear(8, 6))(torch.randn(20_000, 4), star)


def test_autocast_and_half():
    conv = pyg.DynamicEdgeConv(stack(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()), 4)
    x = points([20], 4, dtype=torch.float32)
    want = copy.deepcopy(conv)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = copy.deepcopy(conv)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, rtol=0, atol=0.05)
    assert conv.half()(x.half()).dtype == torch.float16


def test_compiles_where_shapes_tell_the_result():
    x = points([30], dtype=torch.float32)
    compiled = torch.compile(pyg.knn_graph, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 4), pyg.knn_graph(x, 4))
    conv = pyg.DynamicEdgeConv(nn.Linear(6, 5), 4)
    torch.testing.assert_close(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), conv(x))
    conv, edge_index = pyg.EdgeConv(nn.Linear(6, 5)), pyg.knn_graph(x, 4)  # in two parts: degrees are data
    torch.testing.assert_close(torch.compile(conv, backend="aot_eager")(x, edge_index), conv(x, edge_index))


def test_scale_of_the_hub_limit():
    """Lists of up to a million indices are always allowed."""
    nodes = int(math.sqrt(1_000_000))
    star = torch.stack([torch.arange(nodes), torch.zeros(nodes, dtype=torch.int64)])
    assert pyg.EdgeConv(nn.Linear(8, 6))(torch.randn(nodes, 4), star).shape == (nodes, 6)
