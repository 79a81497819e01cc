"""The battery that every operator passes, whatever its backend: subclass OpTester, name the op, list its cases.

A backend that is added later is tested by the same classes: they run every backend that `describe_backends` calls
usable on each device that is there, and compare it with the float64 reference.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crosspoint import ops
from crosspoint.ops import reference
from crosspoint.testing import TOLERANCE

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Call:
    """The arguments of one call of a public function."""

    args: tuple
    kwargs: dict = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with `change` applied to every tensor."""

        def visit(value):
            return change(value) if isinstance(value, Tensor) else value

        return Call(tuple(map(visit, self.args)), {name: visit(v) for name, v in self.kwargs.items()})

    def to(self, dtype: torch.dtype) -> Call:
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def on(self, device: str) -> Call:
        return self.map(lambda t: t.to(device))

    def clone(self) -> Call:
        return self.map(lambda t: t.detach().clone())


def usable_backends(op: str, device: str) -> list[str]:
    rows = ops.describe_backends()
    return [row.backend for row in rows if (row.op, row.device) == (op, device) and row.usable]


def compiled_backends(op: str) -> list[tuple[str, str]]:
    """(backend, device) pairs that can be compared with the reference here."""
    return [(b, d) for d in DEVICES for b in usable_backends(op, d) if b != "reference"]


