"""Minimal models of the structures that DGCNN code has: the names and shapes of theirs, written anew."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crosspoint.interop import CannotFuse, dgcnn, fuse

K = 6


def plain_knn(x, k):
    points = x.transpose(1, 2)
    return (points[:, :, None] - points[:, None]).square().sum(-1).argsort(dim=-1, stable=True)[..., :k]


def plain_feature(x, k, idx=None, dim9=False):
    idx = plain_knn(x[:, 6:] if dim9 else x, k) if idx is None else idx
    b, c, n = x.shape
    near = x[:, :, None].expand(b, c, n, n).gather(3, idx[:, None].expand(b, c, n, k))  # (B, C, N, k)
    centre = x[..., None].expand_as(near)
    return torch.cat([near - centre, centre], dim=1)


def block(conv, norm, c_in, c_out, act=None):
    return nn.Sequential(conv(c_in, c_out, kernel_size=1, bias=False), norm(c_out), act or nn.LeakyReLU(0.2))


class Encoder(nn.Module):
    """The backbone all three share; norms are known by two names."""

    widths = (8, 8, 12, 16)

    def __init__(self, k=K, emb_dims=24):
        super().__init__()
        self.k = k
        last = 3
        for i, width in enumerate(self.widths, 1):
            setattr(self, f"conv{i}", block(nn.Conv2d, nn.BatchNorm2d, 2 * last, width))
            setattr(self, f"bn{i}", getattr(self, f"conv{i}")[1])
            last = width
        self.conv5 = block(nn.Conv1d, nn.BatchNorm1d, sum(self.widths), emb_dims)
        self.bn5 = self.conv5[1]

    def edges(self, x):
        return plain_feature(x, self.k)

    def pool(self, x):
        return x.max(dim=-1).values

    def feature(self, x):
        stages = []
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.pool(conv(self.edges(x)))
            stages.append(x)
        x = self.conv5(torch.cat(stages, dim=1))
        return torch.cat([x.amax(2), x.mean(2)], dim=1)


class Classifier(Encoder):
    """antao97's DGCNN_cls, which is also the original's DGCNN."""

    def __init__(self, k=K, emb_dims=24, classes=5):
        super().__init__(k, emb_dims)
        self.linear1 = nn.Linear(2 * emb_dims, 16, bias=False)
        self.bn6 = nn.BatchNorm1d(16)
        self.dp1 = nn.Dropout(0.5)
        self.linear2 = nn.Linear(16, 8)
        self.bn7 = nn.BatchNorm1d(8)
        self.dp2 = nn.Dropout(0.5)
        self.linear3 = nn.Linear(8, classes)

    def classify(self, x):
        x = self.dp1(F.leaky_relu(self.bn6(self.linear1(x)), 0.2))
        return self.linear3(self.dp2(F.leaky_relu(self.bn7(self.linear2(x)), 0.2)))

    def forward(self, x):
        return self.classify(self.feature(x))


class CrossPointEncoder(Encoder):
    """CrossPoint's DGCNN: returns (feature, projection, feature)."""

    def __init__(self, k=K, emb_dims=24):
        super().__init__(k, emb_dims)
        self.cls = -1
        self.inv_head = nn.Sequential(
            nn.Linear(2 * emb_dims, emb_dims),
            nn.BatchNorm1d(emb_dims),
            nn.ReLU(inplace=True),
            nn.Linear(emb_dims, 10),
        )

    def forward(self, x):
        feature = self.feature(x)
        return feature, self.inv_head(feature), feature


class CrossPointClassifier(Classifier):
    """CrossPoint's DGCNN with its classifier: (logits, projection, feature)."""

    def __init__(self):
        super().__init__()
        self.cls = 5
        self.inv_head = nn.Sequential(
            nn.Linear(48, 24), nn.BatchNorm1d(24), nn.ReLU(inplace=True), nn.Linear(24, 10)
        )

    def forward(self, x):
        feature = self.feature(x)
        return self.classify(feature), self.inv_head(feature), feature


