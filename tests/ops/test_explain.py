"""`explain` answers for a call what the call itself would do."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import crosspoint
from crosspoint import ops
from crosspoint.ops import _dispatch

X = torch.zeros(2, 8, 3)


def test_auto_runs_native_and_names_the_others():
    found = crosspoint.explain(ops.knn_graph, X, 4)
    assert (found.op, found.device, found.impl, found.runs) == ("knn_graph", "cpu", "auto", "native")
    assert list(found.backends) == ["native", "triton", "reference"]
    assert found.backends["native"] is None and found.backends["reference"] is None
    assert found.backends["triton"]
    text = str(found)
    assert text.startswith("knn_graph on cpu with impl='auto' runs native")
    assert f"no: {found.backends['triton']}" in text
    assert any("threads" in note for note in found.notes)


IDX, WEIGHT = torch.zeros(2, 8, 4, dtype=torch.int64), torch.zeros(5, 6)
CALLS = {
    "conv_bn_act_pool": partial(ops.conv_bn_act_pool, X, WEIGHT[:, :3], *WEIGHT.T[:4], training=False),
    "knn_graph": partial(ops.knn_graph, X, 4),
    "knn": partial(ops.knn, X, X, 4),
    "edge_conv": partial(ops.edge_conv, X, IDX, WEIGHT, None, None, training=False),
    "edge_conv2": partial(
        ops.edge_conv2, X, IDX, WEIGHT, None, None, WEIGHT[:, :5], None, None, training=False
    ),
    "gather_max": partial(ops.gather_max, X, IDX),
    "neighbor_sum": partial(ops.neighbor_sum, X, IDX),
    "nt_xent": partial(ops.nt_xent, X[0], X[1]),
    "info_nce": partial(ops.info_nce, X[0], X[1]),
    "sup_con": partial(ops.sup_con, X[0], IDX[0, :, 0]),
}


def test_every_operator_is_tried():
    assert set(CALLS) == {row.op for row in ops.describe_backends()}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_says_what_choose_says(op, impl, monkeypatch):
    answers = []
    choose = _dispatch.choose

    def recorded(*args, **traits):
        answers.append(choose(*args, **traits))
        return answers[-1]

    call = CALLS[op]
    found = ops.explain(op, *call.args, **call.keywords, impl=impl)
    monkeypatch.setattr(_dispatch, "choose", recorded)
    call(impl=impl)
    assert answers == [found.runs]


def test_nothing_is_computed():
    shape = (1, 1 << 20, 3)
    ops.explain("knn_graph", torch.zeros(1).expand(shape), 1000)  # would be 8 GB of indices


def test_a_refused_backend_is_explained_instead_of_raised():
    found = ops.explain("nt_xent", X[0], X[1], impl="triton")
    assert found.runs is None and "is refused" in str(found)
    with pytest.raises(RuntimeError, match="cannot run on cpu tensors"):
        ops.nt_xent(X[0], X[1], impl="triton")


def test_limits_of_a_call_are_asked(monkeypatch):
    limit = lambda **traits: "says the test"  # noqa: E731
    monkeypatch.setitem(_dispatch._limits, ("knn_graph", "native"), limit)
    found = ops.explain("knn_graph", X, 4)
    assert found.runs == "reference" and found.backends["native"] == "says the test"
    assert any("plain PyTorch" in note for note in found.notes)
    with pytest.raises(RuntimeError, match="says the test"):
        ops.knn_graph(X, 4, impl="native")


def test_other_devices_have_the_reference_alone():
    found = ops.explain("knn_graph", X.to("meta"), 4)
    assert found.runs == "reference" and "no kernels for meta" in found.backends["native"]


@pytest.mark.parametrize("op", CALLS)
def test_old_gpus_are_left_to_the_reference(op, monkeypatch):
    """A CUDA tensor that is not there: `explain` and `choose` look at its device alone."""
    rows = dict.fromkeys(("native", "triton", "reference"))
    monkeypatch.setitem(_dispatch._table, (op, "cuda"), rows)
    monkeypatch.setattr(_dispatch, "_limits", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def runs(capability: tuple[int, int], impl: str = "auto") -> str:
        def get_device_capability(index):
            asked.append(index)
            return capability

        monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
        return _dispatch.choose(op, impl, torch.device("cuda", 3))

    assert [runs((8, 0)), runs((9, 0), "triton"), runs((7, 5)), runs((7, 5), "reference")] == [
        "native", "triton", "reference", "reference",
    ]  # fmt: skip
    assert set(asked) == {3}
    for impl in ("native", "triton"):
        with pytest.raises(
            RuntimeError, match=r"need compute capability 8\.0 .* has 7\.5; use impl='reference'"
        ):
            runs((7, 5), impl)


def test_old_gpus_are_explained(monkeypatch):
    rows = dict.fromkeys(("native", "triton", "reference"))
    monkeypatch.setitem(_dispatch._table, ("knn_graph", "cuda"), rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    with FakeTensorMode():
        found = crosspoint.explain(ops.knn_graph, torch.empty(2, 8, 3, device="cuda"), 4)
    assert found.runs == "reference"
    assert "compute capability 8.0" in found.backends["native"]
    assert found.backends["native"] == found.backends["triton"]


def test_slow_inputs_are_noted():
    found = ops.explain("knn_graph", torch.zeros(2, 3, 8, dtype=torch.bfloat16).transpose(1, 2), 4)
    assert any("not contiguous" in note for note in found.notes)
    assert any("widened" in note for note in found.notes)


def test_arguments_are_checked_as_by_the_call():
    with pytest.raises(ValueError, match="k must be at least 1"):
        ops.explain("knn_graph", X, 0)
    assert ops.knn_graph(X, 4).shape == (2, 8, 4), "an error leaves nothing behind"


@pytest.mark.parametrize("op", ["ball_query", torch.add])
def test_what_is_no_operator_is_refused(op):
    with pytest.raises(ValueError, match="op must be one of"):
        ops.explain(op, X)
