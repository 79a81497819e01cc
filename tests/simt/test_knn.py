"""csrc/cuda/knn.cu on the host: every path on every case it supports, in several orders of threads and blocks."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from crosspoint.ops import reference
from crosspoint.testing import assert_same_graph, tie_tolerance
from knn_calls import PATHS, Knn, kernels, knn_workspace
from simt_harness import Device, SimtError, builds_here

# (seed, resident blocks); the slower builds look for other things than values.
ORDERS = {"plain": [(0, 1), (1, 2), (2, 1)], "watch": [(0, 1), (4, 2)], "sanitized": [(1, 2)]}


class Search(NamedTuple):
    points: Tensor  # (B, N, C)
    k: int
    query: Tensor | None = None  # (B, M, C); None: the points themselves
    include_self: bool = True
    lengths: list[int] | None = None
    lengths_query: list[int] | None = None


def cloud(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(17**i * n for i, n in enumerate(shape)) + seed)
    return torch.randn(shape, generator=generator)


def duplicates(*shape: int, unique: int) -> Tensor:
    generator = torch.Generator().manual_seed(unique)
    return cloud(*shape)[:, torch.randint(0, unique, (shape[1],), generator=generator)]


def not_finite(*shape: int) -> Tensor:
    x = cloud(*shape)
    x[0, 3, 0], x[0, 8], x[0, 20, -1] = float("nan"), float("nan"), float("inf")
    return x


CASES = {
    "points": Search(cloud(2, 50, 3), 20),
    "without_self": Search(cloud(2, 40, 3), 7, include_self=False),
    "features": Search(cloud(1, 70, 33), 20),
    "features_without_self": Search(cloud(2, 40, 17), 7, include_self=False),
    "features_of_64": Search(cloud(1, 90, 64), 20),
    "two_sets": Search(cloud(2, 37, 3), 5, query=cloud(2, 19, 3, seed=1)),
    "two_sets_of_features": Search(cloud(1, 75, 29), 5, query=cloud(1, 19, 29, seed=1)),
    "lengths": Search(cloud(4, 40, 3), 10, lengths=[40, 17, 1, 0]),
    "lengths_of_features": Search(cloud(3, 40, 19), 10, lengths=[17, 1, 0], include_self=False),
    "lengths_of_two_sets": Search(
        cloud(3, 12, 3), 5, query=cloud(3, 9, 3), lengths=[3, 12, 12], lengths_query=[9, 4, 0]
    ),
    "k_beyond_n": Search(cloud(2, 6, 3), 9),
    "k_beyond_n_without_self": Search(cloud(2, 6, 11), 9, include_self=False),
    "k_beyond_n_of_features": Search(cloud(1, 18, 32), 25),
    "one_point": Search(cloud(1, 1, 3), 2),
    "one_point_without_self": Search(cloud(1, 1, 23), 2, include_self=False),
    "one_neighbour": Search(cloud(1, 33, 3), 1),
    "one_neighbour_of_features": Search(cloud(1, 33, 16), 1, include_self=False),
    "one_channel": Search(cloud(1, 100, 1), 5),
    "eight_channels": Search(cloud(1, 65, 8), 9),
    "no_channels": Search(cloud(2, 5, 0), 3),
    "no_clouds": Search(cloud(0, 5, 3), 3),
    "no_points": Search(cloud(2, 0, 3), 3),
    "no_points_to_find": Search(cloud(2, 0, 20), 3, query=cloud(2, 4, 20)),
    "k_of_50": Search(cloud(1, 130, 3), 50),
    "k_of_128": Search(cloud(1, 140, 5), 128, include_self=False),
    "k_of_100_features": Search(cloud(1, 150, 16), 100),
    "k_of_150": Search(cloud(1, 160, 3), 150),
    "duplicates": Search(duplicates(1, 200, 3, unique=5), 20),
    "duplicates_without_self": Search(duplicates(1, 160, 3, unique=1), 12, include_self=False),
    "duplicate_features": Search(duplicates(1, 130, 21, unique=9), 20, include_self=False),
    "lattice": Search(cloud(1, 120, 3).mul(2).round() + 4096, 20),
    "feature_lattice": Search(cloud(1, 80, 24).round(), 20),
    "far_from_the_origin": Search(cloud(1, 80, 3) + 1e4, 10),
    "features_far_from_the_origin": Search(cloud(1, 80, 40) + 1e4, 10),
    "clusters": Search(1000 * cloud(1, 4, 40).repeat_interleave(25, 1) + 1e-3 * cloud(1, 100, 40), 20),
    "tiny": Search(cloud(1, 50, 3) * 1e-30, 7),
    "huge_features": Search(cloud(1, 50, 18) * 1e18, 7),
    "overflow": Search(cloud(1, 50, 18) * 1e30, 7),
    "not_finite": Search(not_finite(1, 60, 3), 40),
    "features_not_finite": Search(not_finite(1, 60, 24), 10, include_self=False),
    "double": Search(cloud(1, 40, 5).double(), 8),
}
# More work than the watched build does in a second.
LARGE = {
    "several_chunks": Search(cloud(1, 2100, 3), 20, query=cloud(1, 40, 3, seed=1)),
    "several_chunks_of_duplicates": Search(
        duplicates(1, 1300, 6, unique=4), 30, query=duplicates(1, 40, 6, unique=7)
    ),
    "large_cloud": Search(cloud(1, 1100, 3), 16, include_self=False),
    "many_features": Search(cloud(1, 400, 64), 20),
    "many_features_of_few_kinds": Search(duplicates(1, 300, 48, unique=30), 20, include_self=False),
}


@pytest.fixture(scope="module", params=builds_here())
def device(request):
    return kernels(request.param, "knn", "knn_filter", "knn_tree", "radix_sort")


def describe(search: Search, path: str) -> Knn:
    query = search.points if search.query is None else search.query
    self = 0 if search.query is not None else 1 if search.include_self else 2
    return Knn(
        is_double=search.points.dtype == torch.float64,
        batch=query.shape[0],
        queries=query.shape[1],
        candidates=search.points.shape[1],
        channels=query.shape[2],
        k=search.k,
        self=self,
        path=PATHS.index(path),
    )


def find(device: Device, search: Search, path: str, order: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """idx and dist2."""
    call = describe(search, path)
    device.configure(*order)

    def given(values, name: str):
        return None if values is None else device.input(np.asarray(values), name)

    try:
        points = given(search.points.numpy(), "points")
        query = points if search.query is None else given(search.query.numpy(), "query")
        lengths = given(search.lengths, "lengths")
        lengths_query = lengths if search.query is None else given(search.lengths_query, "lengths_query")
        shape = (*query.shape[:2], search.k)
        idx, dist2 = device.output(shape, np.int64, "idx"), device.output(shape, points.dtype, "dist2")
        workspace = device.output(knn_workspace(device, call), np.uint8, "workspace")
        arrays = {
            "query": query,
            "points": points,
            "lengths_query": lengths_query,
            "lengths_points": lengths,
            "idx": idx,
            "dist2": dist2,
            "workspace": workspace,
        }
        for name, array in arrays.items():
            setattr(call, name, None if array is None else array.ctypes.data)
        device.call("knn", call)
        return torch.from_numpy(idx.copy()), torch.from_numpy(dist2.copy())
    finally:
        device.free()


def check(device: Device, search: Search, path: str) -> None:
    if knn_workspace(device, describe(search, path)) is None:
        device.configure()
        with pytest.raises(SimtError, match="cannot run"):
            device.call("knn", describe(search, path))
        return
    found = [find(device, search, path, order) for order in ORDERS[device.kind]]
    for idx, dist2 in found[1:]:
        assert torch.equal(idx, found[0][0])
        assert torch.equal(dist2, found[0][1])
    idx, dist2 = found[0]
    lengths, lengths_query = (
        None if values is None else torch.tensor(values) for values in (search.lengths, search.lengths_query)
    )
    if search.query is None:
        expected = reference.knn_graph(
            search.points, search.k, lengths=lengths, include_self=search.include_self
        )
        assert_same_graph(idx, expected, search.points)
        return
    dist2_expected, expected = reference.knn(
        search.query, search.points, search.k, lengths_points=lengths, lengths_query=lengths_query
    )
    assert_same_graph(idx, expected, search.points, search.query)
    tolerance = tie_tolerance(search.points.shape[2], search.points.dtype)
    torch.testing.assert_close(dist2, dist2_expected, rtol=tolerance, atol=0)


each_path = pytest.mark.parametrize("path", [path for path in PATHS if path != "automatic"])


@each_path
@pytest.mark.parametrize("name", CASES)
def test_small(device, name, path):
    check(device, CASES[name], path)


@pytest.mark.parametrize("name", CASES)
def test_automatic(device, name):
    if device.kind == "plain":  # it runs what `test_small` ran
        check(device, CASES[name], "automatic")


@each_path
@pytest.mark.parametrize("name", LARGE)
def test_large(device, name, path):
    if device.kind == "plain":
        check(device, LARGE[name], path)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_tested(path, device):
    supported = [name for name, s in CASES.items() if knn_workspace(device, describe(s, path)) is not None]
    assert len(supported) >= 5, f"{path} runs only {supported}"
