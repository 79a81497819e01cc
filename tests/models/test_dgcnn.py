import copy

import pytest
import torch
from torch import nn

from benchmarks.plain import PlainDGCNN, nearest, plain_state
from crosspoint.models import DGCNN

K = 6
# a bias in front of a training batch norm has gradient 0
_BEFORE_NORM = ("projection.0.bias", "classifier.4.bias")


def _count(module):
    return sum(p.numel() for p in module.parameters())


def _models(seed=0, **options):
    """A fused model with every parameter and statistic away from its start, and a plain one with the same."""
    torch.manual_seed(seed)
    fused = DGCNN(K, **options).double()
    with torch.no_grad():
        for module in fused.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_(std=0.3)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    options.pop("impl", None)
    plain = PlainDGCNN(K, **options).double()
    plain.load_state_dict(plain_state(fused.state_dict()))
    for model in (fused, plain):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return fused, plain


def _close(a, b, what):
    a, b = a.detach(), b.detach()
    scale = float(b.abs().max())
    error = float((a - b).abs().max())
    assert error <= 1e-9 * scale + 1e-15, f"{what}: error {error:.3g} at scale {scale:.3g}"


def _assert_equal_models(fused, plain):
    """Gradients and statistics."""
    gradients = plain_state({name: p.grad for name, p in fused.named_parameters()})
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    for name, p in plain.named_parameters():
        if name in _BEFORE_NORM and plain.training:
            assert max(float(g.abs().max()) for g in (gradients[name], p.grad)) <= 1e-12 * largest, name
        else:
            _close(gradients[name], p.grad, f"gradient of {name}")
    buffers = plain_state(dict(fused.named_buffers()))
    for name, value in plain.named_buffers():
        _close(buffers[name].double(), value.double(), name)


def test_parameter_counts():
    model = DGCNN()
    assert _count(model) - _count(model.projection) == 617_856
    assert _count(model) == 2_980_480
    assert _count(DGCNN(projection_dim=None)) == 617_856
    classifier = DGCNN(num_classes=40).classifier
    assert _count(classifier) == 2048 * 512 + 1024 + 512 * 256 + 256 + 512 + 256 * 40 + 40
    assert [type(layer).__name__ for layer in classifier] == [
        *("Linear", "BatchNorm1d", "LeakyReLU", "Dropout"),
        *("Linear", "BatchNorm1d", "LeakyReLU", "Dropout", "Linear"),
    ]
    assert classifier[2].negative_slope == 0.2 and classifier[3].p == 0.5


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_plain_model(training, impl):
    fused, plain = _models(num_classes=5, impl=impl)
    fused.train(training)
    plain.train(training)
    points = torch.randn(3, 30, 3, dtype=torch.float64)
    x, y = points.clone().requires_grad_(), points.clone().requires_grad_()

    feature, graphs = fused(x, return_graphs=True)
    expected = plain(y, graphs=graphs)
    assert feature.shape == (3, 2048)
    outputs = [
        torch.cat([m.projection(f), m.classifier(f)], dim=1) for m, f in ((fused, feature), (plain, expected))
    ]
    _close(feature, expected, "feature")
    _close(*outputs, "heads")
    g = torch.randn_like(outputs[0])
    for output in outputs:
        (output * g).sum().backward()
    _close(x.grad, y.grad, "gradient of the points")
    _assert_equal_models(fused, plain)
    assert fused.conv3.bn.num_batches_tracked == fused.bn5.num_batches_tracked == int(training)


def test_graphs_are_those_of_the_features():
    fused, plain = _models()
    points = torch.randn(2, 30, 3, dtype=torch.float64)
    with torch.no_grad():
        feature, graphs = fused.eval()(points, return_graphs=True)
        _close(feature, plain.eval()(points), "feature on the plain model's own graphs")
        assert torch.equal(fused(points, graphs=graphs), feature)
        x, other = points, []
        for conv, idx in zip((fused.conv1, fused.conv2, fused.conv3, fused.conv4), graphs, strict=True):
            assert torch.equal(idx[:, :, 0], torch.arange(30).expand(2, 30))
            assert torch.equal(idx.sort().values, nearest(x.transpose(1, 2), K).sort().values)
            other.append(idx.flip(1))
            x = conv(x, idx)
        assert not torch.allclose(fused(points, graphs=other), feature)


