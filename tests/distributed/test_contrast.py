"""The contrastive losses over several processes: what one process with all samples gives, for any split."""

import pytest
import torch

import rank_worker
from crosspoint import ops
from crosspoint.nn import NTXentLoss
from rank_worker import (
    LOSSES,
    MEMORY,
    RINGS,
    SIZES,
    TEMPERATURE,
    TINY,
    Encoder,
    call,
    gradients,
    learned,
    samples,
)

WORLDS = list(SIZES)
worlds = pytest.mark.parametrize("world", WORLDS)
several = pytest.mark.parametrize("world", WORLDS[1:])


def one_process(loss: str) -> dict:
    z1, z2, labels = samples()
    return gradients(lambda a, b, t: call(loss, a, b, labels, t), z1, z2)


def assert_same(ranks: list[dict], whole: dict, tolerance: float, *, scale: float = 1, shares: bool = False):
    """The ranks' losses, embedding gradients in their order, and temperature gradients."""
    for rank in ranks:
        assert torch.equal(rank["loss"], ranks[0]["loss"])
    dtemperature = [rank["dtemperature"] for rank in ranks]
    if shares:
        dtemperature = [torch.stack(dtemperature).sum()]
    close = {"rtol": tolerance, "atol": 0}
    torch.testing.assert_close(ranks[0]["loss"].double(), whole["loss"], **close)
    for found in dtemperature:
        torch.testing.assert_close(found.double(), whole["dtemperature"], **close)
    for name in ("dz1", "dz2"):
        found = torch.cat([rank[name] for rank in ranks]).double()
        largest = scale * whole[name].abs().max().item()
        torch.testing.assert_close(found, scale * whole[name], rtol=0, atol=tolerance * largest)


@worlds
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_gradients_add_up_to_those_of_one_process(results, world, loss, impl):
    """grad_reduction="sum": each rank has the loss's gradient by its own rows, and a share of the temperature's."""
    ranks = [rank[loss, impl, "sum"] for rank in results(world)]
    assert_same(ranks, one_process(loss), 1e-12, shares=True)


@pytest.mark.skipif(not rank_worker.INTERPRETED, reason="make interpret runs it: Triton's kernels on a CPU")
@pytest.mark.parametrize("loss", LOSSES)
def test_triton_adds_up_too(results, loss):
    assert_same([rank[loss, "triton", "sum"] for rank in results(2)], one_process(loss), 1e-12, shares=True)


@worlds
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_gradients_average_to_those_of_one_process(results, world, loss, impl):
    """grad_reduction="mean": as many times the gradient as there are ranks, and the temperature's on each."""
    ranks = [rank[loss, impl, "mean"] for rank in results(world)]
    assert_same(ranks, one_process(loss), 1e-12, scale=world)


@worlds
@pytest.mark.parametrize("loss", RINGS)
def test_a_ring_equals_one_process(results, world, loss):
    ranks = results(world)
    whole = one_process(loss)
    assert_same([rank["ring", loss, "native", "sum"] for rank in ranks], whole, 1e-12, shares=True)
    assert_same([rank["ring", loss, "native", "mean"] for rank in ranks], whole, 1e-12, scale=world)


@pytest.mark.skipif(not rank_worker.INTERPRETED, reason="make interpret runs it: Triton's kernels on a CPU")
@pytest.mark.parametrize("loss", RINGS)
def test_a_ring_of_triton(results, loss):
    ranks = [rank["ring", loss, "triton", "sum"] for rank in results(2)]
    assert_same(ranks, one_process(loss), 1e-12, shares=True)


@several
def test_a_ring_repeats_its_bits(results, world):
    for rank in results(world):
        again = rank["ring", "again"]
        assert all(
            torch.equal(again[name], x) for name, x in rank["ring", "nt_xent", "native", "mean"].items()
        )


@several
def test_a_ring_keeps_the_digits_of_a_tiny_loss(results, world):
    z1, z2, _ = samples()
    whole = gradients(lambda a, b, t: ops.nt_xent(a, b, t * TINY), z1, z1 + 0.01 * z2)
    assert 0 < whole["loss"] < 1e-16
    assert_same([rank["ring", "tiny"] for rank in results(world)], whole, 1e-10, scale=world)


@several
def test_a_ring_holds_no_more_on_more_ranks(results, world):
    """Pairs, two blocks on their way, two gradients that grow and the one that is added to one of them; the kernels'
    workspace is that of one visit."""
    n, d = MEMORY
    bound = 12 * n * d * 4 + 256 * n + (8 << 20)
    for rank in results(world):
        assert rank["ring", "memory"] < bound
        assert world < 4 or rank["gather", "memory"] > bound


