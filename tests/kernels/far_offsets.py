"""Triton kernels beyond 2^31 elements, interpreted: python far_offsets.py knn | gather | narrow

Every launch of a call on one small cloud is repeated as the last of so many clouds that the offsets to it do not fit 32
bits, in tensors of zeros that take memory only where they are touched. What it writes must be the same.
"""

import builtins
import math
import mmap
import sys

import conftest  # noqa: F401  mends the interpreter for numpy
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from crosspoint.kernels import gather_max, knn, knn_direct, knn_filter, knn_tree, neighbor_sum

FAR = 1 << 31
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux
run_here = interpreter.GridExecutor.__call__
seen: set[str] = set()


def far(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros, with more of them before: offsets that wrap around in 32 bits land there."""
    before = FAR * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, before + math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, offset=before).view(shape)


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def run_here_and_far(self, *args, **kwargs) -> None:
    """In place of an executor's call: every tensor has one cloud, or one program's workspace, in front."""
    given = [x.clone() if isinstance(x, Tensor) else x for x in args]
    run_here(self, *args, **kwargs)
    per_cloud = [math.prod(x.shape[1:]) for x in given if isinstance(x, Tensor)]
    assert all(len(x) == 1 for x in given if isinstance(x, Tensor)), [x.shape for x in given]
    clouds = FAR // min(size for size in per_cloud if size > 2) + 2
    there = [far((clouds, *x.shape[1:]), x.dtype) if isinstance(x, Tensor) else x for x in given]
    for near, x in zip(given, there, strict=True):
        if isinstance(x, Tensor):
            x[-1] = near[0]
    if "n_block" in self.arg_names:
        there[self.arg_names.index("n_block")] *= clouds
    last = self.grid[0]

    def only_last(*bounds: int) -> range:
        if bounds == (last * clouds,):
            return builtins.range(last * (clouds - 1), last * clouds)
        return builtins.range(*bounds)

    interpreter.range = only_last
    grid = (last * clouds, *self.grid[1:])
    run_here(interpreter.GridExecutor(self.fn, self.arg_names, grid), *there, **kwargs)
    del interpreter.range
    seen.add(self.fn.__name__)
    for name, near, x in zip(self.arg_names, args, there, strict=False):
        if isinstance(x, Tensor):
            assert torch.equal(bits(near[0]), bits(x[-1])), f"{self.fn.__name__}: {name}"


def cloud(points: int, channels: int) -> Tensor:
    return torch.randn(1, points, channels, generator=torch.Generator().manual_seed(points))


def kernels_of(*modules) -> set[str]:
    return {name for module in modules for name in module.__all__ if name.endswith("_kernel")}


def search() -> None:
    """By every kernel of k-NN."""
    knn.programs = knn_tree.programs = lambda blocks, *_, **__: blocks
    lengths = torch.tensor([35])
    knn.knn_graph(cloud(40, 6), 20, lengths, True)  # direct
    knn.knn(cloud(30, 3), cloud(40, 3), 130, None, lengths)  # merge
    knn.knn(cloud(30, 3).double(), cloud(40, 3).double(), 3, lengths - 9, None)  # sweep
    knn.knn_graph(cloud(40, 17), 20, lengths, False)  # filter
    knn_tree.LEAST = 0
    knn.knn_graph(cloud(60, 3), 20, None, True)
    knn.knn(cloud(30, 3), cloud(50, 3), 20, None, None)
    assert seen == kernels_of(knn_direct, knn_filter, knn_tree), seen


def gather() -> None:
    idx = torch.randint(-1, 40, (1, 40, 5), generator=torch.Generator().manual_seed(0))
    x = cloud(40, 6)
    _, slots = gather_max.gather_max(x, idx)
    gather_max.gather_max_backward(x, idx, slots, 40)
    neighbor_sum.neighbor_sum(x, idx)
    neighbor_sum.neighbor_sum_backward(x, idx, 40)
    assert seen == kernels_of(gather_max, neighbor_sum), seen


@triton.jit
def narrow_kernel(p_x, p_y, N):
    o_all = tl.program_id(0) * N + tl.arange(0, 64)
    m_here = tl.arange(0, 64) < N
    tl.store(p_y + o_all, tl.load(p_x + o_all, mask=m_here), mask=m_here)


def narrow() -> None:
    """A product of 32 bits, which must be found."""
    x = cloud(40, 1)[..., 0]
    narrow_kernel[(1,)](x, torch.zeros_like(x), 40)


if __name__ == "__main__":
    interpreter.GridExecutor.__call__ = run_here_and_far
    {"knn": search, "gather": gather, "narrow": narrow}[sys.argv[1]]()
