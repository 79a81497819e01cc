"""crosspoint.numpy against crosspoint.ops and against brute force; what it needs of a process."""

import itertools
import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspoint.numpy as cn
from crosspoint import _host, ops
from crosspoint.testing import assert_same_graph, tie_tolerance

DTYPES = [np.float16, np.float32, np.float64]


def cloud(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def computed(dtype: np.dtype) -> type:
    return np.float64 if dtype == np.float64 else np.float32


def brute_force_knn(query: np.ndarray, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one pair of clouds, in float64."""
    dist2 = ((query[:, None].astype(np.float64) - points[None]) ** 2).sum(-1)
    idx = np.argsort(dist2, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(dist2, idx, -1), idx


def brute_force_sampling(x: np.ndarray, m: int, start: int) -> list[int]:
    """Of one cloud, in float64."""
    x = x.astype(np.float64)
    nearest = np.full(len(x), np.inf)
    taken = []
    for _ in range(min(m, len(x))):
        taken.append(start)
        with np.errstate(invalid="ignore"):
            dist2 = ((x - x[start]) ** 2).sum(-1)
        nearest = np.fmin(nearest, dist2)
        nearest[taken] = -1
        start = int(nearest.argmax())
    return taken + [-1] * (m - len(taken))


def brute_force_sum(x: np.ndarray, idx: np.ndarray) -> np.ndarray:
    out = np.zeros((*idx.shape[:2], x.shape[2]))
    for b, i, s in np.argwhere(idx >= 0):
        out[b, i] += x[b, idx[b, i, s]].astype(np.float64)
    return out


# ---- neighbours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "k"), [((3, 50, 3), 20), ((2, 70, 33), 20), ((2, 6, 3), 9), ((1, 5000, 3), 16)]
)
@pytest.mark.parametrize("include_self", [True, False])
def test_knn_graph_is_that_of_the_operator(shape, k, dtype, include_self):
    x = cloud(*shape).astype(dtype)
    lengths = np.arange(shape[0]) * (shape[1] // 2)
    for valid in (None, lengths):
        actual = cn.knn_graph(x, k, lengths=valid, include_self=include_self)
        assert actual.dtype == np.int64 and actual.shape == (*shape[:2], k)
        tensors = None if valid is None else torch.from_numpy(valid)
        expected = ops.knn_graph(torch.from_numpy(x), k, lengths=tensors, include_self=include_self)
        assert np.array_equal(actual, expected.numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 24])
def test_knn_is_that_of_the_operator_and_of_brute_force(channels, dtype):
    query, points = cloud(2, 40, channels).astype(dtype), cloud(2, 300, channels, seed=1).astype(dtype)
    dist2, idx = cn.knn(query, points, 7)
    assert (dist2.dtype, idx.dtype) == (computed(dtype), np.int64)
    for actual, expected in zip(
        (dist2, idx), ops.knn(*map(torch.from_numpy, (query, points)), 7), strict=True
    ):
        assert np.array_equal(actual, expected.numpy())
    for b in range(2):
        expected, graph = brute_force_knn(query[b], points[b], 7)
        tolerance = tie_tolerance(channels, torch.float64 if dtype == np.float64 else torch.float32)
        np.testing.assert_allclose(dist2[b], expected, rtol=tolerance, atol=0)
        tensors = map(torch.from_numpy, (idx[b : b + 1], graph[None], points[b : b + 1], query[b : b + 1]))
        assert_same_graph(*tensors)


def test_knn_with_lengths_and_nan():
    query, points = cloud(3, 9, 3), cloud(3, 12, 3, seed=1)
    points[1, 3] = np.nan
    lengths_query, lengths_points = np.array([9, 4, 0]), np.array([0, 12, 5], np.uint8)
    dist2, idx = cn.knn(query, points, 14, lengths_query=lengths_query, lengths_points=lengths_points)
    expected = ops.knn(
        torch.from_numpy(query),
        torch.from_numpy(points),
        14,
        lengths_query=torch.from_numpy(lengths_query),
        lengths_points=torch.from_numpy(lengths_points),
    )
    assert np.array_equal(dist2, expected[0].numpy()) and np.array_equal(idx, expected[1].numpy())
    assert (idx[0] == -1).all() and np.isinf(dist2[0]).all()
    assert (idx[1, :4, 11] == 3).all()  # the NaN comes last of those that exist


# ---- farthest point sampling


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 200])
def test_sampling_of_a_lattice_is_exact(n, channels, dtype):
    """Every distance is exact, and most are tied: only the first farthest point is right."""
    x = (cloud(2, n, channels) * 2).round().astype(dtype)
    for start in {0, n // 2, n - 1}:
        idx = cn.farthest_point_sampling(x, n + 3, start=start)
        assert idx.dtype == np.int64
        assert idx.tolist() == [brute_force_sampling(points, n + 3, start) for points in x]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 40])
def test_each_sample_is_the_farthest_up_to_rounding(channels, dtype):
    x = cloud(2, 1000, channels).astype(dtype)
    idx = cn.farthest_point_sampling(x, 300)
    tolerance = tie_tolerance(channels, torch.float64 if dtype == np.float64 else torch.float32)
    for points, row in zip(x.astype(np.float64), idx, strict=True):
        assert len(set(row)) == 300
        nearest = np.full(len(points), np.inf)
        for last, following in itertools.pairwise(row):
            nearest = np.minimum(nearest, ((points - points[last]) ** 2).sum(-1))
            assert nearest[following] >= nearest.max() * (1 - 2 * tolerance)


def test_sampling_takes_no_point_twice_and_stops_at_lengths():
    x = np.zeros((3, 10, 3), np.float32)
    idx = cn.farthest_point_sampling(x, 12, lengths=[10, 4, 0])
    assert idx[0].tolist() == [*range(10), -1, -1]
    assert idx[1].tolist() == [0, 1, 2, 3] + [-1] * 8
    assert idx[2].tolist() == [-1] * 12


def test_sampling_counts_a_nan_distance_as_infinite():
    x = np.arange(8, dtype=np.float32).reshape(1, 8, 1)
    x[0, 5] = np.nan
    x[0, 2] = np.inf
    assert cn.farthest_point_sampling(x, 8).tolist() == [brute_force_sampling(x[0], 8, 0)]
    assert cn.farthest_point_sampling(x, 3)[0].tolist() == [0, 2, 5]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 70), st.integers(0, 9), st.integers(1, 80), st.integers(0, 2**32 - 1)
)
def test_sampling_any_shape(batch, n, channels, m, seed):
    x = np.random.default_rng(seed).integers(-3, 4, (batch, n, channels)).astype(np.float32)
    lengths = np.random.default_rng(seed).integers(1, n + 1, batch)
    idx = cn.farthest_point_sampling(x, m, lengths=lengths)
    expected = [brute_force_sampling(x[b, : lengths[b]], m, 0) for b in range(batch)]
    assert idx.shape == (batch, m) and idx.tolist() == expected


# ---- sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [0, 1, 3, 17, 64])
def test_neighbor_sum_is_brute_force_rounded_once(channels, dtype):
    x = cloud(3, 20, channels).astype(dtype)
    idx = np.random.default_rng(0).integers(-1, 20, (3, 31, 6))
    idx[0, 0] = -1
    out = cn.neighbor_sum(x, idx)
    assert out.dtype == computed(dtype)
    assert np.array_equal(out, brute_force_sum(x, idx).astype(computed(dtype)))
    assert (out[0, 0] == 0).all()


def test_neighbor_sum_keeps_what_float32_would_lose():
    x = np.array([[[1e8], [1.0], [-1e8]]], np.float32)
    assert cn.neighbor_sum(x, np.array([[[0, 1, 2]]])).item() == 1.0


# ---- arrays and arguments

CALLS = {
    "knn_graph": lambda x, **kw: cn.knn_graph(x, 5, **kw),
    "knn": lambda x, **kw: cn.knn(x, np.asarray(x)[:, ::2], 5, **kw),
    "farthest_point_sampling": lambda x, **kw: cn.farthest_point_sampling(x, 9, **kw),
    "neighbor_sum": lambda x, **kw: cn.neighbor_sum(
        x, np.arange(12).reshape(1, 6, 2).repeat(len(x), 0), **kw
    ),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def same(a, b) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(one.dtype == other.dtype and np.array_equal(one, other) for one, other in pairs)


@calls
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_byte_order_do_not_matter(call, dtype):
    x = cloud(2, 30, 4).astype(dtype)
    expected = call(x)
    assert same(call(np.asfortranarray(x)), expected)
    assert same(call(np.repeat(x, 2, axis=1)[:, ::2]), expected)
    assert same(call(x[:, ::-1][:, ::-1]), expected)
    assert same(call(x.astype(x.dtype.newbyteorder())), expected)
    readonly = x.copy()
    readonly.flags.writeable = False
    assert same(call(readonly), expected)
    assert same(call(x.tolist()), call(x.astype(np.float64)))


@calls
@pytest.mark.parametrize("shape", [(5, 40, 3), (1, 3000, 3), (3, 200, 40)])
def test_any_number_of_threads_gives_the_same(call, shape):
    x = cloud(*shape).astype(np.float32)
    expected = call(x, threads=1)
    for threads in (2, 3, 8):
        assert same(call(x, threads=threads), expected)


@calls
def test_no_clouds(call):
    results = call(np.zeros((0, 12, 3), np.float32))
    for result in results if isinstance(results, tuple) else [results]:
        assert result.shape[0] == 0


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        ("knn_graph", ((5, 3), 3), {}),
        ("knn_graph", ((2, 5, 3), 0), {}),
        ("knn_graph", ((2, 5, 3), 3.0), {}),
        ("knn_graph", ((2, 5, 3), True), {}),
        ("knn_graph", ((2, 5, 3), 3), {"lengths": [5]}),
        ("knn_graph", ((2, 5, 3), 3), {"lengths": [5, 6]}),
        ("knn_graph", ((2, 5, 3), 3), {"lengths": [-1, 4]}),
        ("knn", ((2, 5, 3), (2, 5, 2), 3), {}),
        ("knn", ((2, 5, 3), (1, 5, 3), 3), {}),
        ("knn", ((2, 5, 3), (5, 3), 3), {}),
        ("knn", ((2, 5, 3), (2, 5, 3), 3), {"lengths_query": [5, 6]}),
        ("knn", ((2, 5, 3), (2, 5, 3), 3), {"lengths_points": [-2, 5]}),
    ],
)
def test_errors_are_those_of_the_operators(op, args, kwargs):
    """Same type and, word for word, the same text."""
    shaped = [np.zeros(arg, np.float32) if isinstance(arg, tuple) else arg for arg in args]
    with pytest.raises((ValueError, TypeError, IndexError)) as ours:
        getattr(cn, op)(*shaped, **kwargs)
    tensors = [torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg for arg in shaped]
    with pytest.raises((ValueError, TypeError, IndexError)) as theirs:
        getattr(ops, op)(*tensors, **{name: torch.tensor(value) for name, value in kwargs.items()})
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


X = np.zeros((2, 5, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: cn.knn_graph(X.astype(int), 3),
            TypeError,
            r"floating point.*got int64; .*astype\(np.float32\)",
        ),
        (lambda: cn.knn_graph(X, 3, lengths=[5.0, 4.0]), ValueError, "must be integers, got float64"),
        (lambda: cn.knn_graph(X, 3, threads=0), ValueError, "threads must be at least 1, got 0"),
        (lambda: cn.knn(X, X.astype(np.float64), 3), ValueError, "float32, points are float64; convert one"),
        (lambda: cn.knn(X, X.astype(np.float16), 3), ValueError, "float32, points are float16; convert one"),
        (lambda: cn.farthest_point_sampling(X[0], 3), ValueError, r"\(batch, points, channels\).*\[None\]"),
        (lambda: cn.farthest_point_sampling(X, 0), ValueError, "m must be at least 1, got 0"),
        (
            lambda: cn.farthest_point_sampling(X, 3, start=5),
            IndexError,
            "start is 5, but cloud 0 has points 0 to 4",
        ),
        (lambda: cn.farthest_point_sampling(X, 3, start=-1), IndexError, "start is -1"),
        (
            lambda: cn.farthest_point_sampling(X, 3, start=1.0),
            TypeError,
            "start must be an integer, got float",
        ),
        (
            lambda: cn.farthest_point_sampling(X, 3, start=3, lengths=[5, 2]),
            IndexError,
            "start is 3, but cloud 1 has points 0 to 1",
        ),
        (lambda: cn.neighbor_sum(X, np.zeros((2, 5, 3), np.int32)), TypeError, r"idx.astype\(np.int64\)"),
        (lambda: cn.neighbor_sum(X, np.zeros((1, 5, 3), int)), ValueError, r"\(B, M, k\) = \(2, M, k\)"),
        (
            lambda: cn.neighbor_sum(X, np.array([[[0, 1]], [[4, 5]]])),
            IndexError,
            r"neighbor_sum: idx\[1, 0, 1\] is 5, but it must be -1 \(no edge\) or in \[0, 5\)",
        ),
        (lambda: cn.neighbor_sum(X, np.full((2, 1, 1), -2)), IndexError, r"idx\[0, 0, 0\] is -2"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


# ---- processes


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_torch_is_not_imported():
    done = run_python(
        "import sys, numpy, crosspoint.numpy as cn\n"
        "cn.knn_graph(numpy.zeros((1, 9, 3)), 3)\n"
        "assert 'torch' not in sys.modules"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_module_is_explained():
    done = run_python("import sys; sys.modules['crosspoint._host'] = None; import crosspoint.numpy")
    assert "ImportError: crosspoint.numpy needs the compiled NumPy module" in done.stderr


@pytest.mark.parametrize("variant", ["avx2", "baseline"])
def test_a_lower_instruction_set_gives_the_same(variant, tmp_path):
    """On a lattice, where no variant rounds."""
    code = """
import sys, numpy as np, crosspoint.numpy as cn
from crosspoint import _host
x = np.random.default_rng(0).integers(-4, 5, (2, 300, 3)).astype(np.float32)
idx = cn.knn_graph(x, 8)
np.savez(sys.argv[1], idx, cn.farthest_point_sampling(x, 50), cn.neighbor_sum(x, idx))
print(_host.build_info()["variant"])
"""
    results = []
    for forced in (variant, ""):
        env = {**os.environ, "CROSSPOINT_CPU": forced}
        path = tmp_path / f"{forced}.npz"
        command = [sys.executable, "-c", code, path]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == (forced or _host.build_info()["variant"])
        results.append(tuple(np.load(path).values()))
    assert same(*results)


def test_an_unknown_instruction_set_is_refused():
    code = "import numpy as np, crosspoint.numpy as cn; cn.knn_graph(np.zeros((1, 9, 3)), 3)"
    done = run_python(code, CROSSPOINT_CPU="sse9")
    assert done.returncode != 0 and "CROSSPOINT_CPU must be" in done.stderr


def test_build_info():
    info = _host.build_info()
    assert info["variant"] in info["variants"] and "baseline" in info["variants"]
    assert "-ffp-contract=fast" in info["flags"]
    assert info["compiler"].startswith(("gcc ", "clang "))
    usable = {
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx2": {"avx2", "fma"},
        "baseline": set(),
    }
    assert usable[info["variant"]] <= set(info["cpu_features"])


def test_the_gil_is_released():
    """A thread counts while this one is inside one long call; with the GIL held it could not."""
    x = np.zeros((1, 40000, 3), np.float32)
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted[0]
        cn.farthest_point_sampling(x, 20000)
        during = counted[0] - before
    finally:
        stop.set()
        thread.join()
    assert during > 1000


def _in_a_worker(seed: int) -> tuple[np.ndarray, np.ndarray]:
    x = cloud(2, 500, 3, seed=seed)
    return cn.knn_graph(x, 8, threads=2), cn.farthest_point_sampling(x, 30, threads=2)


def test_forked_processes():
    expected = [
        _in_a_worker(seed) for seed in range(4)
    ]  # the parent has used the kernels, with threads, before
    with multiprocessing.get_context("fork").Pool(2) as pool:
        actual = pool.map_async(_in_a_worker, range(4)).get(timeout=60)
    assert all(same(a, b) for a, b in zip(actual, expected, strict=True))


def test_forking_while_another_thread_is_inside_a_kernel():
    stop = threading.Event()
    x = cloud(64, 30, 3)

    def work():
        while not stop.is_set():
            cn.knn_graph(x, 4)

    expected = _in_a_worker(0)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            with multiprocessing.get_context("fork").Pool(1) as pool:
                assert same(pool.apply_async(_in_a_worker, (0,)).get(timeout=60), expected)
    finally:
        stop.set()
        thread.join()


class _Sampled(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        x = cloud(1, 400, 3, seed=i)
        return torch.from_numpy(x[0, cn.farthest_point_sampling(x, 64)[0]])


def test_in_the_workers_of_a_data_loader():
    dataset = _Sampled()
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, timeout=60)
    assert torch.equal(torch.cat(list(loader)), torch.stack([dataset[i] for i in range(6)]))