class PartSegmentation(nn.Module):
    """The edge blocks of DGCNN_partseg: two layers, two layers, one layer."""

    def __init__(self):
        super().__init__()
        self.k = K
        widths = ((6, 8), (8, 8), (16, 8), (8, 8), (16, 8))
        for i, (c_in, c_out) in enumerate(widths, 1):
            setattr(self, f"conv{i}", block(nn.Conv2d, nn.BatchNorm2d, c_in, c_out))

    def forward(self, x, last):
        x1 = self.conv2(self.conv1(plain_feature(x, self.k))).amax(3)
        x2 = self.conv4(self.conv3(plain_feature(x1, self.k))).amax(3)
        return torch.cat([x1, x2, last(self.conv5, x2, self.k)], dim=1)


STRUCTURES = [Classifier, CrossPointEncoder, CrossPointClassifier]


def prepared(structure, **options):
    torch.manual_seed(0)
    model = structure(**options)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.dim() == 1:  # norms and biases, away from their first values
                value.add_(0.3 * torch.rand_like(value))
    return model.double()


def step(model, x, seed):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)  # of dropout
    out = model(x)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((o * torch.arange(o.numel()).view_as(o).sin()).sum() for o in out)
    used = [p for p in model.parameters() if p.requires_grad]
    return out, torch.autograd.grad(loss, [x, *used])


