import numpy as np
import pytest
import torch
from torch import nn

from crosspoint.evaluate.features import embed, turn_upright


class Encoder(nn.Module):
    """A stand-in with what can go wrong: dropout, batch statistics, a frozen part."""

    def __init__(self, width=16):
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.5)
        self.batch_sizes = []
        self.grad_modes = []

    def forward(self, points):
        self.batch_sizes.append(len(points))
        self.grad_modes.append(torch.is_grad_enabled())
        return self.dropout(self.norm(self.layer(points).amax(dim=1)))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder()


@pytest.fixture
def clouds():
    return np.random.default_rng(0).standard_normal((11, 32, 3)).astype(np.float32)


def test_embed_equals_a_direct_loop(encoder, clouds):
    features = embed(encoder, clouds, batch_size=4)
    assert encoder.batch_sizes == [4, 4, 3]
    assert encoder.grad_modes == [False] * 3
    encoder.eval()
    with torch.no_grad():
        expected = torch.cat([encoder(torch.from_numpy(cloud)[None]) for cloud in clouds]).numpy()
    assert features.shape == (11, 16)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-6, atol=1e-6)


def test_embed_keeps_every_training_flag_and_the_statistics(encoder, clouds):
    encoder.train()
    encoder.norm.eval()  # frozen by its owner
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    embed(encoder, clouds)
    assert encoder.training
    assert encoder.dropout.training
    assert not encoder.norm.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_embed_keeps_the_training_flags_after_an_error(encoder, clouds):
    encoder.train()
    encoder.layer = nn.Linear(5, 16)
    with pytest.raises(RuntimeError):
        embed(encoder, clouds)
    assert encoder.training
    assert encoder.norm.training


def test_embed_takes_half_and_double_clouds(encoder, clouds):
    expected = embed(encoder, clouds)
    np.testing.assert_array_equal(embed(encoder, clouds.astype(np.float64)), expected)
    rounded = clouds.astype(np.float16)
    np.testing.assert_array_equal(embed(encoder, rounded), embed(encoder, rounded.astype(np.float32)))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((4, 3), np.float32), r"\(n, N, 3\).*got \(4, 3\)"),
        (np.zeros((4, 8, 2), np.float32), r"got \(4, 8, 2\)"),
        (np.zeros((4, 8, 3), np.int64), "int64"),
        (np.zeros((0, 8, 3), np.float32), "no clouds"),
        (np.zeros((4, 0, 3), np.float32), "no clouds"),
    ],
)
def test_embed_refuses_other_shapes(encoder, points, message):
    with pytest.raises(ValueError, match=message):
        embed(encoder, points)


def test_embed_names_the_first_cloud_that_is_not_finite(encoder, clouds):
    clouds[[3, 7], 5, 1] = np.nan
    with pytest.raises(ValueError, match=r"2 of 11 are not finite.*coordinates of cloud 3"):
        embed(encoder, clouds)


def test_embed_names_features_that_are_not_finite(encoder, clouds):
    with torch.no_grad():
        encoder.layer.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"11 of 11 are not finite.*features of cloud 0.*diverged"):
        embed(encoder, clouds)


def test_embed_refuses_a_batch_size_below_one(encoder, clouds):
    with pytest.raises(ValueError, match="batch_size"):
        embed(encoder, clouds, batch_size=0)


def test_embed_refuses_an_encoder_that_returns_no_feature_per_cloud(clouds):
    class PerPoint(nn.Module):
        def forward(self, points):
            return points

    with pytest.raises(ValueError, match=r"must return \(11, feature_dim\), got \(11, 32, 3\)"):
        embed(PerPoint(), clouds)


@pytest.mark.parametrize(("up", "to"), [("y", "z"), ("z", "y")])
def test_turning_upright_is_a_rotation_that_moves_the_axis(up, to):
    axes = {"y": [0.0, 1.0, 0.0], "z": [0.0, 0.0, 1.0]}
    basis = np.eye(3, dtype=np.float32)
    turned = turn_upright(basis[None], up, to)[0]
    assert np.linalg.det(turned) == pytest.approx(1)
    np.testing.assert_array_equal(turn_upright(np.array([[axes[up]]]), up, to), [[axes[to]]])
    np.testing.assert_array_equal(turn_upright(turned, to, up), basis)
    assert turned.dtype == np.float32


def test_turning_upright_leaves_clouds_that_are(clouds):
    assert turn_upright(clouds, "z", "z") is clouds


def test_turning_upright_names_a_wrong_axis(clouds):
    with pytest.raises(ValueError, match=r"up must be 'y' or 'z'.*'x'"):
        turn_upright(clouds, "x", "y")
