import pytest
import torch
from torch import nn

from benchmarks.plain import PlainDGCNN, plain_state
from benchmarks.plain_segmentation import PlainPartSegmentation
from crosspoint import models
from crosspoint.models import checkpoints
from crosspoint.models.official import ConvertConfig, convert


def _cls_file(path, *, prefix=""):
    """The 64 tensors of the authors' classification file, under their names, of a plain model."""
    torch.manual_seed(1)
    ours = models.DGCNN()
    plain = PlainDGCNN()
    state = {}
    for i in range(1, 6):
        layer = getattr(plain, f"conv{i}")
        nn.init.uniform_(layer[1].weight)
        layer[1].running_mean.normal_()
        state[f"conv{i}.0.weight"] = layer[0].weight.detach()
        for key, value in layer[1].state_dict().items():
            state[f"bn{i}.{key}"] = state[f"conv{i}.1.{key}"] = value
    state.update((f"inv_head.{key}", value) for key, value in plain.projection.state_dict().items())
    assert len(state) == 64 and ours.feature_dim == 2048
    torch.save({prefix + name: value for name, value in state.items()}, path)
    return plain, state


def _change(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_reads_the_classification_layout(tmp_path, prefix):
    plain, _ = _cls_file(tmp_path / "best.pth", prefix=prefix)
    model = models.load_official(tmp_path / "best.pth")
    assert isinstance(model, models.DGCNN) and model.k == 15
    found = plain_state(model.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(found[name], value), name
    assert models.load_official(tmp_path / "best.pth", k=20).k == 20


@pytest.mark.parametrize(("parts", "count", "k"), [(None, 137, 15), (50, 162, 40)])
def test_reads_the_part_segmentation_layout(tmp_path, parts, count, k):
    torch.manual_seed(2)
    plain = PlainPartSegmentation(k, parts)
    assert len(plain.state_dict()) == count
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
    torch.save(plain.state_dict(), tmp_path / "best.pth")
    model = models.load_official(tmp_path / "best.pth").eval()
    assert isinstance(model, models.DGCNNPart) and model.k == k and model.num_parts == parts
    points = torch.randn(2, 48, 3)
    feature, graphs = model(points, return_graphs=True)
    torch.testing.assert_close(feature, plain.eval().encode(points, graphs), rtol=1e-3, atol=1e-4)
    # the norm after linear1 and that of conv3 share a name there, and nothing else
    assert torch.equal(model.transform_net.conv2.bn.running_mean, plain.transform_net.conv3[1].running_mean)
    assert torch.equal(model.transform_net.bn1.running_mean, plain.transform_net.bn3.running_mean)


def test_a_pretraining_file_lacks_the_segmentation_head(tmp_path):
    """What the authors' fine-tuning script does: 21 tensors of the head are missing, and nothing else."""
    torch.save(PlainPartSegmentation(4, None).state_dict(), tmp_path / "pretrained.pth")
    state = models.load_official(tmp_path / "pretrained.pth").state_dict()
    model = models.DGCNNPart(num_parts=50)
    missing, unexpected = model.load_state_dict(state, strict=False)
    counters = [name for name in missing if name.endswith("num_batches_tracked")]
    assert not unexpected and len(missing) - len(counters) == 21
    assert all(name.startswith(("category.", "head.", "layers.", "parts.")) for name in missing)


@pytest.mark.parametrize("depth", [18, 50])
def test_reads_the_image_layout(tmp_path, depth):
    image = models.ResNet(depth)
    state = {
        name.replace("projection.", "inv_head.")
        if name.startswith("projection.")
        else f"resnet.{name}": value
        for name, value in image.state_dict().items()
    }
    torch.save(state, tmp_path / "img.pth")
    model = models.load_official(tmp_path / "img.pth")
    assert model.depth == depth
    for name, value in image.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.DGCNN(15),
        lambda: models.DGCNN(15, projection_dim=None),
        lambda: models.DGCNNPart(15),
        lambda: models.DGCNNPart(40, num_parts=50),
        lambda: models.ResNet(18),
    ],
)
def test_export_is_the_inverse(tmp_path, make):
    model = make()
    path = models.export_official(tmp_path / "new" / "weights.pth", model)
    state = models.load_official(path).state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_exported_classification_file_has_their_keys(tmp_path):
    _, state = _cls_file(tmp_path / "best.pth")
    path = models.export_official(tmp_path / "out.pth", models.load_official(tmp_path / "best.pth"))
    written = torch.load(path, weights_only=True)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda s: s.pop("conv3.0.weight"), ["1 missing: conv3.0.weight"]),
        (lambda s: s.pop("conv2.1.bias"), ["1 missing: conv2.1.bias"]),
        (lambda s: s.update(extra=torch.zeros(1)), ["1 unexpected: extra"]),
        (
            lambda s: s.update({"conv1.0.weight": torch.zeros(64, 6)}),
            [r"1 of another shape: conv1.0.weight \(\(64, 6\), expected \(64, 6, 1, 1\)\)"],
        ),
        (
            lambda s: s.update({"bn4.bias": torch.full((256,), 9.0)}),
            ["1 different under two names: bn4.bias and conv4.1.bias"],
        ),
        (lambda s: [s.pop(name) for name in list(s) if "conv5" in name], ["those of none of the authors'"]),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, change, texts):
    _cls_file(tmp_path / "best.pth")
    _change(tmp_path / "best.pth", change)
    for text in texts:
        with pytest.raises(ValueError, match=text):
            models.load_official(tmp_path / "best.pth")


def test_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        models.load_official(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="not a file of tensors"):
        models.load_official(tmp_path / "text.pth")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "dict.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        models.load_official(tmp_path / "dict.pth")
    with pytest.raises(TypeError, match="no PointNet"):
        models.export_official(tmp_path / "p.pth", models.PointNet())
    with pytest.raises(ValueError, match=r"no place for classifier\.0\.weight"):
        models.export_official(tmp_path / "c.pth", models.DGCNN(num_classes=3))


def test_convert_there_and_back(tmp_path):
    _, state = _cls_file(tmp_path / "best.pth")
    ours = convert(ConvertConfig(tmp_path / "best.pth", tmp_path / "ours.safetensors", k=18))
    encoder = models.from_pretrained(ours)
    assert encoder.k == 18 and checkpoints.load_encoder_config(ours).name == "dgcnn"
    back = convert(ConvertConfig(ours, tmp_path / "back.pth", to="official"))
    written = torch.load(back, weights_only=True)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_convert_of_a_run_writes_either_encoder(tmp_path):
    config = models.CrossPointConfig(k=4, image_encoder="resnet18")
    checkpoints.save_model(tmp_path / "weights.safetensors", models.build(config), config)
    points = convert(ConvertConfig(tmp_path, tmp_path / "points.pth", to="official"))
    images = convert(ConvertConfig(tmp_path, tmp_path / "images.pth", to="official", encoder="image"))
    assert isinstance(models.load_official(points), models.DGCNN)
    assert models.load_official(images).depth == 18
