import copy

import pytest
import torch
from torch import nn

from crosspoint.nn import DynamicEdgeConv, EdgeConv, EdgeConv2, NTXentLoss, SupConLoss
from crosspoint.ops import knn_graph, nt_xent, sup_con

B, N, K, C_IN, C_OUT = 3, 12, 5, 4, 7


class PlainEdgeConv(nn.Module):
    """Conv2d, BatchNorm2d, LeakyReLU and maximum over stored edges."""

    def __init__(self, module: EdgeConv, **bn):
        super().__init__()
        self.conv = nn.Conv2d(2 * module.in_channels, module.out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(module.out_channels, **bn)
        self.act = nn.LeakyReLU(module.negative_slope)
        self.double()
        self.conv.weight.data.copy_(module.weight.data[:, :, None, None])
        self.bn.load_state_dict(module.bn.state_dict())

    def forward(self, x, idx):
        cloud = torch.arange(len(x)).view(-1, 1, 1)
        centre = x[:, :, None].expand(*idx.shape, x.shape[2])
        edges = torch.cat([x[cloud, idx] - centre, centre], dim=3).permute(0, 3, 1, 2)
        return self.act(self.bn(self.conv(edges))).amax(dim=3).transpose(1, 2)


def _inputs(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(B, N, C_IN, dtype=torch.float64, requires_grad=True)
    return x, knn_graph(x.detach(), K)


def _pair(**bn):
    torch.manual_seed(1)
    module = EdgeConv(C_IN, C_OUT, **bn).double()
    with torch.no_grad():
        module.bn.weight.uniform_(-1, 1)
        module.bn.bias.uniform_(-1, 1)
        if module.bn.running_mean is not None:
            module.bn.running_mean.normal_()
            module.bn.running_var.uniform_(0.5, 2)
    return module, PlainEdgeConv(module, **bn)


def _assert_same(module, plain, seed=0):
    """Outputs, gradients and buffers after one step on the same input."""
    x, idx = _inputs(seed)
    torch.manual_seed(2)
    g = torch.randn(B, N, C_OUT, dtype=torch.float64)
    y, z = module(x, idx), plain(x, idx)
    torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-12)
    module.zero_grad()
    plain.zero_grad()
    dx = torch.autograd.grad(y, [x, *module.parameters()], g)
    dz = torch.autograd.grad(z, [x, *plain.parameters()], g)
    for a, b in zip(dx, dz, strict=True):
        torch.testing.assert_close(a, b.view_as(a), rtol=1e-9, atol=1e-11)
    for (name, a), (_, b) in zip(module.bn.named_buffers(), plain.bn.named_buffers(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("bn", [{}, {"momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}])
def test_edge_conv_is_conv_norm_act_max(bn):
    module, plain = _pair(**bn)
    for step in range(3):
        _assert_same(module, plain, seed=step)
    module.eval()
    plain.eval()
    _assert_same(module, plain, seed=5)


def test_edge_conv_counts_batches():
    module, _ = _pair()
    x, idx = _inputs()
    module(x, idx)
    module(x, idx)
    assert module.bn.num_batches_tracked == 2
    module.eval()(x, idx)
    assert module.bn.num_batches_tracked == 2


def test_frozen_norm_uses_running_statistics_while_training():
    module, plain = _pair()
    module.bn.eval()
    plain.bn.eval()
    before = copy.deepcopy(module.bn.state_dict())
    _assert_same(module, plain)
    assert all(torch.equal(value, before[name]) for name, value in module.bn.state_dict().items())


def test_statistics_stop_where_tracking_is_switched_off_later():
    module, plain = _pair()
    module.bn.track_running_stats = plain.bn.track_running_stats = False
    _assert_same(module, plain)
    assert module.bn.num_batches_tracked == 0


def test_edge_conv_starts_as_conv2d_does():
    torch.manual_seed(3)
    ours = EdgeConv(C_IN, C_OUT)
    torch.manual_seed(3)
    theirs = nn.Conv2d(2 * C_IN, C_OUT, 1, bias=False)
    assert torch.equal(ours.weight, theirs.weight.flatten(1))
    assert torch.equal(ours.bn.weight, torch.ones(C_OUT)) and torch.equal(ours.bn.bias, torch.zeros(C_OUT))


def test_edge_conv_leaves_missing_edges_out():
    module, _ = _pair()
    x, idx = _inputs()
    missing = idx.clone()
    missing[:, :, 3:] = -1
    torch.testing.assert_close(module(x, missing), module(x, idx[:, :, :3]), rtol=1e-12, atol=1e-12)


def test_edge_conv_names_itself():
    assert repr(EdgeConv(3, 64)).startswith("EdgeConv(\n  3, 64, negative_slope=0.2, impl='auto'")
    assert "k=15" in repr(DynamicEdgeConv(3, 64, 15))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EdgeConv(0, 4), "channels must be positive"),
        (lambda: EdgeConv(4, 4, negative_slope=-0.1), "negative_slope must be >= 0, got -0.1"),
        (lambda: EdgeConv(4, 4, negative_slope=float("nan")), "negative_slope must be >= 0"),
        (lambda: EdgeConv2(4, 0, 4), "channels must be positive, got in 4, mid 0, out 4"),
        (lambda: EdgeConv2(4, 4, 4, negative_slope=-0.1), "negative_slope must be >= 0, got -0.1"),
        (lambda: DynamicEdgeConv(4, 4, 0), "k must be positive, got 0"),
        (lambda: NTXentLoss(0.0), "temperature must be positive, got 0.0"),
        (lambda: SupConLoss(-1), "temperature must be positive, got -1"),
        (lambda: NTXentLoss(torch.ones(2)), r"one element, got a tensor of shape \(2,\)"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_dynamic_edge_conv_builds_the_graph_of_its_input():
    torch.manual_seed(4)
    module = DynamicEdgeConv(C_IN, C_OUT, K)
    static = EdgeConv(C_IN, C_OUT)
    static.load_state_dict(module.state_dict())
    x = torch.randn(B, N, C_IN)
    lengths = torch.tensor([N, 4, 0])
    torch.testing.assert_close(module(x), static(x, knn_graph(x, K)))
    y = module(x, lengths)
    torch.testing.assert_close(y, static(x, knn_graph(x, K, lengths=lengths)))
    assert not y[1, 4:].any() and not y[2].any() and y[1, :4].any()


class PlainEdgeConv2(nn.Module):
    """Twice Conv2d, BatchNorm2d and LeakyReLU on stored edges, then the maximum."""

    def __init__(self, module: EdgeConv2, **bn):
        super().__init__()
        self.conv1 = nn.Conv2d(2 * module.in_channels, module.mid_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(module.mid_channels, **bn)
        self.conv2 = nn.Conv2d(module.mid_channels, module.out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(module.out_channels, **bn)
        self.act = nn.LeakyReLU(module.negative_slope)
        self.double()
        state = {name.replace("weight1", "conv1.weight").replace("weight2", "conv2.weight"): value
                 for name, value in module.state_dict().items()}  # fmt: skip
        self.load_state_dict({n: v[..., None, None] if "conv" in n else v for n, v in state.items()})

    def forward(self, x, idx):
        cloud = torch.arange(len(x)).view(-1, 1, 1)
        centre = x[:, :, None].expand(*idx.shape, x.shape[2])
        edges = torch.cat([x[cloud, idx] - centre, centre], dim=3).permute(0, 3, 1, 2)
        h = self.act(self.bn1(self.conv1(edges)))
        return self.act(self.bn2(self.conv2(h))).amax(dim=3).transpose(1, 2)


@pytest.mark.parametrize("bn", [{}, {"momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}])
def test_edge_conv2_is_two_layers_and_a_maximum(bn):
    torch.manual_seed(7)
    module = EdgeConv2(C_IN, 6, C_OUT, **bn).double()
    with torch.no_grad():
        for norm in (module.bn1, module.bn2):
            norm.weight.uniform_(-1, 1)
            norm.bias.uniform_(-1, 1)
    plain = PlainEdgeConv2(module, **bn)
    parameters = [module.weight1, *module.bn1.parameters(), module.weight2, *module.bn2.parameters()]
    for step in range(4):
        if step == 3:
            module.eval()
            plain.eval()
        x, idx = _inputs(step)
        g = torch.randn(B, N, C_OUT, dtype=torch.float64)
        y, z = module(x, idx), plain(x, idx)
        torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-12)
        dy, dz = (
            torch.autograd.grad(y, [x, *parameters], g),
            torch.autograd.grad(z, [x, *plain.parameters()], g),
        )
        for a, b in zip(dy, dz, strict=True):
            torch.testing.assert_close(a, b.view_as(a), rtol=1e-9, atol=1e-11)
        for name, value in module.named_buffers():
            torch.testing.assert_close(value, plain.get_buffer(name), rtol=1e-10, atol=1e-12)


def test_edge_conv2_refuses_norms_in_two_modes():
    module = EdgeConv2(C_IN, 6, C_OUT).double()
    module.bn2.eval()
    with pytest.raises(ValueError, match="bn1 and bn2 must agree in training, got True and False"):
        module(*_inputs())
    module.eval()
    module(*_inputs())
    assert repr(module).startswith("EdgeConv2(\n  4, 6, 7, negative_slope=0.2, impl='auto'")


def test_nt_xent_loss_is_the_operator():
    torch.manual_seed(5)
    z1, z2 = torch.randn(2, 6, 8)
    assert torch.equal(NTXentLoss(0.3)(z1, z2), nt_xent(z1, z2, 0.3))
    assert NTXentLoss().temperature == 0.1
    assert repr(NTXentLoss()) == "NTXentLoss(temperature=0.1, impl='auto')"


def test_sup_con_loss_is_the_operator():
    torch.manual_seed(5)
    z, labels = torch.randn(6, 8), torch.tensor([0, 1, 1, 0, 2, 1])
    assert torch.equal(SupConLoss(0.3)(z, labels), sup_con(z, labels, 0.3))
    assert SupConLoss().temperature == 0.1
    learned = SupConLoss(nn.Parameter(torch.tensor(0.2)))
    learned(z, labels).backward()
    assert learned.temperature.grad.abs() > 0
    assert repr(learned) == "SupConLoss(temperature=learned, impl='auto')"


def test_nt_xent_loss_trains_a_parameter_and_keeps_a_tensor():
    torch.manual_seed(6)
    z1, z2 = torch.randn(2, 6, 8)
    learned = NTXentLoss(nn.Parameter(torch.tensor(0.2)))
    learned(z1, z2).backward()
    assert learned.temperature.grad.abs() > 0
    kept = NTXentLoss(torch.tensor(0.2))
    assert [*kept.state_dict()] == ["temperature"] and not [*kept.parameters()]