def _ragged_plain(plain, clouds, graphs):
    """The plain model's own layers over the points and edges that exist, one cloud after the other."""
    sizes = [len(cloud) for cloud in clouds]
    stages = []
    for i, layer in enumerate((plain.conv1, plain.conv2, plain.conv3, plain.conv4)):
        edges = []
        for b, x in enumerate(clouds):
            idx = graphs[i][b, : sizes[b]]
            idx = idx[:, : min(K, sizes[b])]
            assert (idx >= 0).all() and (graphs[i][b, sizes[b] :] == -1).all()
            centre = x[:, None].expand(*idx.shape, x.shape[1])
            edges.append(torch.cat([x[idx] - centre, centre], dim=2).flatten(0, 1))
        h = layer(torch.cat(edges).t()[None, :, :, None])[0, :, :, 0].t()  # (edges, C)
        h = h.split([len(e) for e in edges])
        clouds = [e.view(n, -1, e.shape[1]).amax(dim=1) for e, n in zip(h, sizes, strict=True)]
        stages.append(torch.cat(clouds))
    h = plain.conv5(torch.cat(stages, dim=1).t()[None])[0].t().split(sizes)
    return torch.stack([torch.cat([x.amax(dim=0), x.mean(dim=0)]) for x in h])


@pytest.mark.parametrize("training", [True, False])
def test_clouds_of_different_sizes(training):
    fused, plain = _models()
    fused.train(training)
    plain.train(training)
    sizes = [20, 9, 3, 14]  # one has fewer points than neighbours
    points = torch.full((4, 20, 3), float("nan"), dtype=torch.float64)
    clouds = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in sizes]
    for b, cloud in enumerate(clouds):
        points[b, : sizes[b]] = cloud.detach()
    points.requires_grad_()

    feature, graphs = fused(points, torch.tensor(sizes), return_graphs=True)
    expected = _ragged_plain(plain, clouds, graphs)
    _close(feature, expected, "feature")
    g = torch.randn(4, 256, dtype=torch.float64)
    for model, output in ((fused, feature), (plain, expected)):
        (model.projection(output) * g).sum().backward()
    for b, cloud in enumerate(clouds):
        _close(points.grad[b, : sizes[b]], cloud.grad, f"gradient of cloud {b}")
        assert not points.grad[b, sizes[b] :].any()
    _assert_equal_models(fused, plain)


def test_cloud_is_encoded_alone_as_in_a_padded_batch():
    fused, _ = _models()
    fused.eval()
    points = torch.randn(3, 15, 3, dtype=torch.float64)
    with torch.no_grad():
        batch = fused(points, torch.tensor([15, 7, 0]))
        _close(batch[0], fused(points[:1])[0], "whole cloud, batch of one")
        _close(batch[1], fused(points[1:2, :7])[0], "short cloud")
        _close(batch[0], fused(points[:1], torch.tensor([15]))[0], "full lengths")
    assert not batch[2].any()


@pytest.mark.parametrize("n", [1, 2, K])
def test_small_clouds(n):
    fused, _ = _models()
    feature = fused.eval()(torch.randn(1, n, 3, dtype=torch.float64))
    assert feature.shape == (1, 2048) and feature.isfinite().all()


def test_point_order_does_not_matter():
    fused, _ = _models()
    fused.eval()
    points = torch.randn(2, 25, 3, dtype=torch.float64)
    with torch.no_grad():
        _close(fused(points[:, torch.randperm(25)]), fused(points), "feature")


def test_every_parameter_gets_a_gradient():
    model = DGCNN(K)
    model.projection(model(torch.randn(3, 16, 3))).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_autocast():
    model = DGCNN(K)
    points = torch.randn(2, 16, 3)
    with torch.autocast("cpu", torch.bfloat16):
        feature = model(points)
    feature.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in _trained(model))


def _trained(model):
    return [p for name, p in model.named_parameters() if not name.startswith("projection")]


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    fused, _ = _models()
    points = torch.randn(2, 14, 3, dtype=torch.float64)
    graphs = fused(points, return_graphs=True)[1]
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x, y = points.clone().requires_grad_(), points.clone().requires_grad_()
    lengths = torch.tensor([14, 9])
    a, b = compiled(x, lengths, graphs=graphs), fused(y, lengths, graphs=graphs)
    _close(a, b, "feature")
    a.square().sum().backward()
    b.square().sum().backward()
    _close(x.grad, y.grad, "gradient of the points")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, x: m(x[0]), ValueError, r"points must be \(B, N, 3\) with N >= 1, got \(8, 3\)"),
        (lambda m, x: m(x.transpose(1, 2)), ValueError, r"got \(2, 3, 8\)"),
        (lambda m, x: m(x[:, :0]), ValueError, r"N >= 1, got \(2, 0, 3\)"),
        (lambda m, x: m(x, graphs=[torch.zeros(2, 8, 1).long()]), ValueError, "4 neighbour lists, got 1"),
        (lambda m, x: m(x, torch.tensor([8, 9])), (IndexError, ValueError), "9"),
        (lambda m, x: m(x, torch.tensor([8])), ValueError, "lengths"),
        (lambda m, x: DGCNN(0), ValueError, "k must be positive, got 0"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call(DGCNN(4), torch.randn(2, 8, 3))
