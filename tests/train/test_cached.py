"""Embedding caching: a step in parts equals one that keeps all activations, and keeps those of one part."""

import functools

import pytest
import torch
from torch import nn

import tiny_run
from crosspoint import models
from crosspoint.train import pretrain
from crosspoint.train.cached import cached_backward
from crosspoint.train.log import read_log
from tiny_run import TinyImageEncoder, tiny_config

SHAPES = 7


def model(**options) -> models.CrossPoint:
    torch.manual_seed(0)
    return models.CrossPoint(models.DGCNN(4, projection_dim=6), TinyImageEncoder(), **options).double()


@functools.cache
def batch(views: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    images = draw(SHAPES, views, 3, 16, 16)
    return draw(SHAPES, 20, 3), draw(SHAPES, 20, 3), images if views > 1 else images.squeeze(1)


def plainly(
    model: models.CrossPoint, tensors: tuple[torch.Tensor, ...], parts: int
) -> models.CrossPointOutput:
    """The whole batch, whose batch norms and dropouts see a part at a time."""
    z = [model.project(*part) for part in zip(*(t.tensor_split(parts) for t in tensors), strict=True)]
    output = model.losses(*(torch.cat(parts) for parts in zip(*z, strict=True)))
    output.loss.backward()
    return output


@pytest.mark.parametrize(
    "parts, views, options",
    [
        (1, 1, {}),
        (3, 1, {}),
        (7, 2, {}),
        (2, 1, {"cross_weight": 0.0}),
        (2, 1, {"freeze_image_encoder": True}),
    ],
)
def test_equals_the_whole_batch(parts, views, options):
    """Losses, gradients, running statistics and what is drawn next, with dropout."""
    results = []
    for step in (plainly, lambda m, tensors, parts: cached_backward(m, *tensors, parts=parts)):
        m = model(**options)
        torch.manual_seed(2)
        output = step(m, batch(views), parts)
        results.append((m, output, torch.rand(3)))
    (expected, losses, drawn), (found, output, now) = results
    assert torch.equal(now, drawn)
    for value, other in zip(output, losses, strict=True):
        if other is not None:
            torch.testing.assert_close(value, other.detach(), rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    for (name, a), b in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_keeps_the_activations_of_one_part():
    def peak(step) -> int:
        alive, most = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor = tensor
                alive += tensor.numel()
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.tensor.numel()

        m = model()
        weights = {p.data_ptr() for p in m.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t if t.data_ptr() in weights else Kept(t),
            lambda k: k if torch.is_tensor(k) else k.tensor,
        ):
            step(m)
        return most

    whole = peak(lambda m: plainly(m, batch(), 1))
    assert peak(lambda m: cached_backward(m, *batch(), parts=3)) < whole / 2
    assert peak(lambda m: plainly(m, batch(), 3)) > whole / 2


def test_pre_trains(tmp_path):
    """As an option; a part as large as the batch is the batch."""
    data = tiny_run.write_pairs(tmp_path / "pairs")
    records = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", tiny_run.build_tiny)
        for name, size in (
            ("whole", None),
            ("one", tiny_run.BATCH),
            ("parts", 3),
        ):  # three make two parts of two
            pretrain(tiny_config(data, tmp_path / name, epochs=1, part_size=size))
            records.append([r["loss"] for r in read_log(tmp_path / name / "log.jsonl")])
    whole, one, parts = records
    assert one == pytest.approx(whole, rel=1e-4)
    assert parts != pytest.approx(whole, rel=1e-4) and all(map(torch.isfinite, torch.tensor(parts)))


def test_parts_change_batch_statistics():
    """The reference above would not see a difference that is not there: parts do change statistics."""
    first, second = model(), model()
    plainly(first, batch(), 1)
    plainly(second, batch(), 3)
    norms = [next(m for m in x.modules() if isinstance(m, nn.BatchNorm1d)) for x in (first, second)]
    assert not torch.allclose(norms[0].running_mean, norms[1].running_mean)
