"""What the Triton kernels share: the order of keys, sorting, and where they run.

Names in kernels: `i_` program ids and scalars of the grid, `o_` offsets, `p_` pointers, `m_` masks, `b_` block values.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "MISSING",
    "device_of",
    "gather_blocks",
    "log2",
    "merge_rows",
    "programs",
    "rows_of_block",
    "rows_of_program",
    "sort_rows",
    "widened",
]

# Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1): on the CPU, slowly, to test them.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# The key of a point that is not there: after every other.
MISSING = tl.constexpr(0x7FFFFFFFFFFFFFFF)


def rows_of_block(rows: int) -> int:
    """The launch table's, but for the interpreter, whose time goes by operations and not by elements."""
    return max(rows, 64) if INTERPRETED else rows


def widened(x: torch.Tensor) -> torch.Tensor:
    """x as contiguous float64, if it is that, or float32."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


def gather_blocks(clouds: int, rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel that gathers rows: 1,024 values of one cloud a program, in up to 64 channels."""
    width = min(max(triton.next_power_of_2(channels), 4), 64)
    height = rows_of_block(1024 // width)
    blocks = clouds * triton.cdiv(rows, height), triton.cdiv(channels, width)
    return blocks, {"ROWS": height, "CHANNELS": width}


@triton.jit
def rows_of_program(n, ROWS: tl.constexpr):
    """The cloud of this program, which of its n rows are worked on, and which of them exist. Divisions are of 32 bits:
    those of 64 are calls, which need a stack."""
    n_block = tl.cdiv(n, ROWS)
    o_own = (tl.program_id(0) % n_block) * ROWS + tl.arange(0, ROWS)
    return (tl.program_id(0) // n_block).to(tl.int64), o_own, o_own < n


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes x's device the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def programs(blocks: int, x: torch.Tensor, per_processor: int) -> int:
    """How many programs share `blocks` blocks of work that each needs a workspace."""
    if not x.is_cuda:
        return min(blocks, 2)
    return min(blocks, per_processor * torch.cuda.get_device_properties(x.device).multi_processor_count)


@triton.constexpr_function
def log2(n: int) -> int:
    """Of a power of two."""
    return n.bit_length() - 1


@triton.jit
def dot(b_left, b_right):
    """The product of two bfloat16 blocks in float32: every product exact, sums as tensor cores take them. The
    interpreter would read bfloat16 as integers, so there the operands are widened, which changes none of them."""
    if INTERPRETED:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _exchange(
    b_keys,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    DOWN: tl.constexpr,
):
    """Compares each key with the one STRIDE away; blocks of BLOCK keys rise and fall in turn."""
    b_own = tl.reshape(b_keys, [ROWS, WIDTH // (2 * STRIDE), 2, STRIDE])
    b_other = tl.sum(b_own, 2, keep_dims=True) - b_own
    o_half = tl.arange(0, 2)[None, None, :, None]
    o_pair = tl.arange(0, WIDTH // (2 * STRIDE))[None, :, None, None]
    m_larger = (((o_pair * (2 * STRIDE)) // BLOCK) % 2 ^ o_half ^ DOWN) != 0
    b_own = tl.where((b_own > b_other) != m_larger, b_other, b_own)
    return tl.reshape(b_own, [ROWS, WIDTH])


@triton.jit
def merge_rows(b_keys, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sorts rows that first rise and then fall, or the other way round (WIDTH a power of two)."""
    LOG: tl.constexpr = log2(WIDTH)
    for i in tl.static_range(LOG):
        b_keys = _exchange(b_keys, ROWS, WIDTH, WIDTH >> (i + 1), WIDTH, 0)
    return b_keys


@triton.jit
def sort_rows(b_keys, ROWS: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr = 0):
    """Sorts each row of (ROWS, WIDTH) integer keys, WIDTH a power of two; bitonic, and so the same every time."""
    LOG: tl.constexpr = log2(WIDTH)
    for i in tl.static_range(LOG):
        for j in tl.static_range(i + 1):
            b_keys = _exchange(b_keys, ROWS, WIDTH, 1 << (i - j), 2 << i, DOWN)
    return b_keys
