"""Rates by batch size and step; LARS and LAMB against their formulas."""

from dataclasses import replace

import pytest
import torch

from crosspoint.train import PretrainConfig
from crosspoint.train.optim import LAMB, LARS, learning_rate, make_optimizer


def test_warm_up_and_cosine():
    config = PretrainConfig(epochs=4, lr=0.1, warmup_epochs=2)
    rates = [learning_rate(config, step, 3) for step in range(12)]
    cosine = [learning_rate(replace(config, warmup_epochs=0), step, 3) for step in range(12)]
    assert cosine[0] == cosine[2] == 0.1 and cosine[6] == pytest.approx(0.05) and cosine[11] > 0
    assert rates[:6] == pytest.approx([c * (i + 1) / 6 for i, c in enumerate(cosine[:6])])
    assert rates[6:] == cosine[6:]


@pytest.mark.parametrize("rule, times", [("none", 1), ("linear", 16), ("sqrt", 4)])
def test_rate_by_batch_size(rule, times):
    config = PretrainConfig(batch_size=320, lr=0.01, lr_scaling=rule)
    assert learning_rate(config, 0, 1) == pytest.approx(0.01 * times)


def test_lars():
    """Two steps by the formula; vectors move as under SGD."""
    torch.manual_seed(0)
    matrix, vector = torch.randn(3, 4), torch.randn(4)
    found = [t.clone().requires_grad_() for t in (matrix, vector)]
    plain = vector.clone().requires_grad_()
    optimizer = LARS(found, lr=0.5, weight_decay=0.1, trust=0.02)
    sgd = torch.optim.SGD([plain], lr=0.5, momentum=0.9)
    kept = torch.zeros_like(matrix)
    for _ in range(2):
        found[0].grad, found[1].grad = torch.randn(3, 4), torch.randn(4)
        plain.grad = found[1].grad.clone()
        change = found[0].grad + 0.1 * matrix
        kept = 0.9 * kept + 0.02 * matrix.norm() / change.norm() * change
        matrix = matrix - 0.5 * kept
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(found[0].detach(), matrix)
    torch.testing.assert_close(found[1].detach(), plain.detach())
    with pytest.raises(ValueError, match="LARS: trust must not be negative, got -1"):
        LARS(found, lr=0.1, trust=-1)


def test_lamb():
    """Three steps by the formula; vectors move as under Adam."""
    torch.manual_seed(0)
    matrix, vector = torch.randn(3, 4).double(), torch.randn(4).double()
    found = [t.clone().requires_grad_() for t in (matrix, vector)]
    plain = vector.clone().requires_grad_()
    optimizer = LAMB(found, lr=0.1, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.2)
    adam = torch.optim.Adam([plain], lr=0.1, betas=(0.8, 0.95), eps=1e-3)
    average, squares = torch.zeros_like(matrix), torch.zeros_like(matrix)
    for step in range(1, 4):
        found[0].grad, found[1].grad = torch.randn(3, 4).double(), torch.randn(4).double()
        plain.grad = found[1].grad.clone()
        average = 0.8 * average + 0.2 * found[0].grad
        squares = 0.95 * squares + 0.05 * found[0].grad ** 2
        change = average / (1 - 0.8**step) / ((squares / (1 - 0.95**step)).sqrt() + 1e-3) + 0.2 * matrix
        matrix = matrix - 0.1 * matrix.norm() / change.norm() * change
        optimizer.step()
        adam.step()
    torch.testing.assert_close(found[0].detach(), matrix)
    torch.testing.assert_close(found[1].detach(), plain.detach())
    with pytest.raises(ValueError, match="LAMB: beta2 must be between 0 and 1, got 1"):
        LAMB(found, lr=0.1, beta2=1.0)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_no_value_is_read_on_the_host(kind):
    """Tensors without data have no values; the rate may be a tensor, too."""
    parameters = [torch.zeros(size, device="meta", requires_grad=True) for size in ((3, 4), (4,))]
    optimizer = kind(parameters, lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.zeros((), device="meta")
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("weight, grad", [(0.0, 2.0), (1.0, 0.0)])
def test_lars_of_nothing(weight, grad):
    """A weight of 0 moves by its gradient, and a gradient of 0 moves nothing."""
    w = torch.full((2, 2), weight).requires_grad_()
    w.grad = torch.full((2, 2), grad)
    LARS([w], lr=0.5).step()
    assert torch.equal(w.detach(), torch.full((2, 2), weight - 0.5 * grad))


def test_choice_of_optimizer():
    parameters = [torch.zeros(2, requires_grad=True)]
    assert isinstance(make_optimizer(PretrainConfig(optimizer="lars"), parameters), LARS)
    assert isinstance(make_optimizer(PretrainConfig(optimizer="lamb"), parameters), LAMB)
    adam = make_optimizer(PretrainConfig(), parameters)
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["fused"]
