"""Pointcept's pointops needs CUDA to build: an independent search, written from its kernel, stands in for it."""

import pytest
import torch

from crosspoint.interop.pointcept import knn_query


def search(nsample, xyz, offset, new_xyz, new_offset):
    """Query by query: nearest first, global rows, -1 and the root of 1e10 where there is no neighbour."""
    idx = torch.full((len(new_xyz), nsample), -1, dtype=torch.int32)
    dist = torch.full((len(new_xyz), nsample), 1e10).sqrt()
    for i in range(len(new_xyz)):
        cloud = int((new_offset <= i).sum())
        start, end = (int(offset[cloud - 1]) if cloud else 0), int(offset[cloud])
        d = ((new_xyz[i] - xyz[start:end]) ** 2).sum(1).sqrt()
        order = sorted(range(end - start), key=lambda j, d=d: (d[j].item(), j))[:nsample]
        for slot, j in enumerate(order):
            idx[i, slot], dist[i, slot] = start + j, d[j]
    return idx, dist


SIZES = [5, 1, 0, 40, 6, 7, 0]
QUERIES = [3, 2, 4, 0, 9, 1, 0]


def offsets(sizes):
    return torch.tensor(sizes).cumsum(0).int()


@pytest.mark.parametrize("nsample", [1, 4, 8])
def test_queries(nsample):
    torch.manual_seed(0)
    xyz, new_xyz = torch.randn(sum(SIZES), 3), torch.randn(sum(QUERIES), 3)
    found = knn_query(nsample, xyz, offsets(SIZES), new_xyz, offsets(QUERIES))
    want = search(nsample, xyz, offsets(SIZES), new_xyz, offsets(QUERIES))
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1], want[1])
    assert (found[0] == -1).any() and found[0].dtype == torch.int32


def test_points_are_their_own_queries_by_default():
    torch.manual_seed(1)
    xyz = torch.randn(sum(SIZES), 3)
    for ours, theirs in zip(
        knn_query(3, xyz, offsets(SIZES)),
        search(3, xyz, offsets(SIZES), xyz, offsets(SIZES)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_clouds_of_one_size_are_searched_in_place():
    xyz = torch.randn(4 * 30, 3)
    idx, _ = knn_query(5, xyz, torch.tensor([30, 60, 90, 120]))
    assert torch.equal(idx[:, 0], torch.arange(120, dtype=torch.int32))
    assert torch.equal(idx // 30, (torch.arange(120, dtype=torch.int32) // 30)[:, None].expand(120, 5))


def test_empty_and_half():
    idx, dist = knn_query(2, torch.randn(0, 3), torch.tensor([0, 0]), torch.randn(3, 3), torch.tensor([1, 3]))
    assert (idx == -1).all() and (dist == 1e5).all()
    assert knn_query(2, torch.randn(0, 3), torch.zeros(0, dtype=torch.int64))[0].shape == (0, 2)
    assert knn_query(2, torch.randn(6, 3).half(), torch.tensor([6]))[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offset": torch.tensor([2, 1, 6])}, "must not decrease"),
        ({"offset": torch.tensor([2, 5])}, "must end with the 6 rows"),
        ({"offset": torch.tensor([2.0, 6.0])}, "integers"),
        ({"xyz": torch.randn(1, 6, 3)}, r"must be \(n, C\)"),
        ({"new_xyz": torch.randn(2, 3)}, "go together"),
        ({"new_xyz": torch.randn(2, 3), "new_offset": torch.tensor([2])}, "names 2 clouds"),
        ({"nsample": 0}, "at least 1"),
    ],
)
def test_bad_input(change, says):
    with pytest.raises(ValueError, match=says):
        knn_query(**{"nsample": 2, "xyz": torch.randn(6, 3), "offset": torch.tensor([2, 6]), **change})
