import itertools
import math

import kornia.enhance
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from crosspoint.data import CloudAugmentation, ImageAugmentation, ScaleShift
from crosspoint.data.augment import _colour_jitter, _Draws, _resample

STILL = {"scale": (1.0, 1.0), "translation": 0.0, "jitter_std": 0.0, "max_dropout": 0.0}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clouds(b, n, seed=1):
    return torch.randn(b, n, 3, generator=generator(seed)) * torch.tensor([1.0, 2.0, 0.5]) + 3


def normalised(points):
    x = points - points.mean(dim=1, keepdim=True)
    return x / x.norm(dim=2).amax(dim=1)[:, None, None]


def assert_uniform(values, low, high):
    """Inside [low, high], and a Kolmogorov-Smirnov test that fails one time in a thousand by chance."""
    values = values.flatten().double()
    slack = 1e-4 * (high - low)
    assert values.min() >= low - slack and values.max() <= high + slack
    assert stats.kstest(values.numpy(), "uniform", (low, high - low)).pvalue > 1e-3


def assert_repeatable(augmentation, batch):
    """A function of the batch and the generator's state, which never touches the global generator."""
    before, state = batch.clone(), torch.get_rng_state()
    g = generator(7)
    first, second = augmentation(batch, g), augmentation(batch, g)
    assert torch.equal(first, augmentation(batch, generator(7)))
    assert not torch.equal(first, second)
    assert torch.equal(batch, before) and torch.equal(torch.get_rng_state(), state)


def assert_independent(augmentation, batch):
    """Equal items of a batch get different draws, and no item depends on what the others hold."""
    same = batch[:1].expand_as(batch).contiguous()
    out = augmentation(same, generator())
    for a, b in itertools.combinations(out, 2):
        assert not torch.allclose(a, b)
    mixed = batch.clone()
    mixed[0] = same[0]
    torch.testing.assert_close(augmentation(mixed, generator())[0], out[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_unit_sphere_then_rotation_about_the_up_axis(up):
    points = clouds(800, 8)
    x, y = normalised(points), CloudAugmentation(up=up, **STILL)(points, generator())
    axis = "xyz".index(up)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    torch.testing.assert_close(y[..., axis], x[..., axis])
    torch.testing.assert_close(y.norm(dim=2), x.norm(dim=2))
    torch.testing.assert_close(y.norm(dim=2).amax(dim=1), torch.ones(800))
    turn = torch.atan2(y[..., j], y[..., i]) - torch.atan2(x[..., j], x[..., i])
    turn = turn.remainder(2 * math.pi)
    # one rigid turn per cloud
    torch.testing.assert_close((turn - turn[:, :1]).cos(), torch.ones(800, 8), rtol=0, atol=1e-5)
    assert_uniform(turn[:, 0], 0, 2 * math.pi)


def test_placement_and_size_of_the_input_do_not_matter():
    points = clouds(4, 50)
    moved = 37 * points + torch.tensor([5.0, -90.0, 20.0])
    a, b = (CloudAugmentation()(x, generator()) for x in (points, moved))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scale_is_isotropic_and_uniform():
    points = clouds(800, 8)
    y = CloudAugmentation(**{**STILL, "scale": (0.5, 2.0)})(points, generator())
    ratio = y.norm(dim=2) / normalised(points).norm(dim=2)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert_uniform(ratio[:, 0], 0.5, 2.0)


def test_translation_is_a_share_of_the_extent_after_scale_and_rotation():
    points = clouds(800, 16)
    y = CloudAugmentation(**{**STILL, "scale": (0.5, 2.0), "translation": 0.5})(points, generator())
    share = y.mean(dim=1) / (y.amax(dim=1) - y.amin(dim=1))
    for axis in range(3):
        assert_uniform(share[:, axis], -0.5, 0.5)
    assert (torch.corrcoef(share.t()) - torch.eye(3)).abs().max() < 0.1


@pytest.mark.parametrize(("std", "clipped"), [(0.01, 0.0), (0.05, 0.3173)])
def test_jitter_is_clipped_noise_after_scale(std, clipped):
    points = clouds(20, 500)
    options = {**STILL, "scale": (2.0, 2.0), "translation": 0.5}
    noise = CloudAugmentation(**{**options, "jitter_std": std})(points, generator())
    noise = (noise - CloudAugmentation(**options)(points, generator())).double()
    assert noise.abs().max() <= 0.05 + 1e-6
    at_the_clip = (noise.abs() > 0.05 - 1e-6).double().mean()
    assert abs(at_the_clip - clipped) < 0.01
    expected = stats.norm(scale=std)
    inside = noise[noise.abs() < 0.049].numpy()
    low, high = expected.cdf(-0.049), expected.cdf(0.049)
    assert stats.kstest(inside, lambda v: (expected.cdf(v) - low) / (high - low)).pvalue > 1e-3


def test_dropout_overwrites_with_the_first_point_at_the_end():
    points = clouds(400, 1000)
    full, y = (CloudAugmentation(max_dropout=r)(points, generator()) for r in (0.0, 0.875))
    dropped = (y == y[:, :1]).all(dim=2)
    assert torch.equal(y, torch.where(dropped[:, :, None], full[:, :1], full))
    ratio = dropped[:, 1:].double().mean(dim=1)
    assert ratio.max() < 0.93
    assert stats.kstest(ratio.numpy(), "uniform", (0, 0.875)).pvalue > 1e-3
    # within a cloud every point has the same chance, wherever it stands
    assert (dropped[:, 1:].double().mean(dim=0) - 0.4375).abs().max() < 0.12


def test_defaults_are_the_published_ones():
    assert CloudAugmentation() == CloudAugmentation("y", (0.5, 2.0), 0.5, 0.01, 0.05, 0.875)
    assert ImageAugmentation() == ImageAugmentation(224, None, 0.4, 0.5)


def test_clouds_are_repeatable_and_independent():
    assert_repeatable(CloudAugmentation(), clouds(3, 20))
    assert_independent(CloudAugmentation(), clouds(4, 20))


def test_scale_and_shift_are_uniform_and_of_each_axis():
    x = clouds(500, 4).double()
    y = ScaleShift()(x, generator())
    scale = (y[:, 1:] - y[:, :1]) / (x[:, 1:] - x[:, :1])
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale), rtol=1e-6, atol=1e-6)
    assert_uniform(scale[:, 0], 2 / 3, 3 / 2)
    assert_uniform(y[:, 0] - scale[:, 0] * x[:, 0], -0.2, 0.2)
    axes = scale[:, 0].T
    assert torch.corrcoef(axes).triu(1).abs().max() < 0.2
    assert_repeatable(ScaleShift(), clouds(3, 20))
    assert_independent(ScaleShift(), clouds(4, 20))


