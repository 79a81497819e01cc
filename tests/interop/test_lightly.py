"""Against the formula of lightly's loss, and against lightly itself where it is installed, as by the Makefile.

lightly requires torchvision, whose wheels ask for a fixed torch: it is installed without what it requires, and its
loss runs with an empty stand-in for torchvision.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from crosspoint.interop.lightly import NTXentLoss


def formula(out0, out1, temperature):
    """The four blocks of similarities, the diagonals of the two within a view left out."""
    n = len(out0)
    a, b = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    other = ~torch.eye(n, dtype=torch.bool)
    rows = [
        torch.cat([x @ y.t(), (x @ x.t())[other].view(n, n - 1)], dim=1) / temperature
        for x, y in ((a, b), (b, a))
    ]
    return F.cross_entropy(torch.cat(rows), torch.arange(n).repeat(2))


@functools.cache
def lightly_class():
    """lightly's NTXentLoss, from its two files: importing the package around them would need torchvision."""
    spec = importlib.util.find_spec("lightly")
    if spec is None:
        pytest.skip("lightly is not installed: pip install --no-deps lightly")
    folder = Path(spec.submodule_search_locations[0])
    with mock.patch.dict(sys.modules, {"torchvision": mock.MagicMock(), "lightly.models": mock.MagicMock()}):
        load_file("lightly.models.modules.memory_bank", folder / "models/modules/memory_bank.py")
        return load_file("ntx_ent_loss", folder / "loss/ntx_ent_loss.py").NTXentLoss


def load_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lightly_loss(out0, out1, temperature):
    return lightly_class()(temperature)(out0, out1)


@pytest.mark.parametrize("theirs", [formula, lightly_loss])
@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_same_loss_and_gradients(theirs, temperature, dtype, tolerance):
    torch.manual_seed(0)
    views = [torch.randn(17, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    ours, want = NTXentLoss(temperature)(*views), theirs(*views, temperature)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(ours, views), torch.autograd.grad(want, views), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_temperature_is_half_by_default_and_nothing_is_saved():
    loss = NTXentLoss()
    views = torch.randn(6, 4), torch.randn(6, 4)
    torch.testing.assert_close(loss(*views), formula(*views, 0.5))
    assert loss.state_dict() == {} and NTXentLoss(0.2, 0, True).temperature == 0.2


def test_one_sample_and_none_give_zero():
    for n in (0, 1):
        assert NTXentLoss()(torch.randn(n, 4), torch.randn(n, 4)) == 0


def test_half():
    views = torch.randn(6, 4).half(), torch.randn(6, 4).half()
    loss = NTXentLoss()(*views)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, formula(*(v.float() for v in views), 0.5))


@pytest.mark.parametrize("size", [4096, (4096, 128)])
def test_refuses_a_memory_bank(size):
    with pytest.raises(ValueError, match="memory_bank_size must be 0"):
        NTXentLoss(memory_bank_size=size)


@pytest.mark.parametrize("temperature", [0.0, -0.5, float("nan")])
def test_refuses_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        NTXentLoss(temperature)


def test_gathers_nothing_without_other_processes():
    """tests/distributed has it among several."""
    views = torch.randn(6, 4), torch.randn(6, 4)
    assert torch.equal(NTXentLoss(gather_distributed=True)(*views), NTXentLoss()(*views))


def test_compiles():
    views = torch.randn(6, 4), torch.randn(6, 4)
    compiled = torch.compile(NTXentLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*views), formula(*views, 0.5))
