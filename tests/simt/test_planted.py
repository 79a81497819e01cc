"""The harness catches planted mistakes: every broken kernel of planted.cu is caught, its repaired twin passes.

What the quick build finds by itself stands in `PLAIN`: an error, or values that differ between orders of threads
(VALUES). The watched build finds every one of them, in every order.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simt_harness import Device, SimtError, sanitizer_environment

SOURCE = Path(__file__).with_name("planted.cu")
COUNT, BLOCK = 128, 64
ORDERS = [(0, 1), (1, 1), (2, 2), (3, 2), (4, 1), (5, 2)]  # (seed, resident blocks)
VALUES = "wrong values in some order"
RACE = "race on shared memory, s, byte .* with no barrier|shared memory, s, which nobody has written"
MASK = "leaves out the caller's lane|which the mask leaves out"
STUCK = "deadlock|while lane|has returned"
ALL = {"race_between_blocks", "missing_fence"}  # reverse all numbers, the others each block's

# name: (what the watched build says, what the quick build says, or None where only the watch can see it)
CASES = {
    "missing_barrier": (RACE, VALUES),
    "missing_second_barrier": (RACE, VALUES),
    "missing_warp_barrier": (RACE, VALUES),
    "shuffle_for_a_barrier": (RACE, None),
    "mask_without_the_caller": (MASK, MASK),
    "mask_with_a_lane_elsewhere": (STUCK, STUCK),
    "mask_with_a_lane_that_left": (STUCK, STUCK),
    "shuffle_from_outside_the_mask": ("which the mask leaves out", "which the mask leaves out"),
    "shared_overrun": ("offset 256 of s .*, which has 256 bytes", "outside of its variables, after s"),
    "shared_overrun_by_reading": ("offset 256 of s .*, which has 256 bytes", VALUES),
    "dynamic_shared_overrun": ("piece 0.*, which has 256 bytes", "outside of its variables, after dynamic"),
    "more_dynamic_shared_than_launched": ("takes 516 bytes", "takes 516 bytes"),
    "uninitialised_shared": ("reads byte 20 of shared memory, s, which nobody", VALUES),
    "uninitialised_workspace": ("reads byte .* of global memory, scratch, which nobody", VALUES),
    "missing_copy_wait": ("of shared memory, s, which nobody has written", VALUES),
    "missing_bulk_wait": (RACE, VALUES),
    "bulk_copy_over_what_is_read": (RACE, VALUES),
    "barrier_short_of_an_arrival": ("waits in vain", "waits in vain"),
    "missing_product_wait": ("products that it never waited for", "products that it never waited for"),
    "divergent_barrier": ("waits at the barrier .* while others", "waits at the barrier .* while others"),
    "return_before_a_barrier": ("returned|have returned", "returned|have returned"),
    "barrier_that_a_warp_does_not_reach": ("deadlock(.|\n)*threads 3 to 3: wait in __syncwarp", "deadlock"),
    "race_between_blocks": ("race on global memory, scratch|scratch, which nobody", VALUES),
    "lost_update_between_blocks": ("race on global memory, ticket", None),
    "missing_fence": ("race on global memory, scratch", None),
    "buffer_overrun": (
        "at offset 512 of y, which has 512 bytes|race on global memory, y",
        "wrote outside of y",
    ),
    "buffer_overrun_by_reading": ("at offset 512 of x, which has 512 bytes", VALUES),
    "write_to_an_input": ("writes to x, which is an input", VALUES),
}


@pytest.fixture(scope="module", params=["plain", "watch"])
def library(request):
    return Device([SOURCE], request.param)


def run(device: Device, name: str, broken: bool, order: tuple[int, int]) -> bool:
    """Whether the numbers come out right."""
    device.configure(*order)
    values = np.arange(100, 100 + COUNT, dtype=np.int32)
    try:
        x = device.input(values, "x")
        y = device.output(COUNT, np.int32, "y")
        scratch = device.output(COUNT, np.int32, "scratch")
        ticket = device.input(np.zeros(1, np.uint32), "ticket", written=True)
        device.call("planted", name, broken, x, y, scratch, ticket)
        right = values[::-1] if name in ALL else values.reshape(-1, BLOCK)[:, ::-1].reshape(-1)
        return np.array_equal(y, right) and np.array_equal(x, values)
    finally:
        device.free()


def test_every_kernel_is_listed():
    kernels = re.findall(r"template <bool broken>\n__global__ void (\w+)", SOURCE.read_text())
    assert sorted(CASES) == sorted(kernels)


@pytest.mark.parametrize("name", CASES)
def test_broken_kernel_is_caught(library, name):
    watched, plain = CASES[name]
    if library.kind == "watch":
        for order in ORDERS:
            with pytest.raises(SimtError, match=watched):
                run(library, name, True, order)
    elif plain == VALUES:
        assert not all(run(library, name, True, order) for order in ORDERS)
    elif plain is not None:
        for order in ORDERS:
            with pytest.raises(SimtError, match=plain):
                run(library, name, True, order)


@pytest.mark.parametrize("name", CASES)
def test_repaired_kernel_passes(library, name):
    assert all(run(library, name, False, order) for order in ORDERS)


@pytest.mark.parametrize("name", [name for name in CASES if "overrun" in name])
@pytest.mark.parametrize("broken", [True, False], ids=["broken", "repaired"])
def test_address_sanitizer_sees_overruns(name, broken):
    program = (
        "import test_planted as t\n"
        "device = t.Device([t.SOURCE], 'sanitized')\n"
        f"assert t.run(device, {name!r}, {broken}, (1, 1))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=sanitizer_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if broken:
        assert result.returncode != 0
        assert re.search("AddressSanitizer: use-after-poison|index 64 out of bounds", result.stderr), (
            result.stderr
        )
    else:
        assert result.returncode == 0, result.stderr