def test_cloud_of_one_place_stays_finite():
    y = CloudAugmentation(**STILL)(torch.full((2, 5, 3), 4.0), generator())
    assert torch.equal(y, torch.zeros(2, 5, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_cloud_keeps_its_dtype(dtype):
    y = CloudAugmentation()(clouds(2, 30).to(dtype), generator())
    assert y.dtype == dtype and y.isfinite().all()
    close = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(y.float(), CloudAugmentation()(clouds(2, 30), generator()), **close)


def images(b, h, w, seed=2):
    return torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8, generator=generator(seed))


def unnormalised(x):
    return x * STD + MEAN


def test_normalisation():
    x = images(3, 12, 12)
    y = ImageAugmentation(12, jitter=0.0, flip=0.0)(x, generator())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, (x / 255 - MEAN) / STD)


@pytest.mark.parametrize("shape", [(9, 14), (30, 41)])
def test_resize(shape):
    x = images(2, *shape)
    y = ImageAugmentation(16, jitter=0.0, flip=0.0)(x, generator())
    expected = F.interpolate(x / 255, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(unnormalised(y), expected)


@pytest.mark.parametrize("shape", [(9, 14), (30, 41)])
def test_crop_of_the_whole_image_is_a_resize(shape):
    x = images(2, *shape) / 255
    y = _resample(x, torch.tensor([[0.0, 0.0, *shape]] * 2), 16)
    torch.testing.assert_close(y, F.interpolate(x, (16, 16), mode="bilinear", antialias=True))


def test_crop_boxes():
    """Ramps along x and y show from where each output pixel was taken."""
    ramp = torch.arange(256, dtype=torch.uint8)
    x = torch.zeros(400, 3, 256, 256, dtype=torch.uint8)
    x[:, 0] = ramp
    x[:, 1] = ramp[:, None]
    y = unnormalised(ImageAugmentation(16, crop=0.25, jitter=0.0, flip=0.0)(x, generator())) * 255
    across, down = y[:, 0, 8, :].double(), y[:, 1, :, 8].double()
    size, start = [], []
    for line in (across, down):
        step = (line[:, 12] - line[:, 4]) / 8
        size.append(16 * step / 256)
        start.append((line[:, 8] + 0.5 - 8.5 * step) / 256)
    size, start = torch.stack(size), torch.stack(start)
    assert start.min() > -1e-3 and (start + size).max() < 1 + 1e-3
    area, ratio = size.prod(dim=0), size[0] / size[1]
    assert area.min() > 0.249 and area.max() < 1 + 1e-3
    assert ratio.min() > 0.749 and ratio.max() < 4 / 3 + 1e-3
    assert abs((area < 0.5).double().mean() - 1 / 3) < 0.07
    whole = area < 0.6  # such boxes are never cut to the image
    assert stats.kstest(ratio[whole].log().numpy(), "uniform", _span(math.log(4 / 3))).pvalue > 1e-3
    room = 1 - size
    free = room > 0.05
    assert stats.kstest((start[free] / room[free]).numpy(), "uniform").pvalue > 1e-3


def _span(half):
    return -half, 2 * half


def test_brightness_factor():
    x = torch.full((800, 3, 4, 4), 128, dtype=torch.uint8)
    y = unnormalised(ImageAugmentation(4)(x, generator()))  # on flat grey the other two do nothing
    torch.testing.assert_close(y, y[:, :1, :1, :1].expand_as(y))
    assert_uniform(y[:, 0, 0, 0] / (128 / 255), 0.6, 1.4)


def test_contrast_factor():
    x = torch.full((800, 3, 4, 4), 80, dtype=torch.uint8)
    x[..., 2:] = 120
    y = unnormalised(ImageAugmentation(4, flip=0.0)(x, generator()))[:, 0, 0]
    assert_uniform((y[:, 3] - y[:, 0]) / (y[:, 3] + y[:, 0]) / (40 / 200), 0.6, 1.4)


def test_colour_jitter_is_kornias_in_every_order():
    orders = torch.tensor([*itertools.permutations(range(3))])
    torch.manual_seed(3)
    x, factors = torch.rand(6, 3, 9, 8), torch.rand(6, 3) * 0.8 + 0.6
    y = _colour_jitter(x, factors, orders)
    operations = (
        kornia.enhance.adjust_brightness_accumulative,
        kornia.enhance.adjust_contrast_with_mean_subtraction,
        kornia.enhance.adjust_saturation_with_gray_subtraction,
    )
    for i, order in enumerate(orders.tolist()):
        expected = x[i]
        for kind in order:
            expected = operations[kind](expected, factors[i, kind].item())
        # kornia rounds its grey weights to three digits, as we do
        torch.testing.assert_close(y[i], expected, rtol=1e-5, atol=1e-5)


def test_colour_jitter_orders_are_equally_likely():
    orders = _Draws(generator(), torch.device("cpu")).permutations(1200, 3)
    counts = torch.bincount((orders * torch.tensor([9, 3, 1])).sum(dim=1))
    counts = counts[counts > 0]
    assert len(counts) == 6 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_colours_stay_in_range():
    y = unnormalised(ImageAugmentation(8, jitter=1.0)(images(50, 8, 8), generator()))
    assert y.min() > -1e-6 and y.max() < 1 + 1e-6
    assert (y > 1 - 1e-6).any() and (y < 1e-6).any()


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_flip(flip):
    x = images(1, 6, 6).expand(600, -1, -1, -1)
    y = unnormalised(ImageAugmentation(6, jitter=0.0, flip=flip)(x, generator()))
    straight, mirrored = ((y - z / 255).abs().amax(dim=(1, 2, 3)) < 1e-5 for z in (x, x.flip(3)))
    assert (straight ^ mirrored).all()
    assert abs(mirrored.float().mean() - flip) < 0.06


@pytest.mark.parametrize("crop", [None, 0.5])
def test_images_are_repeatable_and_independent(crop):
    assert_repeatable(ImageAugmentation(10, crop=crop), images(3, 12, 9))
    assert_independent(ImageAugmentation(10, crop=crop), images(4, 12, 9))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: CloudAugmentation()(clouds(2, 5), 3), TypeError, "torch.Generator, got int"),
        (lambda: CloudAugmentation()(clouds(2, 5)[0], generator()), ValueError, r"\(B, N, 3\) .* \(5, 3\)"),
        (lambda: CloudAugmentation()(clouds(2, 0), generator()), ValueError, r"N >= 1, got \(2, 0, 3\)"),
        (lambda: CloudAugmentation()(clouds(2, 5).int(), generator()), TypeError, "got torch.int32"),
        (lambda: CloudAugmentation(up="w"), ValueError, r"up must be one of \['x', 'y', 'z'\], got 'w'"),
        (lambda: CloudAugmentation(scale=(2.0, 0.5)), ValueError, r"0 < low <= high, got \(2.0, 0.5\)"),
        (lambda: CloudAugmentation(jitter_std=-1.0), ValueError, "jitter_std must be >= 0, got -1.0"),
        (lambda: CloudAugmentation(max_dropout=1.5), ValueError, r"max_dropout must be in \[0, 1\], got 1.5"),
        (lambda: ScaleShift()(clouds(2, 0), generator()), ValueError, r"N >= 1, got \(2, 0, 3\)"),
        (lambda: ScaleShift(scale=(0.0, 1.0)), ValueError, r"0 < low <= high, got \(0.0, 1.0\)"),
        (lambda: ScaleShift(shift=-1.0), ValueError, "shift must be >= 0, got -1.0"),
        (lambda: ImageAugmentation()(images(1, 4, 4)[0], generator()), ValueError, r"\(B, 3, H, W\), got"),
        (
            lambda: ImageAugmentation()(images(1, 4, 4) / 255, generator()),
            TypeError,
            "uint8, got torch.float32",
        ),
        (lambda: ImageAugmentation(0), ValueError, "size must be positive, got 0"),
        (lambda: ImageAugmentation(crop=0.0), ValueError, "crop must be the least share"),
        (lambda: ImageAugmentation(jitter=2.0), ValueError, r"jitter must be in \[0, 1\], got 2.0"),
        (lambda: ImageAugmentation(flip=-0.5), ValueError, "flip must be a probability, got -0.5"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