class OperatorRecorder(TorchDispatchMode):
    """Records the names of the crosspoint operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "crosspoint":
            self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (or the largest integer), so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Elementwise, relative to the largest finite value expected; NaN and infinities in the same places."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    torch.testing.assert_close(
        actual.to(torch.float64).cpu(),
        expected.to(torch.float64).cpu(),
        rtol=0,
        atol=tolerance * max(scale, 1e-30),
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


class OpTester(ABC):
    """One operator's battery. Subclasses are named Test*, set `op`, and say what to call it with."""

    op: str
    differentiable: tuple[int, ...] = ()  # positions of the arguments that take a gradient
    twice_differentiable = False
    tolerance = TOLERANCE
    grad_tolerance = TOLERANCE

    @classmethod
    @abstractmethod
    def cases(cls) -> dict[str, Callable[[], Call]]:
        """Name -> builder of a float64 CPU call; between them they cover the awkward shapes and values."""

    @classmethod
    @abstractmethod
    def bad_calls(cls) -> dict[str, tuple[Callable[[], Call], type[Exception], str]]:
        """Name -> (builder, exception type, pattern of its message)."""

    @classmethod
    @abstractmethod
    def operator_calls(cls) -> dict[str, Callable[[], tuple[Callable, tuple]]]:
        """Name -> builder of (operator overload, arguments) for opcheck: every operator of the native backend."""

    @classmethod
    def gradcheck_cases(cls) -> tuple[str, ...]:
        """Names of the cases that are small and smooth enough for finite differences."""
        return ()

    def compare(self, actual, expected, call: Call, dtype: torch.dtype, what: str) -> None:
        """Compare one result with the float64 reference's; operators with indices override this."""
        assert_close(actual, expected, self.tolerance[dtype], what)

    # ---- how the battery calls it

    def run(self, call: Call, impl: str):
        return getattr(ops, self.op)(*call.args, **call.kwargs, impl=impl)

    def run_reference(self, call: Call):
        return getattr(reference, self.op)(*call.args, **call.kwargs)

    @staticmethod
    def outputs(result) -> tuple[Tensor, ...]:
        return result if isinstance(result, tuple) else (result,)

    def loss(self, result) -> Tensor:
        """A scalar whose gradient reaches every finite entry of every floating output, with uneven weights."""
        total = 0
        for out in self.outputs(result):
            if out.is_floating_point():
                weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64, device=out.device)
                finite = torch.where(out.isfinite(), out, 0)
                total = total + (finite.double() * weights.view(out.shape).cos()).sum()
        return total

    def gradients(self, call: Call, run: Callable) -> list[Tensor]:
        args = list(call.args)
        leaves = [i for i in self.differentiable if isinstance(args[i], Tensor)]
        for i in leaves:
            args[i] = args[i].detach().clone().requires_grad_()
        self.loss(run(Call(tuple(args), call.kwargs))).backward()
        return [args[i].grad if args[i].grad is not None else torch.zeros_like(args[i]) for i in leaves]

    # ---- the battery

    def test_forward_matches_reference(self, backend, dtype, case):
        impl, device = backend
        call = self.cases()[case]().to(dtype)
        expected = self.run_reference(call.clone().to(torch.float64))
        call = call.on(device)
        with poisoned_memory():
            result = self.run(call.clone(), impl)
        self.compare(result, expected, call, dtype, f"{self.op} {case}")

    def test_gradients_match_reference(self, backend, dtype, case):
        if not self.differentiable:
            assert not any(
                out.requires_grad for out in self.outputs(self.run(self.cases()[case](), backend[0]))
            )
            return
        impl, device = backend
        call = self.cases()[case]().to(dtype)
        expected = self.gradients(call.clone().to(torch.float64), self.run_reference)
        with poisoned_memory():
            actual = self.gradients(call.clone().on(device), lambda c: self.run(c, impl))
        leaves = [i for i in self.differentiable if isinstance(call.args[i], Tensor)]
        for position, a, e in zip(leaves, actual, expected, strict=True):
            assert a.dtype == call.args[position].dtype
            assert_close(
                a, e, self.grad_tolerance[dtype], f"{self.op} {case}: gradient of argument {position}"
            )

    def test_gradcheck(self, backend):
        impl, device = backend
        for case in self.gradcheck_cases():
            call = self.cases()[case]().on(device)
            leaves = [i for i in self.differentiable if isinstance(call.args[i], Tensor)]

            def function(*values, call=call, leaves=leaves):
                args = list(call.args)
                for i, value in zip(leaves, values, strict=True):
                    args[i] = value
                fresh = Call(tuple(args), copy.deepcopy(call.kwargs))
                return tuple(o for o in self.outputs(self.run(fresh, impl)) if o.is_floating_point())

            values = [call.args[i].clone().requires_grad_() for i in leaves]
            # Along a random direction: a call for each number would be thousands, and all are compared above.
            few = {"eps": 1e-6, "fast_mode": True}
            assert torch.autograd.gradcheck(function, values, atol=1e-8, rtol=1e-5, **few)
            if self.twice_differentiable:
                assert torch.autograd.gradgradcheck(function, values, atol=1e-5, rtol=1e-4, **few)

    def test_opcheck(self, operator_call):
        operator, args = self.operator_calls()[operator_call]()
        torch.library.opcheck(operator, args)

    def test_compiles_without_graph_breaks(self, backend, dynamic):
        impl, device = backend
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda call_args, call_kwargs: getattr(ops, self.op)(*call_args, **call_kwargs, impl=impl),
            fullgraph=True,
            dynamic=dynamic,
            backend="aot_eager",
        )
        for case in self.compile_cases():
            call = self.cases()[case]().to(torch.float32).on(device)
            eager = self.outputs(self.run(call.clone(), impl))
            fresh = call.clone()
            for a, b in zip(self.outputs(compiled(fresh.args, fresh.kwargs)), eager, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            if self.differentiable:
                expected = self.gradients(call.clone(), lambda c: self.run(c, impl))
                actual = self.gradients(call.clone(), lambda c: compiled(c.args, c.kwargs))
                for a, b in zip(actual, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    @classmethod
    def compile_cases(cls) -> list[str]:
        """Cases that differ in their sizes, for static and dynamic compilation."""
        return list(cls.cases())[:2]

    def test_reads_no_value_on_the_host(self, backend):
        """Forward and backward on tensors that have a shape and no data: reading a value of one is an error."""
        impl, device = backend
        call = next(iter(self.cases().values()))().to(torch.float32).on(device)
        shapes = [out.shape for out in self.outputs(self.run(call.clone(), impl))]
        with FakeTensorMode() as mode:
            fake = call.map(mode.from_tensor)
            assert [out.shape for out in self.outputs(self.run(fake, impl))] == shapes
            if self.differentiable:
                self.gradients(fake, lambda c: self.run(c, impl))

    def test_func_grad_equals_autograd(self, backend):
        if not self.differentiable:
            return
        impl, device = backend
        call = next(iter(self.cases().values()))().on(device)
        expected = self.gradients(call.clone(), lambda c: self.run(c, impl))

        def scalar(*leaves):
            args = list(call.args)
            for position, value in zip(self.differentiable, leaves, strict=True):
                args[position] = value
            return self.loss(self.run(Call(tuple(args), copy.deepcopy(call.kwargs)), impl))

        leaves = tuple(call.args[i] for i in self.differentiable)
        actual = torch.func.grad(scalar, argnums=tuple(range(len(leaves))))(*leaves)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)

    def test_unsupported_second_derivative_raises(self, backend):
        if not self.differentiable or self.twice_differentiable:
            return
        impl, device = backend
        call = next(iter(self.cases().values()))().on(device)
        position = self.differentiable[0]

        def scalar(value):
            args = list(call.args)
            args[position] = value
            return self.loss(self.run(Call(tuple(args), copy.deepcopy(call.kwargs)), impl))

        value = call.args[position].clone().requires_grad_()
        (first,) = torch.autograd.grad(scalar(value), value, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            first.square().sum().backward()
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.func.grad(lambda v: torch.func.grad(scalar)(v).square().sum())(value.detach())

    def test_strides_do_not_matter(self, backend):
        impl, device = backend

        def strided(t: Tensor) -> Tensor:
            if t.dim() == 0 or t.numel() == 0:
                return t
            wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype, device=t.device)
            wide[..., 1::2] = t
            view = wide[..., 1::2]
            return view.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 2 else view

        call = next(iter(self.cases().values()))().to(torch.float32).on(device)
        expected = self.outputs(self.run(call.clone(), impl))
        actual = self.outputs(self.run(call.clone().map(strided), impl))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    def test_bitwise_repeatable(self, backend, case):
        impl, device = backend
        call = self.cases()[case]().to(torch.float32).on(device)
        results = []
        for count in (torch.get_num_threads(), 1, 2, 3):
            with threads(count):
                result = list(self.outputs(self.run(call.clone(), impl)))
                if self.differentiable:
                    result += self.gradients(call.clone(), lambda c: self.run(c, impl))
            results.append(result)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    def test_runs_the_backend_that_was_asked_for(self, backend):
        impl, device = backend
        call = next(iter(self.cases().values()))().on(device)
        with OperatorRecorder() as asked:
            self.run(call.clone(), impl)
        with OperatorRecorder() as plain:
            self.run(call.clone(), "reference")
        assert asked.seen
        assert not plain.seen
        others = {row.backend for row in ops.describe_backends()} - {impl}
        assert impl == "native" or all(name.endswith(f"_{impl}") for name in asked.seen)
        assert not any(name.endswith(f"_{other}") for name in asked.seen for other in others)

    def test_unknown_impl_is_refused(self):
        call = next(iter(self.cases().values()))()
        with pytest.raises(ValueError, match="impl must be one of"):
            self.run(call, "fastest")

    def test_backend_that_cannot_run_is_refused(self, monkeypatch):
        from crosspoint.ops import _dispatch

        call = next(iter(self.cases().values()))()
        rows = dict.fromkeys(_dispatch.backends(self.op, "cpu"), "not built, says the test")
        monkeypatch.setitem(_dispatch._table, (self.op, "cpu"), {**rows, "reference": None})
        with pytest.raises(RuntimeError, match="not built, says the test"):
            self.run(call.clone(), "native")
        with OperatorRecorder() as recorder:
            self.run(call.clone(), "auto")
        assert not recorder.seen

    def test_inputs_are_left_alone(self, backend, case):
        impl, device = backend
        call = self.cases()[case]().on(device)
        copies = [t.clone() for t in call.args if isinstance(t, Tensor)]
        outputs = self.outputs(self.run(call, impl))
        tensors = [t for t in call.args if isinstance(t, Tensor)]
        for t, before in zip(tensors, copies, strict=True):
            torch.testing.assert_close(t, before, rtol=0, atol=0, equal_nan=True)
        storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        assert all(o.untyped_storage().data_ptr() not in storages for o in outputs if o.numel())

    def test_bad_input_gets_a_clear_error(self, bad_call):
        build, error, pattern = self.bad_calls()[bad_call]
        for impl in ["auto", "reference"]:
            call = build()
            if error is IndexError and impl == "reference":
                continue  # index values are checked by the compiled operators
            with pytest.raises(error, match=pattern):
                self.run(call, impl)
