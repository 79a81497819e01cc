"""A step as a CUDA graph. Without a GPU its calls run again in the graph's place, on the same memory."""

import pytest
import torch
from torch import nn

from crosspoint.models import CrossPointConfig
from crosspoint.train import PretrainConfig, capture, pretrain
from crosspoint.train.checkpoint import load_state
from crosspoint.train.log import read_log
from crosspoint.train.pretrain import Run, open_dataset
from crosspoint.train.ranks import Ranks
from crosspoint.train.repeatable import isolated
from tiny_run import STEPS, build_tiny, pretrain_module, tiny_config, write_pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def rerun(monkeypatch):
    """Captures that only remember the function; they are counted."""
    captured = []

    def remember(function, model):
        captured.append(function)
        result = torch.full((4,), torch.nan)
        return result, lambda: result.copy_(function())

    monkeypatch.setattr(capture, "capture", remember)
    return captured


def train(config: PretrainConfig) -> None:
    """What `pretrain` does once it has refused what cannot be captured."""
    device = torch.device("cpu")
    with isolated(device):
        Run(config, open_dataset(config, config.out), Ranks(device), None).train()


def test_a_captured_step_is_the_step(data, tmp_path, monkeypatch, rerun):
    """Its inputs are copied to where the capture read them, and gradients are where the optimizer finds them."""
    monkeypatch.setattr(pretrain_module.models, "build", build_tiny)
    for name, captured in (("plain", False), ("captured", True)):
        (tmp_path / name).mkdir()
        train(tiny_config(data, tmp_path / name, cuda_graph=captured))
    assert len(rerun) == 1
    records = [read_log(tmp_path / name / "log.jsonl") for name in ("plain", "captured")]
    assert len(records[0]) == STEPS
    for plain, captured in zip(*records, strict=True):
        assert {**plain, "shapes_per_second": 0} == {**captured, "shapes_per_second": 0}
    states = [load_state(tmp_path / name / "state.pt").model for name in ("plain", "captured")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_other_shapes_are_refused(rerun):
    step = capture.CapturedStep(lambda x: x.sum().expand(4), nn.Identity())
    assert step(torch.ones(2, 3)).tolist() == [6] * 4 and step(torch.zeros(2, 3)).tolist() == [0] * 4
    with pytest.raises(ValueError, match=r"takes tensors of shapes \[\(2, 3\)\], got \[\(4, 3\)\]"):
        step(torch.ones(4, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "cuda_graph needs one process with a GPU, got 1 on 'cpu'"),
        ({"part_size": 2}, "cuda_graph must be off with part_size"),
        ({"activation_checkpointing": True}, "cuda_graph must be off with part_size and with activation_ch"),
    ],
)
def test_what_cannot_be_captured_is_refused(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tiny_config(data, tmp_path / "run", cuda_graph=True, **changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_on_cuda_is_the_step():
    """The same losses and weights over steps on other batches; dropout draws anew in each."""
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = build_tiny(CrossPointConfig(k=4)).cuda().train()
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def passes(*batch, model=model, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = model(*batch).loss
            loss.backward()
            return loss.detach()[None]

        step = capture.CapturedStep(passes, model) if captured else passes
        losses = []
        for seed in (1, 2, 3, 3):
            torch.manual_seed(seed)
            views = torch.randn(2, 8, 64, 3, device="cuda")
            losses.append(step(*views, torch.randn(8, 3, 16, 16, device="cuda")).item())
            optimizer.step()
        found.append((losses, model.state_dict()))
    (losses, weights), (others, other_weights) = found
    assert others == pytest.approx(losses, rel=1e-4)
    for name, value in weights.items():
        if "running" in name:
            torch.testing.assert_close(other_weights[name], value, rtol=1e-3, atol=1e-4, msg=name)
