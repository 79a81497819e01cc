"""Who takes the contrastive losses' passes by wgmma: whoever asks, where they apply."""

import pytest
import torch

from crosspoint import ops
from crosspoint.ops import reference
from crosspoint.ops._gpu import _cuda
from crosspoint.testing import TOLERANCE
from op_tester import compiled_backends

SETTING = "CROSSPOINT_WGMMA"


@pytest.fixture
def hopper(monkeypatch):
    """A library with all leaves, and a GPU of compute capability 9.0."""
    monkeypatch.setattr(_cuda, "has_leaves", lambda op: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv(SETTING, "1")
    return monkeypatch


def chosen(channels: int, dtype: torch.dtype, op: str = "nt_xent") -> str:
    return _cuda.leaves_for(op, torch.empty(4, channels, dtype=dtype, device="meta"))._op


def test_asked_for_they_are_taken_where_they_apply(hopper):
    for channels in (33, 64, 100, 128, 200, 256):
        for dtype in (torch.bfloat16, torch.float16):
            assert chosen(channels, dtype) == "nt_xent_wgmma"
    assert chosen(32, torch.bfloat16) == chosen(257, torch.bfloat16) == "nt_xent"
    assert chosen(128, torch.float32) == chosen(128, torch.float64) == "nt_xent"
    assert chosen(128, torch.bfloat16, "edge_conv") == "edge_conv"
    leaves = _cuda.leaves_for("nt_xent", torch.empty(4, 64, dtype=torch.float16, device="meta"))
    assert leaves.normalise._schema.name == "crosspoint::_nt_xent_wgmma_normalise"
    assert leaves.finish._schema.name == "crosspoint::_nt_xent_finish"


@pytest.mark.parametrize("answer", [None, "0", ""])
def test_nobody_gets_them_who_does_not_ask(hopper, answer):
    hopper.delenv(SETTING) if answer is None else hopper.setenv(SETTING, answer)
    assert chosen(128, torch.bfloat16) == "nt_xent"


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_gpus_do_not_have_them(hopper, capability):
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen(128, torch.bfloat16) == "nt_xent"


NATIVE = [pair for pair in compiled_backends("nt_xent") if pair == ("native", "cuda")]
NONE = pytest.param(None, marks=pytest.mark.skip(reason="needs a GPU"))


@pytest.mark.parametrize("backend", NATIVE or [NONE], ids="-".join if NATIVE else None)
@pytest.mark.parametrize("op", ["nt_xent", "info_nce"])
@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize("n", [128, 1000])
def test_they_agree_with_the_reference(backend, op, channels, n, monkeypatch):
    """On GPUs of compute capability 9.0; mma.sync again on others."""
    monkeypatch.setenv(SETTING, "1")
    z = torch.randn(2, n, channels, generator=torch.Generator().manual_seed(0))
    z[1] += z[0]
    z = z.to(backend[1], torch.bfloat16)
    leaves, exact = ([v.to(dtype).requires_grad_() for v in z] for dtype in (torch.bfloat16, torch.float64))
    value = getattr(ops, op)(*leaves, 0.1, impl=backend[0])
    expected = getattr(reference, op)(*exact, torch.tensor(0.1, dtype=torch.float64, device=backend[1]))
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    for x, e in zip(leaves, exact, strict=True):
        assert (x.grad.double() - e.grad).abs().max() <= TOLERANCE[torch.bfloat16] * e.grad.abs().max()
