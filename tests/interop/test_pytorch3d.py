"""pytorch3d does not install here: an independent search, written from its documentation, stands in for it."""

import pytest
import torch

from crosspoint.interop.pytorch3d import knn_gather, knn_points


def search(p1, p2, lengths1, lengths2, k):
    """Point by point: squared distances ascending, zeros where a cloud of either side has no such entry."""
    n, size, _ = p1.shape
    idx = torch.zeros(n, size, k, dtype=torch.int64)
    rows = []
    for b in range(n):
        for i in range(size):
            row = [p1.new_zeros(())] * k
            if i < lengths1[b]:
                d = ((p1[b, i] - p2[b, : lengths2[b]]) ** 2).sum(1)
                order = sorted(range(int(lengths2[b])), key=lambda j, d=d: (d[j].item(), j))[:k]
                for slot, j in enumerate(order):
                    row[slot], idx[b, i, slot] = d[j], j
            rows += row
    return torch.stack(rows).view(n, size, k), idx


@pytest.fixture
def clouds():
    torch.manual_seed(0)
    p1 = torch.randn(3, 11, 3, dtype=torch.float64, requires_grad=True)
    p2 = torch.randn(3, 9, 3, dtype=torch.float64, requires_grad=True)
    return p1, p2, torch.tensor([11, 4, 0]), torch.tensor([9, 2, 5])


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("lengths", [True, False])
def test_values_and_gradients(clouds, k, lengths):
    p1, p2, *given = clouds
    sizes = given if lengths else (torch.full((3,), 11), torch.full((3,), 9))
    found = knn_points(p1, p2, *(given if lengths else ()), K=k, return_nn=True)
    dists, idx = search(p1, p2, *sizes, k)
    assert torch.equal(found.idx, idx)
    torch.testing.assert_close(found.dists, dists)
    g = torch.randn(dists.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found.dists, (p1, p2), g), torch.autograd.grad(dists, (p1, p2), g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    neighbours = found.knn
    assert neighbours.shape == (3, 11, k, 3)
    for b in range(3):
        for slot in range(k):
            want = p2[b, idx[b, :, slot]] if slot < sizes[1][b] else torch.zeros(11, 3, dtype=torch.float64)
            assert torch.equal(neighbours[b, :, slot], want)


def test_is_a_named_tuple_without_neighbours_by_default(clouds):
    dists, idx, knn = knn_points(*clouds[:2])
    assert dists.shape == idx.shape == (3, 11, 1) and knn is None


def test_gather_gives_gradients_to_what_it_reads(clouds):
    x = torch.randn(3, 9, 5, dtype=torch.float64, requires_grad=True)
    idx = knn_points(*clouds[:2], K=2).idx
    out = knn_gather(x, idx)
    (grad,) = torch.autograd.grad(out.sum(), x)
    counts = torch.stack([torch.bincount(row.flatten(), minlength=9) for row in idx])
    assert torch.equal(grad, counts[:, :, None].expand_as(x).double())


def test_half_and_empty():
    p = torch.randn(2, 5, 3).half()
    found = knn_points(p, p, K=2)
    assert found.dists.dtype == torch.float32 and torch.equal(found.dists[..., 0], torch.zeros(2, 5))
    none = knn_points(torch.randn(2, 5, 3), torch.randn(2, 0, 3), K=2, return_nn=True)
    assert not none.dists.any() and not none.idx.any() and none.knn.shape == (2, 5, 2, 3)
    assert knn_points(torch.randn(0, 5, 3), torch.randn(0, 4, 3), return_nn=True).knn.shape == (0, 5, 1, 3)


@pytest.mark.parametrize("option", [{"norm": 1}, {"norm": 3}, {"version": 2}])
def test_refuses_what_it_does_not_do(clouds, option):
    (name,) = option
    with pytest.raises(ValueError, match=name):
        knn_points(*clouds[:2], **option)


def test_bad_shapes(clouds):
    with pytest.raises(ValueError, match="agree in B and C"):
        knn_points(clouds[0], clouds[1][:2])
    with pytest.raises(ValueError, match=r"x must be \(N, M, U\)"):
        knn_gather(clouds[0], torch.zeros(2, 3, 1, dtype=torch.int64))


def test_compiles(clouds):
    compiled = torch.compile(knn_points, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        compiled(*clouds, K=3, return_nn=True), knn_points(*clouds, K=3, return_nn=True), strict=True
    ):
        assert torch.equal(ours, theirs)
