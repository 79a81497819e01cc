import pytest
import torch
from torch import nn

from benchmarks.plain_segmentation import PlainPartSegmentation
from crosspoint.models import DGCNNPart, DGCNNSemantic, export_official
from crosspoint.models.official import _read

K, PARTS = 5, 7


def _count(module):
    return sum(p.numel() for p in module.parameters())


def _stir(model):
    """Every norm away from its start, no dropout."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_(std=0.3)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
    return model.double()


def _pair(tmp_path, parts, **options):
    """A fused model and the plain one with its weights, which travel through the official layout."""
    torch.manual_seed(0)
    fused = _stir(DGCNNPart(K, num_parts=parts, **options))
    nn.init.normal_(fused.transform_net.transform.weight, std=0.1)
    plain = PlainPartSegmentation(K, parts).double()
    plain.load_state_dict(_read(export_official(tmp_path / "weights.pth", fused)), strict=True)
    return fused, plain


def _close(a, b, what):
    error, scale = float((a - b).detach().abs().max()), float(b.detach().abs().max())
    assert error <= 1e-9 * scale + 1e-15, f"{what}: error {error:.3g} at scale {scale:.3g}"


def test_parameter_counts():
    assert _count(DGCNNPart()) == 2_339_593
    assert _count(DGCNNPart(projection_dim=None)) == 1_025_545
    assert _count(DGCNNPart(num_parts=50)) == 2_774_409


@pytest.mark.parametrize("training", [True, False])
def test_part_segmentation_equals_plain_layers(tmp_path, training):
    fused, plain = _pair(tmp_path, PARTS)
    fused.train(training)
    plain.train(training)
    points, categories = torch.randn(3, 24, 3).double(), torch.tensor([3, 0, 15])
    graphs = fused(points, return_graphs=True)[1] if not training else None
    if training:  # statistics move with every call: graphs come from a copy
        graphs = _pair(tmp_path, PARTS)[0](points, return_graphs=True)[1]
    x, y = points.clone().requires_grad_(), points.clone().requires_grad_()
    logits, expected = fused.segment(x, categories, graphs=graphs), plain(y, categories, graphs)
    assert logits.shape == (3, 24, PARTS)
    _close(logits, expected.transpose(1, 2), "logits")
    g = torch.randn_like(logits)
    (logits * g).sum().backward()
    (expected * g.transpose(1, 2)).sum().backward()
    _close(x.grad, y.grad, "gradient of the points")
    _close(fused.head.layer.weight.grad, plain.conv8[0].weight.grad[:, :, 0], "gradient of the head")
    _close(
        fused.transform_net.conv1.weight1.grad,
        plain.transform_net.conv1[0].weight.grad.flatten(1),
        "gradient of the T-Net",
    )
    _close(fused.transform_net.conv1.bn1.running_var, plain.transform_net.bn1.running_var, "statistics")


def test_feature_and_projection_equal_plain_layers(tmp_path):
    fused, plain = (model.eval() for model in _pair(tmp_path, None))
    points = torch.randn(2, 24, 3).double()
    feature, graphs = fused(points, return_graphs=True)
    assert feature.shape == (2, fused.feature_dim) and len(graphs) == 4
    _close(feature, plain.encode(points), "feature on the plain model's own graphs")
    _close(fused.projection(feature), plain.inv_head(plain.encode(points)), "projection")


@pytest.mark.parametrize("training", [True, False])
def test_padding_reaches_nothing(tmp_path, training):
    fused = _pair(tmp_path, PARTS)[0].train(training)
    alone = _pair(tmp_path, PARTS)[0].train(training)
    clouds, categories = torch.randn(2, 20, 3).double(), torch.tensor([1, 2])
    padded = torch.full((2, 26, 3), float("nan")).double()
    padded[:, :20] = clouds
    padded.requires_grad_()
    clouds.requires_grad_()
    a = fused.segment(padded, categories, torch.tensor([20, 20]))[:, :20]
    b = alone.segment(clouds, categories)
    _close(a, b, "logits")
    g = torch.randn_like(b)
    (a * g).sum().backward()
    (b * g).sum().backward()
    _close(padded.grad[:, :20], clouds.grad, "gradient")
    assert not padded.grad[:, 20:].any()
    for (name, p), q in zip(fused.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            # a bias in front of a norm has gradient 0, and noise in place of it
            _close(p.grad + 1e-9 * b.abs().max(), q.grad + 1e-9 * b.abs().max(), name)


def test_transform_starts_as_identity():
    model = DGCNNPart(K)
    points = torch.randn(2, 12, 3)
    matrix = model.transform_net(points, torch.randint(12, (2, 12, K)))
    assert torch.equal(matrix, torch.eye(3).expand(2, 3, 3))


def test_every_parameter_is_used():
    """So that DDP needs no flag."""
    part, semantic = (
        DGCNNPart(K, num_parts=PARTS, projection_dim=None),
        DGCNNSemantic(K, num_classes=13, projection_dim=None),
    )
    part.segment(torch.randn(2, 16, 3), torch.tensor([0, 1])).sum().backward()
    semantic.segment(torch.randn(2, 16, 9)).sum().backward()
    encoder = DGCNNPart(K)
    encoder.projection(encoder(torch.randn(2, 16, 3))).sum().backward()
    for model in (part, semantic, encoder):
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_semantic_segmentation_equals_plain_layers():
    from benchmarks.plain import edge_features, nearest

    torch.manual_seed(0)
    model = _stir(DGCNNSemantic(K, num_classes=13)).eval()
    points = torch.randn(2, 20, 9).double()
    logits = model.segment(points)
    assert logits.shape == (2, 20, 13)

    def layer(h, weight, bn):  # (B, C, N, ...)
        h = torch.einsum("oc,bc...->bo...", weight, h)
        h = nn.functional.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return nn.functional.leaky_relu(h, 0.2)

    x, stages = points.transpose(1, 2), []
    for i, conv in enumerate((model.conv1, model.conv2, model.conv3)):
        edges = edge_features(x, nearest(x[:, 6:] if i == 0 else x, K))
        if i < 2:
            h = layer(layer(edges, conv.weight1, conv.bn1), conv.weight2, conv.bn2)
        else:
            h = layer(edges, conv.weight, conv.bn)
        x = h.amax(3)
        stages.append(x)
    local = torch.cat(stages, 1)
    feature = layer(local, model.conv4.weight, model.conv4.bn).amax(2, keepdim=True)
    _close(model(points), feature[:, :, 0], "feature")
    h = torch.cat([feature.expand(-1, -1, 20), local], 1)
    for each in (model.head.layer, model.layer):
        h = layer(h, each.weight, each.bn)
    _close(logits, (model.classes.weight @ h).transpose(1, 2), "logits")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: DGCNNPart(0), "k must be positive, got 0"),
        (lambda: DGCNNPart(4).segment(torch.randn(1, 8, 3), torch.tensor([0])), "no segmentation head"),
        (lambda: DGCNNSemantic(4).segment(torch.randn(1, 8, 9)), "no segmentation head"),
        (lambda: DGCNNPart(4)(torch.randn(1, 8, 9)), r"points must be \(B, N, 3\)"),
        (lambda: DGCNNSemantic(4)(torch.randn(1, 8, 3)), r"points must be \(B, N, 9\)"),
        (lambda: DGCNNSemantic(4, in_channels=2), "in_channels must be at least 3"),
        (
            lambda: DGCNNPart(4, num_parts=3).segment(torch.randn(2, 8, 3), torch.tensor([0])),
            r"categories must be \(2,\) int64",
        ),
        (lambda: DGCNNPart(4)(torch.randn(2, 8, 3), graphs=[]), "4 neighbour lists, got 0"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()
