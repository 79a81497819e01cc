"""sup_con: the battery, its formula, pytorch-metric-learning's, nt_xent's, precision, extremes."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosspoint import ops
from crosspoint.ops import _dispatch, reference
from op_tester import Call, OpTester, compiled_backends, threads

BACKENDS = compiled_backends("sup_con")
backends = pytest.mark.parametrize("backend", BACKENDS, ids=["-".join(pair) for pair in BACKENDS])


def batch(n: int, d: int, classes: int, *, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around the centre of their class; some classes may have one row or none."""
    generator = torch.Generator().manual_seed(1000 * n + 7 * d + seed)
    centres = torch.randn(max(1, classes), d, generator=generator, dtype=torch.float64)
    labels = torch.randint(max(1, classes), (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64), labels


def formula(z: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
    """The docstring's."""
    z = F.normalize(z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool)
    s = (z @ z.t() / temperature).masked_fill(own, -torch.inf)
    positive = (labels[:, None] == labels) & ~own
    count = positive.sum(1)
    row_losses = -s.log_softmax(1).masked_fill(~positive, 0).sum(1) / count
    return row_losses[count > 0].mean()


def evaluate(loss, z: Tensor, labels: Tensor, temperature) -> list[Tensor]:
    """Loss and the gradients of z and the temperature; `loss` is a function or the name of a backend."""
    z = z.detach().clone().requires_grad_()
    temperature = torch.as_tensor(temperature, dtype=z.dtype, device=z.device).clone().requires_grad_()
    function = partial(ops.sup_con, impl=loss) if isinstance(loss, str) else loss
    value = function(z, labels, temperature)
    value.backward()
    return [value.detach(), z.grad, temperature.grad]


def assert_all_close(actual, expected, tolerance: float, floor: float = 1e-300) -> None:
    """Relative to the largest entry of each expected tensor."""
    for name, a, e in zip(("loss", "dz", "dtemperature"), actual, expected, strict=True):
        scale = max(e.double().abs().max().item() if e.numel() else 0.0, floor)
        error = (a.double().cpu() - e.double()).abs().max().item() / scale if e.numel() else 0.0
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


class TestSupCon(OpTester):
    op = "sup_con"
    differentiable = (0, 2)

    @classmethod
    def cases(cls):
        def case(n, d, classes, temperature, change=lambda labels: labels):
            def build():
                z, labels = batch(n, d, classes)
                return Call((z, change(labels), temperature))

            return build

        tensor = torch.tensor(0.2, dtype=torch.float64)
        return {
            "tensor_temperature": case(13, 5, 4, tensor),
            "several_blocks": case(210, 33, 10, tensor),
            "default_temperature": case(9, 8, 3, 0.1),
            "one_class": case(6, 4, 1, tensor),
            "no_positives": case(7, 4, 1, tensor, lambda labels: torch.arange(7)),
            "pairs": case(8, 4, 1, tensor, lambda labels: torch.arange(4).repeat(2)),
            "many_classes": case(60, 6, 40, torch.tensor([0.5], dtype=torch.float64)),
            "any_labels": case(20, 6, 3, 0.3, lambda labels: labels * (1 << 62) - 5),
            "small_integers": case(20, 6, 3, 0.3, lambda labels: (labels - 1).to(torch.int8)),
            "one_row": case(1, 4, 1, tensor),
            "no_rows": case(0, 4, 1, tensor),
            "duplicates": lambda: Call((torch.ones(5, 4, dtype=torch.float64), torch.arange(5) // 2, 0.3)),
            "hot": case(20, 16, 3, 10.0),
        }

    @classmethod
    def bad_calls(cls):
        def bad(change, error, pattern):
            return lambda: Call(change(*batch(4, 3, 2))), error, pattern

        return {
            "not_a_tensor": bad(lambda z, y: ([[1.0]], y), TypeError, "z must be a tensor, got list"),
            "labels_as_list": bad(lambda z, y: (z, [0, 1, 0, 1]), TypeError, "labels must be a tensor, got"),
            "one_dimension": bad(lambda z, y: (z[0], y), ValueError, r"z must be \(N, D\)"),
            "integers": bad(lambda z, y: (z.long(), y), TypeError, "floating dtype, got torch.int64"),
            "floating_labels": bad(
                lambda z, y: (z, y.float()), TypeError, "integer dtype, got torch.float32"
            ),
            "masks": bad(lambda z, y: (z, y > 0), TypeError, "integer dtype, got torch.bool"),
            "sizes": bad(lambda z, y: (z, y[:3]), ValueError, r"shape \(4,\), got shape \(3,\)"),
            "one_hot": bad(lambda z, y: (z, F.one_hot(y)), ValueError, r"shape \(4,\), got shape \(4, "),
            "devices": bad(lambda z, y: (z, y.to("meta")), ValueError, "cpu and meta"),
            "zero": bad(lambda z, y: (z, y, 0.0), ValueError, "temperature must be positive, got 0.0"),
            "vector": bad(lambda z, y: (z, y, torch.ones(2)), ValueError, r"one element, got shape \(2,\)"),
        }

    @classmethod
    def operator_calls(cls):
        def forward():
            z, labels = batch(5, 3, 2)
            return torch.ops.crosspoint.sup_con.default, (z.float(), labels, torch.tensor(0.1), 1, 3)

        def backward():
            z, labels = batch(5, 3, 2)
            args = (z.half(), labels, torch.tensor(0.1))
            _, row_losses, row_lse = torch.ops.crosspoint.sup_con(*args, 0, 5)
            grads = (torch.tensor(1.0), *args, row_losses, row_lse, 1, 3)
            return torch.ops.crosspoint.sup_con_backward.default, grads

        return {"forward": forward, "backward": backward}

    @classmethod
    def gradcheck_cases(cls):
        return ("tensor_temperature", "default_temperature", "one_class", "many_classes")


# ---- what the loss is


@pytest.mark.parametrize("classes", [1, 3, 20])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_reference_is_the_formula(classes, temperature):
    z, labels = batch(30, 6, classes)
    assert_all_close(
        evaluate(reference.sup_con, z, labels, temperature), evaluate(formula, z, labels, temperature), 1e-12
    )


@backends
@pytest.mark.parametrize("classes", [3, 25, 100])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5])
def test_equals_pytorch_metric_learning(backend, classes, temperature):
    """It averages over the losses above zero: the rows that have a positive."""
    # Here, since the rest of the battery also runs where only torch and the test tools are installed.
    from pytorch_metric_learning import losses

    z, labels = batch(120, 16, classes)
    leaf = z.clone().requires_grad_()
    theirs = losses.SupConLoss(temperature)(leaf, labels)
    theirs.backward()
    ours = evaluate(backend[0], z.to(backend[1]), labels.to(backend[1]), temperature)
    assert_all_close([*ours[:2], theirs], [theirs.detach(), leaf.grad, theirs.detach()], 1e-11)


@backends
def test_one_class_has_a_loss_where_pytorch_metric_learning_has_none(backend):
    from pytorch_metric_learning import losses

    z, labels = batch(9, 4, 1)
    assert losses.SupConLoss(0.5)(z, labels) == 0
    ours = ops.sup_con(z.to(backend[1]), labels.to(backend[1]), 0.5, impl=backend[0])
    torch.testing.assert_close(ours.cpu(), formula(z, labels, torch.tensor(0.5)))
    assert ours >= math.log(8)


@backends
@pytest.mark.parametrize("n", [2, 50, 130])
@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_labels_that_occur_twice_make_nt_xent(backend, n, temperature, dtype, tolerance):
    z, _ = batch(2 * n, 12, 1)
    z[n:] = z[:n] + 0.1 * z[n:]
    z = z.to(backend[1], dtype).requires_grad_()
    labels = torch.randperm(n, device=backend[1]).repeat(2)
    ours = ops.sup_con(z, labels, temperature, impl=backend[0])
    pairs = ops.nt_xent(z[:n], z[n:], temperature, impl=backend[0])
    torch.testing.assert_close(ours, pairs, rtol=tolerance, atol=0)
    (a,), (b,) = (torch.autograd.grad(loss, z) for loss in (ours, pairs))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


def test_rows_without_positives_are_negatives_only():
    z, labels = batch(20, 5, 3)
    labels[:4] = torch.arange(100, 104)
    with_them = evaluate(reference.sup_con, z, labels, 0.2)
    own = torch.eye(20, dtype=torch.bool)
    s = F.normalize(z, dim=1) @ F.normalize(z, dim=1).t() / 0.2
    log_softmax = s.masked_fill(own, -torch.inf).log_softmax(1)
    rows = [-log_softmax[i, (labels == labels[i]) & ~own[i]].mean() for i in range(4, 20)]
    torch.testing.assert_close(with_them[0], torch.stack(rows).mean())
    assert with_them[1][:4].abs().min() > 0


# ---- precision and extremes


@backends
@pytest.mark.parametrize(
    "n, d, classes, temperature",
    [
        *((n, 40, 4, 0.1) for n in (2, 31, 95, 96, 97, 193, 400)),
        *((300, 7, classes, 0.1) for classes in (1, 2, 30, 150, 1000)),
        *((101, 33, 5, t) for t in (0.0005, 0.005, 0.0143, 0.0146, 0.02, 0.07, 1.0, 10.0)),
    ],
)
def test_float64_equals_reference_to_its_last_digits(backend, n, d, classes, temperature):
    z, labels = batch(n, d, classes)
    expected = evaluate(reference.sup_con, z, labels, temperature)
    actual = evaluate(backend[0], z.to(backend[1]), labels.to(backend[1]), temperature)
    assert_all_close(actual, expected, 4e-12)


@backends
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.07, 0.02])
@pytest.mark.parametrize("classes", [4, 100])
def test_float32_gradient_of_tight_classes(backend, classes, temperature):
    """Nearly equal positives almost cancel: the rounding of a cosine is all that is lost, as in the plain formula."""
    z, labels = batch(512, 64, classes, noise=0.3)
    z = z.float()
    expected = evaluate(reference.sup_con, z.double(), labels, temperature)
    actual = evaluate(backend[0], z.to(backend[1]), labels.to(backend[1]), temperature)
    plain = evaluate(formula, z, labels, temperature)
    ours, theirs = (
        (dz.double().cpu() - expected[1]).norm() / expected[1].norm() for dz in (actual[1], plain[1])
    )
    assert ours < min(2 * theirs, 1.5e-5)
    torch.testing.assert_close(actual[0].double().cpu(), expected[0], rtol=2e-7, atol=0)


