"""Batch norm over several processes: layers and models give what one process with all clouds gives, for any split."""

import functools
import itertools
from collections.abc import Iterable

import norm_layers
import pytest
import torch
from norm_layers import CLOUDS, LAYERS
from torch import nn

from crosspoint import ops
from crosspoint.nn import EdgeConv, SyncBatchNorm, convert_sync_batch_norm
from crosspoint.testing import TOLERANCE

worlds = pytest.mark.parametrize("world", CLOUDS)
several = pytest.mark.parametrize("world", list(CLOUDS)[1:])
PER_CLOUD = ("y", "dx")


@functools.cache
def one_process(op: str, **changes) -> dict:
    given = norm_layers.inputs()
    if "shift" in changes:
        given = {**given, "x": given["x"] + changes["shift"]}
    if "rounded" in changes:
        given = {
            name: t.to(changes["rounded"]).double() if t.is_floating_point() else t
            for name, t in given.items()
        }
    return norm_layers.layer(op, given, changes.get("dtype", torch.float64), impl="reference")


def assert_same(ranks: list[dict], whole: dict, tolerance: float, *, average: bool = False) -> None:
    """Clouds' values in the order of the ranks, gradients of parameters added up (or on every rank), buffers on every
    rank. A bias before a norm has a gradient of nothing but rounding, which the weight's is to bound."""
    largest = (
        max(t.abs().max().item() for name, t in whole.items() if name.endswith("weight")) if average else 0
    )
    assert ranks[0].keys() == whole.keys()
    for name, expected in whole.items():
        found = [rank[name].double() for rank in ranks]
        if name in PER_CLOUD:
            found = [torch.cat(found)]
        elif not average and "running" not in name and "batches" not in name:
            found = [torch.stack(found).sum(0)]
        atol = tolerance * max(largest, expected.abs().max().item())
        for value in found:
            torch.testing.assert_close(
                value, expected.double(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def under(*kinds: str, sharded: Iterable[str]) -> list[tuple[int, str]]:
    """Cases (world, kind): some in every world, some in those that shard."""
    return [*itertools.product(CLOUDS, kinds), *itertools.product(norm_layers.SHARDED, sharded)]


@worlds
@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_layers_equal_one_process(results, world, op, impl):
    """Values, every gradient and the running statistics, in float64."""
    assert_same([rank["norms"][op, impl] for rank in results(world)], one_process(op), 1e-11)


@pytest.mark.skipif(not norm_layers.INTERPRETED, reason="make interpret runs it: Triton's kernels on a CPU")
def test_triton_equals_one_process(results):
    """Two layers, whose norms the operators themselves tell apart."""
    ranks = [rank["norms"]["edge_conv2", "triton"] for rank in results(2)]
    assert_same(ranks, one_process("edge_conv2"), 1e-11)


@several
@pytest.mark.parametrize("op", LAYERS)
def test_float32_far_from_the_origin(results, world, op):
    """The statistics lose nothing where coordinates are large beside their spread."""
    ranks = [rank["norms"][op, "far"] for rank in results(world)]
    for rank in ranks:
        assert rank["y"].dtype == torch.float32
    whole = one_process(op, shift=1000, rounded=torch.float32)
    assert_same(ranks, whole, TOLERANCE[torch.float32])


@several
@pytest.mark.parametrize("op", LAYERS)
def test_bfloat16(results, world, op):
    ranks = [rank["norms"][op, "half"] for rank in results(world)]
    assert all(rank["y"].dtype == torch.bfloat16 for rank in ranks)
    assert_same(ranks, one_process(op, dtype=torch.bfloat16), TOLERANCE[torch.bfloat16])


@worlds
def test_modules_equal_one_process(results, world):
    """A converted model: norms of images, of rows, without affine parameters, averaged over all batches, in fused
    layers."""
    whole = norm_layers.module(norm_layers.inputs(), lambda model: model)
    assert_same([rank["norms"]["module"] for rank in results(world)], whole, 1e-11)


@pytest.mark.parametrize("world, kind", under("crosspoint", "computed again", sharded=["sharded"]))
def test_a_step_of_crosspoint(results, world, kind):
    """Graphs pinned, under DDP and FSDP: every parameter gets, on every rank, the gradient of one process, also where
    the backward pass computes the blocks again."""
    whole = norm_layers.crosspoint(norm_layers.inputs(), lambda model: model)
    assert_same([rank["norms"][kind] for rank in results(world)], whole, 1e-10, average=True)


@pytest.mark.parametrize("world", norm_layers.SHARDED)
@pytest.mark.parametrize("kind", norm_layers.OPTIMIZERS)
def test_optimizers_of_sharded_parameters(results, world, kind):
    """Norms are those of whole tensors, of which a rank may hold nothing."""
    whole, size = norm_layers.optimised(kind, lambda model: model)
    for rank in results(world):
        torch.testing.assert_close(rank["norms"][kind][0], whole, rtol=1e-12, atol=1e-14)
        assert "all parameters must be sharded in one way, or none" in rank["norms"]["mixed"]
    assert sum(rank["norms"][kind][1] for rank in results(world)) == size, "a share is held twice"


@pytest.mark.parametrize("world, kind", under("cached", sharded=norm_layers.ABLATIONS))
def test_a_cached_step_over_ranks(results, world, kind):
    """Embedding caching: two parts on every rank equal one process that keeps all activations of the same parts."""
    plainly, options = functools.partial(norm_layers.plainly, world), norm_layers.ABLATIONS.get(kind, {})
    whole = norm_layers.in_parts([norm_layers.inputs()], plainly, **options)
    assert_same([rank["norms"][kind] for rank in results(world)], whole, 1e-11, average=True)


@several
def test_autocast(results, world):
    x = norm_layers.inputs()["x"].flatten(0, 1).bfloat16()
    norm = nn.BatchNorm1d(norm_layers.C_IN)
    expected = norm(x.float())
    found = torch.cat([rank["norms"]["half"] for rank in results(world)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    for rank in results(world):
        torch.testing.assert_close(rank["norms"]["running"], norm.running_var, rtol=1e-5, atol=0)


def test_conversion_keeps_parameters_and_keys():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3), EdgeConv(3, 5)).eval()
    before, parameters = model.state_dict(), list(model.parameters())
    assert convert_sync_batch_norm(model) is model
    assert isinstance(model[1], SyncBatchNorm) and isinstance(model[2].bn, SyncBatchNorm)
    assert not model[1].training and model[1].eps == 1e-3
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == before.keys()
    assert isinstance(convert_sync_batch_norm(nn.BatchNorm1d(3)), SyncBatchNorm)


def test_alone_it_is_batch_norm():
    x = torch.randn(6, 4, 5)
    plain, norm = nn.BatchNorm1d(4), SyncBatchNorm(4)
    assert torch.equal(norm(x), plain(x)) and torch.equal(norm.running_var, plain.running_var)
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    with pytest.raises(ValueError, match=r"expected \(B, C\) or \(B, C, ...\), got shape \(4,\)"):
        norm(x[0, :, 0])


def test_group_without_process_group():
    x, idx = torch.randn(1, 4, 3), torch.zeros(1, 4, 2, dtype=torch.int64)
    weight, gamma, beta = torch.randn(5, 6), torch.ones(5), torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"edge_conv: group was given, but torch\.distributed is not initialised"
    ):
        ops.edge_conv(x, idx, weight, gamma, beta, training=True, group=object())
