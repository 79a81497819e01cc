"""Every Triton kernel with every entry of its launch table, compiled for GPUs that need not be there."""

import platform
import sys

import pytest

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton has no package for this platform", allow_module_level=True)

import offline

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
each = pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
names = pytest.mark.parametrize("variant", offline.variants(), ids=lambda variant: variant.name)


@pytest.fixture(scope="module")
def compiled():
    return offline.compile_all()


@each
@names
@pytest.mark.timeout(900)
def test_fits_the_processor(compiled, variant, architecture):
    result = compiled[variant.name, architecture]
    assert result.stack == 0, f"{result.stack} bytes of local memory at {result.registers} registers"
    assert result.shared <= SHARED_MEMORY[architecture]


@each
@names
def test_products_run_on_tensor_cores(compiled, variant, architecture):
    instruction = TENSOR_CORES[architecture]
    assert (instruction in compiled[variant.name, architecture].ptx) == variant.tensor_cores


def test_every_kernel_is_listed():
    from crosspoint.kernels import gather_max, knn_direct, knn_filter, neighbor_sum

    modules = (gather_max, knn_direct, knn_filter, neighbor_sum)
    listed = {variant.kernel.__name__ for variant in offline.variants()}
    assert listed == {name for module in modules for name in module.__all__ if name.endswith("_kernel")}


def test_every_constant_is_a_constant_of_its_kernel():
    for variant in offline.variants():
        assert set(variant.constants) <= set(variant.kernel.arg_names), variant.name
