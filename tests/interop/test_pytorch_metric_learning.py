import pytest
import torch
from pytorch_metric_learning import distances, losses, reducers, regularizers

from crosspoint.interop.pytorch_metric_learning import NTXentLoss, SelfSupervisedLoss

N, D = 13, 6
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-6)]


def embeddings(count, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return torch.randn(count, D, dtype=dtype, requires_grad=True)


def assert_same(ours, theirs, inputs, tolerance):
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("order", ["one view behind the other", "neighbours", "any", "other labels"])
def test_two_views(dtype, tolerance, temperature, order):
    z = embeddings(2 * N, dtype)
    labels = torch.arange(N).repeat(2)
    if order == "neighbours":
        labels = torch.arange(N).repeat_interleave(2)
    elif order == "any":
        labels = labels[torch.randperm(2 * N)]
    elif order == "other labels":
        labels = labels * 7 - 20
    options = {} if temperature is None else {"temperature": temperature}
    assert_same(NTXentLoss(**options)(z, labels), losses.NTXentLoss(**options)(z, labels), [z], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_reference_embeddings(dtype, tolerance):
    z, other = embeddings(N, dtype), embeddings(N, dtype, seed=1)
    labels, permuted = torch.randperm(N), torch.randperm(N)
    for ref_labels in (labels.clone(), permuted):
        call = {"ref_emb": other, "ref_labels": ref_labels}
        assert_same(
            NTXentLoss()(z, labels, **call), losses.NTXentLoss()(z, labels, **call), [z, other], tolerance
        )


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_loss(dtype, tolerance, symmetric):
    z, other = embeddings(N, dtype), embeddings(N, dtype, seed=1)
    ours = SelfSupervisedLoss(NTXentLoss(0.2), symmetric=symmetric)(z, other)
    theirs = losses.SelfSupervisedLoss(losses.NTXentLoss(0.2), symmetric=symmetric)(z, other)
    assert_same(ours, theirs, [z, other], tolerance)


def test_one_sample_gives_zero_in_both():
    z, labels = embeddings(2), torch.zeros(2, dtype=torch.int64)
    assert NTXentLoss()(z, labels) == losses.NTXentLoss()(z, labels) == 0
    assert NTXentLoss()(z[:0], labels[:0]) == 0


def test_tells_of_the_limit_where_the_package_stops():
    """The positive's probability is below the smallest normal float32: theirs is capped, ours is not."""
    z = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [-1.0, 0.0], [-1.0, 1e-4]], requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1])
    ours, theirs = NTXentLoss(0.02)(z, labels), losses.NTXentLoss(0.02)(z, labels)
    exact = losses.NTXentLoss(0.02)(z.double(), labels)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    assert theirs < 0.9 * exact


def test_half():
    z, labels = embeddings(2 * N).detach(), torch.arange(N).repeat(2)
    loss = NTXentLoss()(z.half(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, NTXentLoss()(z.half().float(), labels))


def test_accepts_the_defaults_spelled_out():
    z, labels = embeddings(2 * N), torch.arange(N).repeat(2)
    loss = NTXentLoss(
        distance=distances.CosineSimilarity(), reducer=reducers.MeanReducer(), embedding_regularizer=None
    )
    assert torch.equal(loss(z, labels), NTXentLoss()(z, labels))


@pytest.mark.parametrize(
    "option",
    [
        {"distance": distances.LpDistance()},
        {"distance": distances.CosineSimilarity(power=2)},
        {"reducer": reducers.AvgNonZeroReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer()},
    ],
)
def test_refuses_other_definitions(option):
    (name,) = option
    with pytest.raises(ValueError, match=name):
        NTXentLoss(**option)
    with pytest.raises(TypeError, match="collect_stats"):
        NTXentLoss(collect_stats=True)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ((torch.arange(3).repeat(2), (torch.arange(2),) * 4), "indices_tuple"),
        ((torch.arange(2).repeat(3),), "exactly twice"),
        ((torch.tensor([0, 0, 0, 0, 1, 1]),), "exactly twice"),
        ((torch.arange(6),), "exactly twice"),
        ((torch.arange(5),), "one label per embedding"),
        ((torch.randn(6, D),), "SelfSupervisedLoss"),
        ((None,), "SelfSupervisedLoss"),
        ((torch.arange(6), None, torch.randn(6, D)), "ref_labels must be given"),
        ((torch.arange(6), None, torch.randn(6, D), torch.arange(6) // 2), "each once"),
        ((torch.arange(6), None, torch.randn(6, D), torch.arange(6) + 1), "the same labels"),
        ((torch.arange(3).repeat(2), None, None, torch.arange(6)), "without ref_emb"),
    ],
)
def test_refuses_other_calls(call, says):
    with pytest.raises(ValueError, match=says):
        NTXentLoss()(torch.randn(6, D), *call)


def test_one_tensor_as_both_labels_has_no_positives_in_the_package():
    z, labels = embeddings(N), torch.arange(N)
    assert losses.NTXentLoss()(z, labels, ref_emb=embeddings(N, seed=1), ref_labels=labels) == 0
    with pytest.raises(ValueError, match="leave out the positives"):
        NTXentLoss()(z, labels, ref_emb=embeddings(N, seed=1), ref_labels=labels)


def test_wrapper_takes_this_loss_only():
    with pytest.raises(TypeError, match="loss must be"):
        SelfSupervisedLoss(losses.NTXentLoss())
    with pytest.raises(TypeError, match="collect_stats"):
        SelfSupervisedLoss(NTXentLoss(), collect_stats=True)


def test_wrapper_compiles():
    z, other = embeddings(N), embeddings(N, seed=1)
    loss = SelfSupervisedLoss(NTXentLoss())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, other), loss(z, other))