def assert_same(ours, other, x, steps=("train", "train", "eval")):
    for seed, mode in enumerate(steps):
        for model in (ours, other):
            model.train(mode == "train")
        (out, grads), (want, want_grads) = step(ours, x, seed), step(other, x, seed)
        for a, b in zip(out, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        for a, b in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
        for (name, a), (_, b) in zip(ours.named_buffers(), other.named_buffers(), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture
def clouds():
    torch.manual_seed(1)
    return torch.randn(4, 3, 40, dtype=torch.float64)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fused_model_is_the_model(structure, clouds):
    model = prepared(structure)
    other = copy.deepcopy(model)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert fused is model and isinstance(fused, structure) and fuse(fused) is fused
    assert list(fused.state_dict()) == keys
    assert all(value is parameters[name] for name, value in fused.named_parameters())
    for name, value in fused.state_dict().items():  # the comparison left nothing behind
        assert torch.equal(value, before[name])
    assert_same(fused, other, clouds)


def test_it_is_fused(clouds):
    """No tensor with an edge axis and a channel axis, nor N x N, in a training step."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return out

    sizes = []
    for make in (lambda m: m, fuse):
        model = make(prepared(Classifier))
        with Largest() as largest:
            step(model, clouds, 0)
        sizes.append(largest.size)
    plain, fused = sizes
    assert plain >= 4 * 16 * 40 * K and fused <= 4 * sum(Encoder.widths) * 40


def test_options_of_blocks(clouds):
    """ReLU, no norm affine, frozen norms, cumulative averages, biases: all as the block does it."""
    model = prepared(CrossPointEncoder)
    model.conv1[2] = nn.ReLU()
    model.conv2[1] = nn.BatchNorm2d(8, affine=False).double()
    model.conv3[1] = nn.BatchNorm2d(12, momentum=None).double()
    model.conv4[0] = nn.Conv2d(24, 16, 1).double()
    del model.bn2, model.bn3
    other = copy.deepcopy(model)
    fuse(model)
    assert_same(model, other, clouds)
    for m in (model, other):
        m.train()
        m.conv1[1].eval()
        m.conv1.requires_grad_(False)
    (a, ga), (b, gb) = step(model, clouds, 0), step(other, clouds, 0)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ga, gb, rtol=1e-7, atol=1e-8)


def test_real_sizes_in_float32():
    class Wide(Classifier):
        widths = (64, 64, 128, 256)

    model = prepared(Wide, k=20, emb_dims=128)
    x = torch.randn(2, 3, 128)
    model.eval()
    want = model(x.double())
    torch.testing.assert_close(fuse(model).float()(x).double(), want, rtol=0, atol=2e-4)


def test_copies_pickles_and_weights_go_on_working(clouds):
    model = fuse(prepared(Classifier)).eval()
    want = model(clouds)
    copied = copy.deepcopy(model)
    assert type(copied) is type(model) and copied.conv1 is not model.conv1
    assert torch.equal(copied(clouds), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and torch.equal(other(clouds), want)
    replica = model._replicate_for_data_parallel()
    assert replica is not model and torch.equal(replica(clouds), want)
    fresh = prepared(Classifier).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(clouds), want)


def test_trains_with_an_optimiser_made_before(clouds):
    model = prepared(Classifier)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    before = model.conv1[0].weight.clone()
    fuse(model)(clouds).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model.conv1[0].weight, before)


def test_compiles(clouds):
    model = fuse(prepared(Classifier)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(clouds), model(clouds))


class SwappedEdges(Classifier):
    def edges(self, x):
        first, second = plain_feature(x, self.k).chunk(2, dim=1)
        return torch.cat([second, first], dim=1)


class MeanPooled(Classifier):
    def pool(self, x):
        return x.mean(-1)


class AnotherK(CrossPointEncoder):
    def edges(self, x):
        return plain_feature(x, self.k + 1)


class OneOutput(CrossPointEncoder):
    def forward(self, x):
        return super().forward(x)[1]


class Detached(Classifier):
    def edges(self, x):
        return plain_feature(x, self.k).detach()


class Elsewhere(Classifier):
    def edges(self, x):
        raise RuntimeError("Torch not compiled with CUDA enabled")


@pytest.mark.parametrize(
    ("structure", "says"),
    [
        (SwappedEdges, "output 0 .* computes something else"),
        (MeanPooled, "computes something else"),
        (AnotherK, "computes something else"),
        (OneOutput, "gives .*output 1, output 2"),
        (Detached, "gives gradient of the input"),
        (Elsewhere, "does not run on cpu.*Torch not compiled with CUDA.*get_graph_feature.*verify=False"),
    ],
)
def test_refuses_models_that_compute_something_else(structure, says):
    model = prepared(structure)
    with pytest.raises(CannotFuse, match=says):
        fuse(model)
    assert type(model) is structure


def test_unverified_on_request(clouds):
    model = fuse(prepared(Elsewhere), verify=False).eval()
    want = Classifier.forward(copy.deepcopy(prepared(Classifier)).eval(), clouds)
    torch.testing.assert_close(model(clouds), want)


def changed(change):
    model = prepared(Classifier)
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (PartSegmentation(), "conv2 works on the edges of the block before it, as in DGCNN_partseg"),
        (nn.Linear(3, 3), "has no conv1, conv2, conv3, conv4, conv5"),
        (block(nn.Conv2d, nn.BatchNorm2d, 6, 8), "has no conv1"),
        (Encoder(), "neither a classifier"),
        (changed(lambda m: delattr(m, "k")), "no attribute k"),
        (changed(lambda m: delattr(m, "dp2")), "dp2 too many or missing"),
        (changed(lambda m: m.add_module("attention", nn.Linear(2, 2))), "attention"),
        (changed(lambda m: m.conv3.append(nn.Dropout())), "conv3: .*Dropout on edges"),
        (changed(lambda m: m.conv2[1].register_forward_hook(print)), "conv2: .*hooks"),
        (changed(lambda m: setattr(m, "conv1", nn.Linear(6, 8))), "conv1: Linear does not begin with Conv2d"),
        (changed(lambda m: setattr(m.conv1[0], "stride", (2, 2))), "not 1 x 1"),
        (changed(lambda m: setattr(m.conv1[0], "groups", 2)), "groups"),
        (
            changed(lambda m: m.conv3.__setitem__(0, nn.Conv2d(18, 12, 1))),
            r"conv3 takes 18 channels, not 2 \* 8",
        ),
        (changed(lambda m: m.conv5.__setitem__(0, nn.Conv1d(43, 24, 1))), "Conv1d on 44 channels"),
        (nn.SyncBatchNorm.convert_sync_batchnorm(Classifier()), "SyncBatchNorm"),
    ],
)
def test_refuses_other_structures(model, says):
    with pytest.raises(CannotFuse, match=says):
        fuse(model)


def test_looks_again_after_a_model_was_changed(clouds):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(prepared(Classifier)))
    with pytest.raises(CannotFuse, match="SyncBatchNorm"):
        model(clouds)


def test_last_block_of_part_segmentation_alone(clouds):
    model = prepared(PartSegmentation)
    other = copy.deepcopy(model)
    ours = model(clouds, dgcnn.fused_edge_conv)
    want = other(clouds, lambda conv, x, k: conv(plain_feature(x, k)).amax(3))
    torch.testing.assert_close(ours, want)
    for out in (ours, want):
        out.sin().sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_block_without_norm_on_a_given_graph(clouds):
    conv, idx = nn.Conv2d(6, 5, 1).double(), plain_knn(clouds, 4)
    torch.testing.assert_close(
        dgcnn.fused_edge_conv(conv, clouds, 4, idx), conv(plain_feature(clouds, 4, idx)).amax(3)
    )
    with pytest.raises(ValueError, match=r"6 channels, but edges have 2 \* 5"):
        dgcnn.fused_edge_conv(conv, torch.randn(2, 5, 9).double(), 4)


@pytest.mark.parametrize("dim9", [False, True])
def test_graph_feature(dim9):
    x = torch.randn(2, 9, 15, dtype=torch.float64, requires_grad=True)
    ours, want = dgcnn.get_graph_feature(x, 4, dim9=dim9), plain_feature(x, 4, dim9=dim9)
    assert ours.shape == (2, 18, 15, 4) and torch.equal(ours, want)
    g = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(ours, x, g), torch.autograd.grad(want, x, g))
    idx = torch.randint(0, 15, (2, 15, 4))
    assert torch.equal(dgcnn.get_graph_feature(x, 4, idx), plain_feature(x, 4, idx))
    assert torch.equal(dgcnn.get_graph_feature(x[..., None], 4, idx), plain_feature(x, 4, idx))
    assert torch.equal(dgcnn.knn(x, 4), plain_knn(x, 4)) and dgcnn.knn(x, 4).dtype == torch.int64


def test_half_one_point_and_no_clouds():
    x = torch.randn(2, 3, 9).half()
    assert dgcnn.get_graph_feature(x, 3).dtype == torch.float16
    one = dgcnn.get_graph_feature(torch.ones(1, 3, 1), 1)
    assert one.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert dgcnn.get_graph_feature(torch.randn(0, 3, 9), 3).shape == (0, 6, 9, 3)
    conv = block(nn.Conv2d, nn.BatchNorm2d, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert dgcnn.fused_edge_conv(conv, torch.randn(2, 3, 9), 3).dtype == torch.bfloat16
    assert dgcnn.fused_edge_conv(conv.half(), x, 3).shape == (2, 8, 9)


def test_feature_of_many_points_holds_no_square():
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    with Sizes() as sizes:
        dgcnn.get_graph_feature(torch.randn(1, 3, 3000), 4)
    assert sizes.largest == 6 * 3000 * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 10}, "k = 10 neighbours of clouds with 9 points"),
        ({"x": torch.randn(3, 9)}, r"must be \(B, C, N\)"),
        ({"idx": torch.zeros(2, 9, 5, dtype=torch.int64)}, "k is an argument of its own"),
        ({"idx": torch.zeros(2, 9, 4)}, "int64"),
    ],
)
def test_bad_features(options, says):
    with pytest.raises(ValueError, match=says):
        dgcnn.get_graph_feature(**{"x": torch.randn(2, 3, 9), "k": 4, **options})