@several
def test_a_ring_through_the_module(results, world):
    ranks = [rank["ring", "module"] for rank in results(world)]
    assert_same(ranks, one_process("nt_xent"), 1e-12, scale=world)


@worlds
def test_a_ring_at_its_edges(results, world):
    for rank in results(world):
        assert rank["ring", "empty"] == 0
        assert "second derivative" in rank["ring", "second"]
        assert "needs kernels, got impl='reference'" in rank["ring", "reference"]


@several
@pytest.mark.parametrize("ring", [False, True], ids=["gather", "ring"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_narrow_embeddings(results, world, dtype, tolerance, ring):
    z1, z2, _ = samples()
    whole = gradients(ops.nt_xent, z1.to(dtype), z2.to(dtype))
    whole = {name: value.double() for name, value in whole.items()}
    ranks = [rank[("ring", dtype) if ring else dtype] for rank in results(world)]
    assert ranks[0]["dz1"].dtype == dtype and ranks[0]["loss"].dtype == torch.float32
    assert_same(ranks, whole, tolerance, scale=world)


@worlds
def test_parameters_under_ddp(results, world):
    """Of a network and of the temperature, on every rank those of one process with all samples."""
    model = Encoder(learned())
    z1, z2, _ = samples()
    value = model(z1, z2)
    value.backward()
    for rank in results(world):
        torch.testing.assert_close(rank["ddp"].pop("value"), value.detach(), rtol=1e-12, atol=0)
        assert rank["ddp"].keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            atol = 1e-12 * parameter.grad.abs().max().item()
            torch.testing.assert_close(rank["ddp"][name], parameter.grad, rtol=0, atol=atol)


@several
def test_module_passes_its_arguments_on(results, world):
    assert_same([rank["summed"] for rank in results(world)], one_process("nt_xent"), 1e-12, shares=True)


@worlds
def test_value_without_gradients(results, world):
    for rank in results(world):
        torch.testing.assert_close(rank["no_grad"], one_process("nt_xent")["loss"], rtol=1e-12, atol=0)
        assert rank["empty"] == 0


@worlds
def test_lightly(results, world):
    """lightly sums what all ranks' losses, means of their own rows, send to an embedding."""
    z1, z2, _ = (x[: 30 * world] for x in samples())
    whole = gradients(lambda a, b, t: ops.nt_xent(a, b, TEMPERATURE), z1, z2)
    assert_same([rank["lightly"] for rank in results(world)], whole, 1e-12, scale=world)


@several
def test_ranks_that_do_not_fit_are_refused_on_all(results, world):
    for rank in results(world):
        assert "one D and one dtype" in rank["other_channels"] and "rank 1: D = 11" in rank["other_channels"]
        assert "rank 0: D = 12, torch.float32" in rank["other_dtype"]


@worlds
@pytest.mark.parametrize("loss", ["nt_xent", "sup_con"])
def test_second_derivative_is_refused(results, world, loss):
    """Even where another term has one."""
    assert all("second derivative" in rank["second", loss] for rank in results(world))


def test_group_of_some_ranks(results):
    ranks = results(3)
    assert "ValueError: nt_xent: this process is not in the group" in ranks[1]["ends"]
    z1, z2, _ = samples()  # the middle rank has none
    whole = gradients(ops.nt_xent, z1, z2)
    assert_same([ranks[0]["ends"], ranks[2]["ends"]], whole, 1e-12, scale=2)


def test_without_process_group():
    z1, z2, _ = samples()
    loss = NTXentLoss(gather_distributed=True)
    assert torch.equal(loss(z1, z2), ops.nt_xent(z1, z2))
    assert repr(loss) == "NTXentLoss(temperature=0.1, impl='auto', gather_distributed=True)"
    with pytest.raises(ValueError, match="is not initialised; call init_process_group"):
        ops.nt_xent(z1, z2, group=object())
    for function in (lambda **kw: ops.nt_xent(z1, z2, **kw), lambda **kw: NTXentLoss(**kw)):
        with pytest.raises(ValueError, match="grad_reduction must be 'mean' or 'sum', got 'average'"):
            function(grad_reduction="average")
        with pytest.raises(ValueError, match="exchange must be 'gather' or 'ring', got 'tree'"):
            function(exchange="tree")
    with pytest.raises(ValueError, match="exchange='ring' was given without gather_distributed=True"):
        NTXentLoss(exchange="ring")
    assert repr(NTXentLoss(gather_distributed=True, exchange="ring")).endswith("exchange='ring')")
