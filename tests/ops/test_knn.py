"""knn_graph and knn: the battery, then ties, padding, extremes, sizes and memory."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosspoint import ops
from crosspoint.ops import reference
from crosspoint.testing import assert_same_graph, tie_tolerance
from op_tester import Call, OpTester, compiled_backends, threads

BACKENDS = compiled_backends("knn_graph")
backends = pytest.mark.parametrize("backend", BACKENDS, ids=["-".join(pair) for pair in BACKENDS])


def cloud(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(17**i * n for i, n in enumerate(shape)) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def with_duplicates(*shape: int, unique: int) -> Tensor:
    """Points drawn with repetition from `unique` ones, as re-sampled clouds are."""
    x = cloud(*shape)
    generator = torch.Generator().manual_seed(unique)
    return x[:, torch.randint(0, unique, (shape[1],), generator=generator)]


class TestKnnGraph(OpTester):
    op = "knn_graph"

    @classmethod
    def cases(cls):
        def case(x, k, **kwargs):
            return lambda: Call(
                (x, k), {n: torch.tensor(v) if n == "lengths" else v for n, v in kwargs.items()}
            )

        return {
            "points": case(cloud(2, 50, 3), 20),
            "features": case(cloud(2, 70, 33), 20),
            "without_self": case(cloud(2, 50, 3), 7, include_self=False),
            "features_without_self": case(cloud(2, 40, 20), 7, include_self=False),
            "lengths": case(cloud(4, 40, 3), 10, lengths=[40, 17, 1, 0]),
            "features_lengths": case(cloud(4, 40, 17), 10, lengths=[40, 17, 1, 0], include_self=False),
            "k_beyond_n": case(cloud(2, 6, 3), 9),
            "k_beyond_n_without_self": case(cloud(2, 6, 11), 9, include_self=False),
            "one_point": case(cloud(1, 1, 3), 2),
            "one_neighbour": case(cloud(1, 30, 3), 1),
            "one_channel": case(cloud(2, 100, 1), 5),
            "no_channels": case(cloud(2, 5, 0), 3),
            "no_clouds": case(cloud(0, 5, 3), 3),
            "no_points": case(cloud(2, 0, 3), 3),
            "duplicates": case(with_duplicates(2, 200, 3, unique=25), 20),
            "feature_duplicates": case(with_duplicates(2, 200, 12, unique=25), 20, include_self=False),
            "lattice": case(cloud(1, 150, 3).mul(2).round(), 20),
            "feature_lattice": case(cloud(1, 150, 24).round(), 20),
        }

    @classmethod
    def bad_calls(cls):
        x = cloud(2, 5, 3).float()
        return {
            "two_dimensional": (
                lambda: Call((x[0], 3)),
                ValueError,
                r"\(batch, points, channels\).*\[None\]",
            ),
            "integers": (lambda: Call((x.long(), 3)), TypeError, "floating point"),
            "k_zero": (lambda: Call((x, 0)), ValueError, "at least 1"),
            "k_float": (lambda: Call((x, 3.0)), TypeError, "integer"),
            "lengths_shape": (
                lambda: Call((x, 3), {"lengths": torch.tensor([5])}),
                ValueError,
                "one number per cloud",
            ),
            "lengths_dtype": (
                lambda: Call((x, 3), {"lengths": torch.tensor([5.0, 4.0])}),
                ValueError,
                "must be integers",
            ),
            "lengths_too_large": (
                lambda: Call((x, 3), {"lengths": torch.tensor([5, 6])}),
                IndexError,
                r"lengths\[1\] is 6: expected .* between 0 and 5",
            ),
            "lengths_negative": (
                lambda: Call((x, 3), {"lengths": torch.tensor([-1, 4])}),
                IndexError,
                r"lengths\[0\] is -1",
            ),
        }

    @classmethod
    def operator_calls(cls):
        operator = torch.ops.crosspoint.knn_graph.default
        lengths = torch.tensor([20, 7])
        calls = {
            "points": lambda: (operator, (cloud(2, 20, 3).float(), 4, None, True)),
            "features": lambda: (operator, (cloud(2, 20, 10), 4, lengths, False)),
            "half": lambda: (operator, (cloud(2, 20, 10).half(), 4, lengths, True)),
        }
        if ("triton", "cpu") in BACKENDS:
            triton = torch.ops.crosspoint.knn_graph_triton.default
            calls["triton-cpu"] = lambda: (triton, (cloud(2, 20, 10).half(), 4, lengths, True))
        return calls

    def compare(self, actual, expected, call, dtype, what):
        assert_same_graph(actual, expected, call.args[0])


class TestKnn(OpTester):
    op = "knn"
    differentiable = (0, 1)
    twice_differentiable = True

    @classmethod
    def cases(cls):
        def case(query, points, k, **lengths):
            return lambda: Call((query, points, k), {n: torch.tensor(v) for n, v in lengths.items()})

        return {
            "points": case(cloud(2, 9, 3), cloud(2, 12, 3), 4),
            "features": case(cloud(2, 30, 21), cloud(2, 60, 21), 5),
            "lengths": case(
                cloud(3, 9, 3), cloud(3, 12, 3), 5, lengths_query=[9, 4, 0], lengths_points=[3, 12, 12]
            ),
            "features_lengths": case(cloud(2, 9, 16), cloud(2, 12, 16), 5, lengths_points=[0, 7]),
            "k_beyond_n": case(cloud(2, 5, 3), cloud(2, 3, 3), 6),
            "same_place": case(cloud(1, 6, 3), cloud(1, 6, 3), 2),
            "no_queries": case(cloud(2, 0, 3), cloud(2, 3, 3), 2),
            "no_points": case(cloud(2, 4, 3), cloud(2, 0, 3), 2),
            "no_channels": case(cloud(1, 4, 0), cloud(1, 6, 0), 2),
        }

    @classmethod
    def gradcheck_cases(cls):
        return ("points",)

    @classmethod
    def bad_calls(cls):
        x = cloud(2, 5, 3).float()
        return {
            "channels": (lambda: Call((x, x[..., :2], 3)), ValueError, "must agree in B and C"),
            "batches": (lambda: Call((x, x[:1], 3)), ValueError, "must agree in B and C"),
            "dtypes": (lambda: Call((x, x.double(), 3)), ValueError, "convert one of them"),
            "k_zero": (lambda: Call((x, x, 0)), ValueError, "at least 1"),
            "lengths_query": (
                lambda: Call((x, x, 3), {"lengths_query": torch.tensor([5, 6])}),
                IndexError,
                r"lengths_query\[1\] is 6",
            ),
            "lengths_points": (
                lambda: Call((x, x, 3), {"lengths_points": torch.tensor([-2, 5])}),
                IndexError,
                r"lengths_points\[0\] is -2",
            ),
        }

    @classmethod
    def operator_calls(cls):
        operator = torch.ops.crosspoint.knn.default
        lengths = torch.tensor([6, 2])
        calls = {
            "points": lambda: (operator, (cloud(2, 5, 3).float(), cloud(2, 6, 3).float(), 4, None, lengths)),
            "features": lambda: (operator, (cloud(2, 5, 9), cloud(2, 6, 9), 4, lengths - 1, None)),
        }
        if ("triton", "cpu") in BACKENDS:
            triton = torch.ops.crosspoint.knn_triton.default
            calls["triton-cpu"] = lambda: (triton, (cloud(2, 5, 9), cloud(2, 6, 9), 4, lengths - 1, None))
        return calls

    def compare(self, actual, expected, call, dtype, what):
        (dist2, idx), (dist2_expected, idx_expected) = actual, expected
        assert dist2.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same_graph(idx, idx_expected, call.args[1], call.args[0])
        tolerance = tie_tolerance(call.args[0].shape[2], dtype)
        torch.testing.assert_close(dist2.cpu().double(), dist2_expected, rtol=tolerance, atol=0)
        assert (dist2[..., 1:] >= dist2[..., :-1]).all()


# ---- ties and order


@backends
@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("k", [1, 20, 100, 300])
@pytest.mark.parametrize("unique", [1, 2, 40])
def test_duplicates_go_by_index(backend, channels, k, unique):
    impl, device = backend
    x = with_duplicates(1, 600, channels, unique=unique).float()
    for include_self in (True, False):
        expected = reference.knn_graph(x, k, include_self=include_self)
        actual = ops.knn_graph(x.to(device), k, include_self=include_self, impl=impl)
        assert torch.equal(actual.cpu(), expected)


@backends
@pytest.mark.parametrize("channels", [2, 10])
def test_lattice_ties_go_by_index_far_from_the_origin(backend, channels):
    impl, device = backend
    x = cloud(1, 400, channels).float().round() + 4096
    expected = reference.knn_graph(x.double(), 30)
    assert torch.equal(ops.knn_graph(x.to(device), 30, impl=impl).cpu(), expected)


@backends
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_far_offsets_lose_nothing(backend, channels, offset):
    impl, device = backend
    x = (cloud(1, 500, channels) + offset).float()
    actual = ops.knn_graph(x.to(device), 20, impl=impl)
    assert_same_graph(actual, reference.knn_graph(x.double(), 20), x)


@backends
@pytest.mark.parametrize("channels", [3, 40])
def test_tight_clusters_far_apart(backend, channels):
    impl, device = backend
    centres = 1000 * cloud(1, 8, channels)
    x = (centres.repeat_interleave(60, 1) + 1e-3 * cloud(1, 480, channels)).float()
    actual = ops.knn_graph(x.to(device), 20, impl=impl)
    assert_same_graph(actual, reference.knn_graph(x.double(), 20), x)


@backends
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_extreme_scales(backend, channels, scale):
    """Squares underflow or overflow in float32: whatever is not comparable ties, and goes by index."""
    impl, device = backend
    x = (cloud(1, 200, channels) * scale).float()
    actual = ops.knn_graph(x.to(device), 20, impl=impl).cpu()
    expected = reference.knn_graph(x, 20)
    if scale in (1e-30, 1e30):
        assert torch.equal(actual, expected)
    else:
        assert_same_graph(actual, expected, x)


@backends
@pytest.mark.parametrize("channels", [3, 24])
def test_not_finite_is_a_neighbour_of_last_resort(backend, channels):
    impl, device = backend
    x = cloud(1, 40, channels).float()
    x[0, 3, 0], x[0, 8], x[0, 20, 1] = float("nan"), float("nan"), float("inf")
    for k in (10, 40):
        for include_self in (True, False):
            actual = ops.knn_graph(x.to(device), k, include_self=include_self, impl=impl).cpu()
            assert_same_graph(actual, reference.knn_graph(x, k, include_self=include_self), x)
            assert not torch.isin(actual[0, 0, :10], torch.tensor([3, 8, 20])).any()
    # A query that is not finite is equally far from everything: itself, then the lowest indices.
    assert actual[0, 8, :9].tolist() == [*range(8), 9]


@backends
def test_zero_gradient_where_nothing_is_found(backend):
    impl, device = backend
    query = cloud(1, 3, 3).to(device).requires_grad_()
    points = cloud(1, 2, 3).to(device)
    points[0, 1, 0] = float("inf")
    points.requires_grad_()
    dist2, idx = ops.knn(query, points, 4, impl=impl)
    assert idx[0, 0].tolist() == [0, 1, -1, -1]
    assert dist2[0, 0, 1:].isinf().all()
    grad = torch.autograd.grad(dist2.sum(), (query, points), create_graph=True)
    torch.testing.assert_close(grad[0], 2 * (query - points[:, :1]))
    assert (grad[1][0, 1] == 0).all()
    second = torch.autograd.grad(sum(g.sum() for g in grad), (query, points))
    assert all(g.isfinite().all() for g in second)
    assert (second[1][0, 1] == 0).all()


@backends
def test_derivatives_with_missing_neighbours(backend):
    impl, device = backend
    lengths = torch.tensor([4, 2], device=device)

    def finite_distances(query, points):
        dist2, _ = ops.knn(query, points, 5, lengths_query=lengths, lengths_points=lengths, impl=impl)
        return torch.where(dist2.isfinite(), dist2, 0)

    leaves = [cloud(2, n, 3).to(device).requires_grad_() for n in (5, 6)]
    assert torch.autograd.gradcheck(finite_distances, leaves)
    assert torch.autograd.gradgradcheck(finite_distances, leaves)


# ---- sizes


@backends
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("k", [1, 20, 33, 70, 150, 500])
def test_every_k(backend, channels, k):
    impl, device = backend
    x = cloud(1, 450, channels).float()
    expected = reference.knn_graph(x, k, include_self=False)
    assert_same_graph(ops.knn_graph(x.to(device), k, include_self=False, impl=impl), expected, x)


@backends
@pytest.mark.parametrize("channels", [3, 6, 20])
@pytest.mark.parametrize("kind", ["random", "few_unique", "one_point", "sorted"])
def test_clouds_of_several_pieces(backend, channels, kind):
    impl, device = backend
    points = cloud(1, 5000, channels).float()
    if kind == "few_unique":
        points = points[:, torch.arange(5000) % 40]
    elif kind == "one_point":
        points[:, torch.arange(5000) % 8 > 0] = points[:, :1].clone()
    elif kind == "sorted":
        points = points.sort(1, descending=True).values
    query = torch.cat([points[:, ::97], cloud(1, 20, channels).float()], 1)
    dist2, idx = ops.knn(query.to(device), points.to(device), 20, impl=impl)
    dist2_expected, idx_expected = reference.knn(query, points, 20)
    assert_same_graph(idx, idx_expected, points, query)
    torch.testing.assert_close(
        dist2.cpu(), dist2_expected, rtol=tie_tolerance(channels, points.dtype), atol=0
    )


@backends
@pytest.mark.parametrize("kind", ["random", "few_unique", "one_point", "outlier", "not_finite"])
@pytest.mark.parametrize("include_self", [True, False])
def test_graphs_of_large_clouds(backend, kind, include_self):
    impl, device = backend
    x = cloud(1, 3000, 3).float()
    if kind == "few_unique":
        x = x[:, torch.arange(3000) % 40]
    elif kind == "one_point":
        x[:, torch.arange(3000) % 8 > 0] = x[:, :1].clone()
    elif kind == "outlier":
        x[0, 1234, 0] = 1e9
    elif kind == "not_finite":
        x[0, 77, 1] = float("nan")
    actual = ops.knn_graph(x.to(device), 16, include_self=include_self, impl=impl)
    assert_same_graph(actual, reference.knn_graph(x, 16, include_self=include_self), x)


@backends
def test_padding_and_batch_do_not_matter(backend):
    impl, device = backend
    for channels in (3, 32):
        x = cloud(3, 130, channels).float().to(device)
        lengths = torch.tensor([130, 61, 90], device=device)
        x[1, 61:], x[2, 90:] = float("nan"), 1e9
        together = ops.knn_graph(x, 12, lengths=lengths, impl=impl)
        for b, n in enumerate(lengths.tolist()):
            alone = ops.knn_graph(x[b : b + 1, :n], 12, impl=impl)
            assert torch.equal(together[b, :n], alone[0])
            assert (together[b, n:] == -1).all()


@backends
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_any_shape(backend, data):
    impl, device = backend
    batch, n, m = (data.draw(st.integers(0, high)) for high in (3, 90, 40))
    channels = data.draw(st.integers(0, 40))
    k = data.draw(st.integers(1, 100))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    points = cloud(batch, n, channels)
    if data.draw(st.booleans()):
        points = points.round()
    points, query = points.to(dtype), cloud(batch, m, channels, seed=1).to(dtype)
    lengths = [
        torch.tensor(data.draw(st.lists(st.integers(0, s), min_size=batch, max_size=batch))).long()
        for s in (n, m)
    ]
    include_self = data.draw(st.booleans())
    actual = ops.knn_graph(
        points.to(device), k, lengths=lengths[0].to(device), include_self=include_self, impl=impl
    )
    expected = reference.knn_graph(points, k, lengths=lengths[0], include_self=include_self)
    assert_same_graph(actual, expected, points)
    dist2, idx = ops.knn(
        query.to(device),
        points.to(device),
        k,
        lengths_query=lengths[1].to(device),
        lengths_points=lengths[0].to(device),
        impl=impl,
    )
    dist2_expected, idx_expected = reference.knn(
        query, points, k, lengths_query=lengths[1], lengths_points=lengths[0]
    )
    assert_same_graph(idx, idx_expected, points, query)
    torch.testing.assert_close(dist2.cpu(), dist2_expected, rtol=tie_tolerance(channels, dtype), atol=1e-37)


@backends
def test_thread_counts_and_runs_give_the_same_bits(backend):
    impl, device = backend
    for channels in (3, 64):
        x = cloud(3, 500, channels).float().to(device)
        found = []
        for count in (1, 2, 3, 2):
            with threads(count):
                found.append(ops.knn(x, x, 20, impl=impl))
        for dist2, idx in found[1:]:
            assert torch.equal(dist2, found[0][0])
            assert torch.equal(idx, found[0][1])


@backends
def test_autocast_leaves_distances_alone(backend):
    impl, device = backend
    x = cloud(1, 60, 20).float().to(device).requires_grad_()
    plain = ops.knn(x, x, 5, impl=impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        dist2, idx = ops.knn(x, x, 5, impl=impl)
        assert torch.equal(ops.knn_graph(x, 5, impl=impl), plain[1])
    assert torch.equal(dist2, plain[0])
    assert torch.equal(idx, plain[1])


MEMORY = """
import sys, torch
from crosspoint import ops

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

n, channels = map(int, sys.argv[1:])
ops.knn_graph(torch.randn(1, 64, channels), 20, impl="native")
x = torch.randn(1, n, channels)
before = peak()
ops.knn_graph(x, 20, impl="native")
print(peak() - before)
"""


@pytest.mark.skipif(
    ("native", "cpu") not in BACKENDS or sys.platform != "linux", reason="reads /proc, native CPU kernels"
)
@pytest.mark.parametrize("channels", [3, 20])
def test_memory_grows_with_the_cloud_not_with_its_square(channels):
    n = 8000
    command = [sys.executable, "-c", MEMORY, str(n), str(channels)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    output = n * 20 * 8 // 1024
    assert int(done.stdout) < output + (8 << 10), "8000 x 8000 distances would take 250,000 kB"
