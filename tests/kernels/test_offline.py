"""Every Triton kernel with every entry of its launch table, compiled for GPUs that need not be there."""

import platform
import re
import sys

import pytest

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton has no package for this platform", allow_module_level=True)

import offline

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# float64 has its own on sm_80, which Triton uses unasked.
TENSOR_CORES = {80: r"mma\.sync\S*\.(bf16|f16|tf32)\b", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
each = pytest.mark.parametrize(
    "variant, architecture",
    [
        pytest.param(variant, architecture, id=f"{variant.name}-{architecture}")
        for variant in offline.variants()
        for architecture in variant.architectures
    ],
)


@pytest.fixture(scope="module")
def compiled():
    return offline.compile_all()


@each
@pytest.mark.timeout(2400)  # for all that the first one compiles
def test_fits_the_processor(compiled, variant, architecture):
    result = compiled[variant.name, architecture]
    assert result.stack == 0, f"{result.stack} bytes of local memory at {result.registers} registers"
    assert result.shared <= (variant.shared or SHARED_MEMORY[architecture])


@each
def test_products_run_on_tensor_cores(compiled, variant, architecture):
    found = re.search(TENSOR_CORES[architecture], compiled[variant.name, architecture].ptx)
    assert (found is not None) == variant.tensor_cores


def test_every_kernel_is_listed():
    listed = {variant.kernel for variant in offline.variants()}
    there = {
        getattr(module, name)
        for module in offline.modules()
        for name in module.__all__
        if name.endswith("_kernel")
    }
    assert listed == there


def test_every_constant_is_a_constant_of_its_kernel():
    for variant in offline.variants():
        assert set(variant.constants) <= set(variant.kernel.arg_names), variant.name
