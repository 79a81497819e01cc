"""A step as a CUDA graph. Without a GPU its operators run again in the graph's place, on the same memory."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosspoint.models import CrossPointConfig
from crosspoint.train import PretrainConfig, capture, pretrain
from crosspoint.train.checkpoint import load_state
from crosspoint.train.log import read_log
from crosspoint.train.pretrain import Run, open_dataset
from crosspoint.train.profile import ProfileConfig, _take_steps
from crosspoint.train.ranks import Ranks
from crosspoint.train.repeatable import isolated
from tiny_run import STEPS, build_tiny, pretrain_module, tiny_config, write_pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


class Recorded(TorchDispatchMode):
    """A CUDA graph for the CPU: a replay runs the operators of the capture again, on the same memory, and no Python.

    What the capture itself changed is put back, as capturing on a GPU runs nothing; what waits for a device fails.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.known, self.former = [], set(), []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags)
        assert not waits, f"{operator} waits for the device"
        for tensor in self.unknown((arguments, options)):
            self.former.append((tensor, tensor.clone()))
        result = operator(*arguments, **(options or {}))
        list(self.unknown(result))
        if operator.namespace != "profiler":  # which is the host's
            self.calls.append((operator, arguments, options or {}, result))
        return result

    def unknown(self, tree):
        for tensor in tensors(tree):
            if (memory := tensor.untyped_storage().data_ptr()) not in self.known:
                self.known.add(memory)
                yield tensor

    def replay(self):
        with torch.no_grad():
            for operator, arguments, options, kept in self.calls:
                for own, new in zip(tensors(kept), tensors(operator(*arguments, **options)), strict=True):
                    if own.data_ptr() != new.data_ptr():
                        own.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's part in a capture, on the CPU; what was captured."""
    made, current = [], []

    @contextlib.contextmanager
    def device(index):
        current.append(torch.device(index))
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(recorded, capture_error_mode):
        assert current, "a graph is of the current device"
        assert capture_error_mode == "thread_local", "the loader's thread pins memory"
        made.append(recorded)
        state = torch.get_rng_state()
        with recorded:
            yield
        torch.set_rng_state(state)
        for tensor, value in recorded.former:
            tensor.detach().copy_(value)

    def stream():
        assert current, "a stream is of the current device"
        return SimpleNamespace(wait_stream=lambda other: None)

    for name, stand_in in (
        ("device", device),
        ("graph", graph),
        ("CUDAGraph", Recorded),
        ("Stream", stream),
        ("current_stream", stream),
        ("stream", contextlib.nullcontext),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


def train(config: PretrainConfig) -> None:
    """What `pretrain` does once it has refused what cannot be captured."""
    device = torch.device("cpu")
    with isolated(device):
        Run(config, open_dataset(config, config.out), Ranks(device), None).train()


def test_a_captured_step_is_the_step(data, tmp_path, monkeypatch, graphs):
    """Its inputs are copied to where the capture read them, and gradients are where the optimizer finds them."""
    monkeypatch.setattr(pretrain_module.models, "build", build_tiny)
    for name, captured in (("plain", False), ("captured", True)):
        (tmp_path / name).mkdir()
        train(tiny_config(data, tmp_path / name, cuda_graph=captured))
    assert len(graphs) == 1
    records = [read_log(tmp_path / name / "log.jsonl") for name in ("plain", "captured")]
    assert len(records[0]) == STEPS
    for plain, captured in zip(*records, strict=True):
        assert {**plain, "shapes_per_second": 0} == {**captured, "shapes_per_second": 0}
    states = [load_state(tmp_path / name / "state.pt").model for name in ("plain", "captured")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_waits_is_seen(graphs):
    step = capture.CapturedStep(lambda x: x * float(x.sum()), nn.Identity())
    with pytest.raises(AssertionError, match=r"aten\._local_scalar_dense\.default waits for the device"):
        step(torch.ones(2, 3))


def test_a_profile_names_the_replays(data, tmp_path, monkeypatch, graphs):
    monkeypatch.setattr(pretrain_module.models, "build", build_tiny)
    config = ProfileConfig(**vars(tiny_config(data, tmp_path, cuda_graph=True)) | {"steps": 2, "warm_up": 1})
    device = torch.device("cpu")
    with isolated(device):
        run = Run(config, open_dataset(config, config.out), Ranks(device), None)
        found = _take_steps(run, config, tmp_path)
    assert list(found["parts"]) == ["wait for data", "augment", "forward and backward", "optimizer"]


def test_other_shapes_are_refused(graphs):
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pretraining_on_cuda_is_captured(data, tmp_path, monkeypatch):
    """Beside a loader's thread that pins memory; dropout draws what a plain run draws, from the first step on."""
    monkeypatch.setattr(pretrain_module.models, "build", build_tiny)
    for name, captured in (("plain", False), ("captured", True)):
        pretrain(tiny_config(data, tmp_path / name, device="cuda", workers=1, cuda_graph=captured))
    plain, captured = (read_log(tmp_path / name / "log.jsonl") for name in ("plain", "captured"))
    for one, other in zip(plain, captured, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
