import pytest
import torch

from crosspoint.testing import assert_same_graph, tie_tolerance


def graph(*rows):
    return torch.tensor([rows])


LINE = torch.tensor(
    [[[0.0], [1.0], [-1.0], [2.0], [2.0]]]
)  # 1 and 2 tie around 0; 3 and 4 are the same point


def test_equal_graphs_are_the_same():
    g = graph([0, 1], [1, 0], [2, 0], [3, 4], [4, 3])
    assert_same_graph(g, g.clone(), LINE)


@pytest.mark.parametrize(
    ("actual", "expected", "reason"),
    [
        ([0, 2], [0, 1], "exactly 1.0"),
        ([0, 2, 1], [0, 1, 2], "exactly 1.0"),
        ([0, 3], [0, 1], "at squared distances"),
        ([0, 1, 2, 4, 3], [0, 1, 2, 3, 4], "the same point"),
        ([0, -1], [0, 1], "1 neighbours instead of 2"),
        ([1, 0], [0, 1], "itself"),
        ([0, 0], [0, 1], "twice"),
        ([0, 7], [0, 1], "there are 5 points"),
    ],
)
def test_differences_that_no_rounding_explains(actual, expected, reason):
    with pytest.raises(AssertionError, match=reason):
        assert_same_graph(graph(actual), graph(expected), LINE)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="graphs of"):
        assert_same_graph(graph([0, 1]), graph([0]), LINE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_ties_may_be_exchanged(dtype):
    tolerance = tie_tolerance(2, dtype)
    for factor, accepted in ((0.5, True), (2.0, False)):
        # Distances that no order of summation computes exactly, `factor` tolerances apart.
        a = torch.tensor([0.1, 0.7], dtype=dtype)
        b = torch.tensor([0.7, 0.1], dtype=dtype)
        b[0] += 0.5 * factor * tolerance * 0.5 / 0.7
        points = torch.stack([torch.zeros_like(a), a, b])[None]
        if accepted:
            assert_same_graph(graph([0, 2, 1]), graph([0, 1, 2]), points)
            assert_same_graph(graph([0, 2]), graph([0, 1]), points)
        else:
            with pytest.raises(AssertionError, match="at squared distances"):
                assert_same_graph(graph([0, 2, 1]), graph([0, 1, 2]), points)


def test_infinite_distances_go_by_index():
    points = torch.tensor([[[0.0], [float("nan")], [float("inf")], [3e38]]])
    with pytest.raises(AssertionError, match="exactly inf"):
        assert_same_graph(graph([0, 2, 1, 3]), graph([0, 1, 2, 3]), points)


def test_two_sets_have_no_own_row():
    query = torch.tensor([[[2.0]]])
    assert_same_graph(graph([3, 4, 1]), graph([3, 4, 1]), LINE, query)
    with pytest.raises(AssertionError, match="the same point"):
        assert_same_graph(graph([4, 3, 1]), graph([3, 4, 1]), LINE, query)