@backends
@pytest.mark.parametrize("dtype, temperature", [(torch.float64, 0.0275), (torch.float32, 0.055)])
def test_tiny_loss_keeps_its_digits(backend, dtype, temperature):
    """Orthogonal classes of two equal rows: the loss is log(1 + (2N - 2) exp(-1 / temperature)) exactly."""
    n = 16
    z = torch.eye(n, 24, dtype=dtype, device=backend[1]).repeat(2, 1)
    labels = torch.arange(n, device=backend[1]).repeat(2)
    value, dz, _ = evaluate(backend[0], z, labels, temperature)
    temperature = torch.tensor(temperature, dtype=dtype).double().item()
    others = (2 * n - 2) * math.exp(-1 / temperature)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert value.item() == pytest.approx(math.log1p(others), rel=tolerance)
    push = 4 * math.exp(-1 / temperature) / (1 + others) / (2 * n * temperature)
    expected = push * (1 - torch.eye(n, 24, dtype=torch.float64)) * (torch.arange(24) < n)
    torch.testing.assert_close(dz.double().cpu(), expected.repeat(2, 1), rtol=tolerance, atol=0)


@backends
@pytest.mark.parametrize("n, labels", [(0, []), (1, [3]), (4, [1, 2, 3, 4]), (2, [5, 5])])
@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_nothing_to_contrast(backend, n, labels, temperature):
    z = batch(n, 3, 1)[0].float().to(backend[1])
    labels = torch.tensor(labels, dtype=torch.int64, device=backend[1])
    assert all(torch.equal(x, torch.zeros_like(x)) for x in evaluate(backend[0], z, labels, temperature))


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n, temperature", [(6, 0.1), (120, 0.1), (120, 0.001)])
def test_nan_is_not_hidden(backend, bad, n, temperature):
    z, labels = batch(n, 4, 2)
    z[n // 2, 1] = bad
    result = evaluate(backend[0], z.float().to(backend[1]), labels.to(backend[1]), temperature)
    assert result[0].isnan() and result[1][n // 2].isnan().all()


@backends
@pytest.mark.parametrize("length", [0.0, 3e-13, 1e-12])
def test_rows_shorter_than_the_least_divisor(backend, length):
    z, labels = batch(9, 5, 3)
    z[4] = F.normalize(z[4], dim=0) * length
    z[0] = 0
    expected = evaluate(reference.sup_con, z, labels, 0.1)
    assert_all_close(evaluate(backend[0], z.to(backend[1]), labels.to(backend[1]), 0.1), expected, 1e-12)


# ---- properties


@backends
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(2, 220), st.integers(2, 9), st.integers(1, 60)),
    temperature=st.sampled_from([0.004, 0.05, 0.2, 3.0]),
    seed=st.integers(0, 1000),
)
def test_order_and_names_of_the_classes_do_not_matter(backend, size, temperature, seed):
    z, labels = batch(*size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order, names = torch.randperm(size[0], generator=generator), torch.randperm(60, generator=generator)
    value, dz, dt = evaluate(reference.sup_con, z, labels, temperature)
    permuted = evaluate(backend[0], z[order].to(backend[1]), names[labels][order].to(backend[1]), temperature)
    assert_all_close(permuted, [value, dz[order], dt], 1e-11, floor=1e-11)


@backends
@pytest.mark.parametrize("split", [[40], [1, 0, 5], [95, 97, 3], [200, 1, 130]])
@pytest.mark.parametrize("temperature", [0.2, 0.001])
@pytest.mark.parametrize("classes", [4, 90])
def test_parts_make_the_whole(backend, split, temperature, classes):
    """The operators on ranges of rows, as one process of several calls them."""
    z, labels = batch(sum(split), 9, classes)
    expected = evaluate(reference.sup_con, z, labels, temperature)
    z, labels = z.to(backend[1]), labels.to(backend[1])
    temperature = torch.tensor(temperature, dtype=torch.float64, device=backend[1])
    ends = torch.tensor(split).cumsum(0).tolist()
    rows = [(end - count, count) for end, count in zip(ends, split, strict=True)]
    forward, backward = (_dispatch.operator(name, backend[0]) for name in ("sup_con", "sup_con_backward"))
    parts = [forward(z, labels, temperature, *part) for part in rows]
    row_losses, row_lse = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    grads = [
        backward(torch.ones_like(temperature), z, labels, temperature, row_losses, row_lse, *part)
        for part in rows
    ]
    loss = row_losses.sum() / (row_lse < torch.inf).sum().clamp_min(1)
    dz, dtemperature = zip(*grads, strict=True)
    assert_all_close([loss, torch.cat(dz), torch.stack(dtemperature).sum()], expected, 1e-11)


@backends
@pytest.mark.parametrize("n, temperature", [(500, 0.1), (500, 0.005), (2000, 0.1)])
def test_any_number_of_threads_gives_the_same_bits(backend, n, temperature):
    z, labels = batch(n, 20, 7)
    z, labels = z.float().to(backend[1]), labels.to(backend[1])
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            results.append(evaluate(backend[0], z, labels, temperature))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
