"""The error bound that the k-NN filter trusts, against tensor cores that round as badly as they may."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SOURCE = """
#include "common/knn_bound.h"
extern "C" double score_error(const float* size, const float* most, int channels) {
  using namespace crosspoint;
  return split_bound({size[0], size[1], size[2], 0}, {most[0], most[1], most[2], 0}, channels).product;
}
extern "C" double score_gap(const float* size, const float* most, int channels, double score) {
  using namespace crosspoint;
  return filter_gap(split_bound({size[0], size[1], size[2], 0}, {most[0], most[1], most[2], 0}, channels), score);
}
"""


@pytest.fixture(scope="module")
def bound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bound")
    (folder / "bound.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", "bound.cpp", "-o", "bound.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "bound.so"))
    library.score_error.restype = library.score_gap.restype = ctypes.c_double
    return library


def norms(*values):
    return (ctypes.c_float * 3)(*map(float, values))


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def multiply_truncating(x: np.ndarray, y: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + x y over 16 channels: every addend, and the sum, lose what is below 2^-23 of the largest addend."""
    addends = np.concatenate([x[:, None] * y[None].astype(np.float64), total[..., None]], -1)
    unit = np.exp2(np.frexp(np.abs(addends).max(-1))[1] - 24.0)
    total = (np.trunc(addends / unit[..., None]) * unit[..., None]).sum(-1)
    unit = np.exp2(np.frexp(total)[1] - 24.0)
    return np.trunc(total / unit) * unit


@pytest.mark.parametrize("kind", ["random", "positive", "graded"])
@pytest.mark.parametrize("channels", [16, 64, 128])
def test_no_score_is_further_off_than_the_bound(bound, kind, channels):
    random = np.random.default_rng(channels)
    x = random.standard_normal((60, channels)).astype(np.float32)
    if kind == "positive":  # every truncation goes the same way
        x = np.abs(x)
    elif kind == "graded":
        x *= np.exp2(random.integers(-12, 12, channels)).astype(np.float32)
    high = bfloat16(x)
    low = bfloat16(x - high)
    norm2, lost2, low2 = (
        (v.astype(np.float64) ** 2).sum(-1) for v in (high + low, x - high - low, low.astype(np.float64))
    )
    total = np.zeros((60, 60))
    for c in range(0, channels, 16):
        for a, b in ((low, high), (high, low), (high, high)):
            total = multiply_truncating(a[:, c : c + 16].astype(np.float64), b[:, c : c + 16], total)
    exact = (high + low).astype(np.float64) @ (high + low).astype(np.float64).T
    worst = np.abs(total - exact).max(1)
    assert worst.max() > 0
    most = norms(norm2.max(), lost2.max(), low2.max())
    for i in range(60):
        assert worst[i] <= bound.score_error(norms(norm2[i], lost2[i], low2[i]), most, channels)


@pytest.mark.parametrize("kind", ["random", "lattice", "clusters", "tiny"])
@pytest.mark.parametrize("channels", [16, 64, 128])
def test_scores_apart_by_the_gap_are_in_the_order_of_distances(bound, kind, channels):
    """Scores as wrong as they may be, against float32 distances by direct differences."""
    random = np.random.default_rng(channels)
    x = random.standard_normal((80, channels)).astype(np.float32)
    if kind == "lattice":
        x = np.round(x)
    elif kind == "clusters":
        x = (x[np.arange(80) % 8] + 1e-3 * x).astype(np.float32)
    elif kind == "tiny":
        x *= np.float32(1e-19)
    high = bfloat16(x)
    low = bfloat16(x - high)
    split = (high + low).astype(np.float64)
    norm2, lost2, low2 = (
        (v.astype(np.float64) ** 2).sum(-1) for v in (split, x - high - low, low.astype(np.float64))
    )
    most = norms(norm2.max(), lost2.max(), low2.max())
    decided = []
    for i in range(80):
        size = norms(norm2[i], lost2[i], low2[i])
        error = bound.score_error(size, most, channels)
        score = norm2 / 2 - split @ split[i] + error * random.choice([-1, 1], 80)
        distance = np.zeros(80, np.float32)
        for c in range(channels):
            distance += (x[:, c] - x[i, c]) ** 2
        for last in (20, 79):
            near = np.argsort(score)[: last + 1]
            gap = bound.score_gap(size, most, channels, ctypes.c_double(score[near[-1]]))
            apart = score[near][None] - score[near][:, None] > gap
            assert (distance[near][:, None] < distance[near][None])[apart].all()
            decided.append(apart.sum() / (last * (last + 1) / 2))
    assert np.mean(decided) > {"random": 0.95, "lattice": 0.9, "clusters": 0.7, "tiny": 0}[kind]
