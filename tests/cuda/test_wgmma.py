"""Where csrc/cuda/panels.h puts rows, and what its descriptors say, read as the PTX manual says that wgmma reads."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SOURCE = """
#include "cuda/panels.h"
using namespace crosspoint::cuda;
extern "C" {
int panel(int row, int group) { return panel_byte(row, group); }
long long line(long long count, long long width, long long i, long long p) {
  return PanelledRows{count, width}.line(i, p);
}
long long group(long long count, long long width, long long i, long long g) {
  return PanelledRows{count, width}.group(i, g);
}
unsigned long long descriptor(unsigned address, unsigned leading) { return panel_descriptor(address, leading); }
}
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panels")
    (folder / "panels.cpp").write_text(SOURCE)
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{ROOT / 'csrc'}",
        "panels.cpp",
        "-o",
        "panels.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "panels.so"))
    library.line.restype = library.group.restype = ctypes.c_longlong
    library.line.argtypes = library.group.argtypes = [ctypes.c_longlong] * 4
    library.descriptor.restype = ctypes.c_ulonglong
    return library


class Operand:
    """A descriptor's fields, as the manual lists them, and the elements that they name in shared memory."""

    def __init__(self, descriptor: int) -> None:
        def bits(first: int, last: int) -> int:
            return descriptor >> first & (1 << last - first + 1) - 1

        self.start, self.leading, self.stride = (bits(first, first + 13) << 4 for first in (0, 16, 32))
        self.base, self.swizzle = bits(49, 51), bits(62, 63)
        assert bits(14, 15) == bits(30, 31) == bits(46, 48) == bits(52, 61) == 0

    def element(self, memory: np.ndarray, i: int, k: int, *, k_major: bool) -> int:
        """Of 16 bits at i along M or N, k along the depth, in an operand with the 128-byte swizzle (1)."""
        assert (self.base, self.swizzle) == (0, 1)
        if k_major:  # atoms of 8 rows by 128 bytes of the depth, `stride` from one to the next
            address = self.start + i // 8 * self.stride + i % 8 * 128 + 2 * k
        else:  # atoms of 64 along MN by 8 of the depth; `leading` along MN, `stride` along the depth
            address = self.start + i // 64 * self.leading + k // 8 * self.stride + k % 8 * 128 + i % 64 * 2
        address ^= (address >> 7 & 7) << 4
        return int(memory[address // 2])


@pytest.mark.parametrize("rows, width", [(64, 64), (64, 256), (128, 128)])
def test_descriptors_read_what_was_put_into_panels(layout, rows, width):
    """A tile of columns, 16 bits that number row and channel, from some multiple of 1,024 bytes on."""
    begin, panel = 3 << 10, rows * 128
    memory = np.full(begin // 2 + rows * width, -1, np.int64)
    for i in range(rows):
        for c in range(width):
            at = begin + c // 64 * panel + layout.panel(i, c % 64 // 8) + c % 8 * 2
            assert memory[at // 2] == -1
            memory[at // 2] = i * width + c
    for c in range(0, width, 16):  # the first product: the depth goes along a row
        operand = Operand(layout.descriptor(begin + c // 64 * panel + c % 64 * 2, 16))
        for i in range(rows):
            assert [operand.element(memory, i, k, k_major=True) for k in range(16)] == [
                i * width + c + k for k in range(16)
            ]
    for first in range(0, rows, 16):  # the second: it goes down the rows
        operand = Operand(layout.descriptor(begin + first * 128, panel))
        for c in range(width):
            assert [operand.element(memory, c, k, k_major=False) for k in range(16)] == [
                (first + k) * width + c for k in range(16)
            ]


@pytest.mark.parametrize("count", [1, 64, 127, 128, 129, 300])
@pytest.mark.parametrize("width", [64, 256])
def test_any_run_of_a_blocks_rows_is_one_piece_of_each_panel(layout, count, width):
    """And lies there as it will in shared memory, so that a copy moves no byte of it."""
    starts = {}
    for i in range(count):
        for g in range(width // 8):
            at = layout.group(count, width, i, g)
            assert at % 16 == 0
            starts[at] = (i, g)
            line = layout.line(count, width, i, g // 8)
            assert at - line == layout.panel(i % 128, g % 8) - i % 128 * 128
            if i % 128:
                assert line == layout.line(count, width, i - 1, g // 8) + 128
    assert sorted(starts) == list(range(0, count * width * 2, 16)), "every byte of the view, and none twice"
