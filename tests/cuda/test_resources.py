"""What nvcc makes of every CUDA source: registers, shared memory, no local-memory stack and no spills.

Local memory is DRAM behind a cache: a list of neighbours that lands there is what makes a k-NN kernel slow. So
every kernel is in TUNED, where it may use none, or in FALLBACKS with the bytes it uses.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_resources"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
REGISTERS_OF_AN_SM = 65536
STATIC_SHARED = 48 << 10  # bytes

EMBEDDINGS = ("__nv_bfloat16", "__half", "float", "double")
BF16, F16, TF32, TF32X3 = range(4)  # of Product
TILE_PRODUCTS = ("float, 0", "float, 2", "float, 3", "double, 4")
# kernel -> (threads of a block, blocks that registers leave room for on a multiprocessor)
TUNED = {
    "conv_bn_act_pool.cu": {
        **{f"pool_sums<{X}>": (256, 6) for X in ("float", "double", "unsigned short")},
        **{
            f"pool_{name}<{product}, {X}>": (256, 1)
            for name in ("gram", "tiles", "x_gradient", "weight_gradient")
            for product, X in ((0, "float"), (0, "unsigned short"), (2, "float"), (3, "float"))
        },
        **{
            f"pool_{name}<4, double>": (128, 2) for name in ("gram", "tiles", "x_gradient", "weight_gradient")
        },
        **{f"pool_{name}<{T}>": (256, 4) for name in ("finish", "terms") for T in ("float", "double")},
    },
    "edge_conv.cu": {
        "conv_degrees": (256, 6),
        **{f"conv_centre<{T}>": (1024, 1) for T in ("float", "double")},
        "conv_subtract<float>": (256, 6),
        "conv_subtract<double>": (256, 5),
        **{
            f"conv_{name}<float, {x}>": (512, 2)
            for name in ("neighbor_sum", "max")
            for x in ("true", "false")
        },
        **{
            f"conv_{name}<double, {x}>": (512, 1)
            for name in ("neighbor_sum", "max")
            for x in ("true", "false")
        },
        "conv_moments<float, 1>": (256, 4),
        "conv_moments_tiles": (256, 2),
        "conv_moments<double, 1>": (256, 4),
        "conv_moments<double, 2>": (256, 3),
    },
    "edge_layer.cu": {
        f"layer_{name}<{T}>": (threads, 4)
        for name, threads in (
            *(
                ("sum_parts", 256),
                ("norm", 128),
                ("sums_norm", 128),
                ("affine", 256),
                ("pivot", 256),
                ("norm_gradient", 128),
                ("input_terms", 256),
            ),
            ("weight_gradient", 128),
        )
        for T in ("float", "double")
    },
    "edge_conv_backward.cu": {
        **{f"conv_winner_gradient<{T}>": (256, 4) for T in ("float", "double")},
        **{
            f"conv_dense_gradient<{T}, {x}>": (512, blocks)
            for T, blocks in (("float", 2), ("double", 1))
            for x in ("true", "false")
        },
        **{f"conv_route<{T}, {S}>": (256, 5) for T in ("float", "double") for S in ("int", "unsigned char")},
    },
    "edge_conv2.cu": {
        **{f"edges_activate<{T}>": (256, 5) for T in ("float", "double")},
        **{f"edges_max<{x}>": (128, 2) for x in TILE_PRODUCTS},
    },
    "edge_conv2_backward.cu": {
        **{f"edges_add_runs<{T}>": (256, 5) for T in ("float", "double")},
        **{f"edges_own<{x}>": (128, 2) for x in TILE_PRODUCTS},
        **{f"edges_neighbour<{x}>": (128, 2) for x in TILE_PRODUCTS},
        **{f"edges_products<{x}>": (128, 3) for x in TILE_PRODUCTS},
    },
    "knn.cu": {
        "knn_general<float>": (128, 3),
        "knn_general<double>": (128, 2),
        "knn_cloud<3, true>": (128, 3),
        "knn_cloud<3, false>": (128, 4),
        "knn_cloud<8, true>": (128, 3),
        "knn_cloud<8, false>": (128, 3),
    },
    "knn_filter.cu": {
        "knn_filter<8>": (512, 1),
        "knn_filter<4>": (512, 1),
        "filter_pack": (128, 6),
        "filter_centre": (256, 4),
    },
    "knn_tree.cu": {
        "knn_tree": (128, 6),
        "tree_divide": (1024, 1),
        "tree_encode": (512, 3),
        "tree_plant": (128, 12),
        "tree_grow": (128, 12),
    },
    "gather_max.cu": {
        "find_most<float, 4>": (256, 4),
        "find_most<float, 1>": (256, 4),
        "find_most<double, 2>": (256, 4),
        "find_most<double, 1>": (256, 4),
        "sum_winners<float, 4>": (256, 4),
        "sum_winners<float, 1>": (256, 4),
        "sum_winners<double, 2>": (256, 4),
        "sum_winners<double, 1>": (256, 4),
    },
    "neighbor_sum.cu": {
        "sum_neighbours<float, 4>": (256, 4),
        "sum_neighbours<float, 1>": (256, 4),
        "sum_neighbours<double, 2>": (256, 4),
        "sum_neighbours<double, 1>": (256, 4),
        "sum_turned<float, 4>": (256, 4),
        "sum_turned<float, 1>": (256, 4),
        "sum_turned<double, 2>": (256, 4),
        "sum_turned<double, 1>": (256, 4),
    },
    "nt_xent.cu": {
        **{f"contrast_rows<{T}, 0>": (256, 5) for T in EMBEDDINGS},
        **{f"contrast_rows<{T}, 1>": (256, 5) for T in EMBEDDINGS[:3]},
        **{f"contrast_cosines<{T}>": (256, 6) for T in EMBEDDINGS},
        **{f"contrast_row_sums<{P}, {rows}>": (256, 1) for P in (BF16, F16) for rows in (128, 64)},
        **{f"contrast_row_sums<{TF32}, {rows}>": (256, 1) for rows in (128, 32)},
        **{f"contrast_row_sums<{TF32X3}, {rows}>": (256, 1) for rows in (64, 32)},
    },
    "nt_xent_backward.cu": {
        **{
            f"contrast_row_gradient<{P}, Cut<{cut}> >": (256, blocks)
            for P in (BF16, F16)
            for cut, blocks in (
                ("64, 64, 1, 128, 2, 2", 2),
                ("128, 64, 1, 256, 2, 1", 1),
                ("32, 16, 4, 1024, 2, 1", 1),
            )
        },
        **{
            f"contrast_row_gradient<{P}, Cut<{cut}> >": (256, 1)
            for P in (TF32, TF32X3)
            for cut in ("64, 32, 1, 256, 2, 1", "16, 16, 8, 1024, 1, 1")
        },
        **{f"contrast_end<{T}, {'double' if T == 'double' else 'float'}>": (256, 3) for T in EMBEDDINGS},
    },
    "nt_xent_plain.cu": {
        **{
            f"contrast_plain_row_{what}<{T}, {'double' if T == 'double' else 'float'}>": (256, blocks)
            for what, blocks in (("sums", 4), ("gradient", 2))
            for T in EMBEDDINGS
        },
    },
    # On processors that are not its own these are a trap.
    "nt_xent_wgmma.cu": {
        f"contrast_wgmma_row_{what}<{P}, Cut<{cut}> >": (384, 1)
        for what, cuts in (
            ("sums", ("64, 128, 4", "128, 128, 4", "256, 128, 2")),
            ("gradient", ("64, 64, 4", "128, 64, 4", "256, 64, 4")),
        )
        for P in (BF16, F16)
        for cut in cuts
    },
    "reverse_graph.cu": {
        "list_edges": (256, 6),
        "mark_starts": (256, 6),
        "sort_cloud": (512, 4),
    },
    "radix_sort.cu": {
        "sort_sum": (1024, 1),
        "sort_place": (256, 4),
    },
}
# kernel -> bytes of local memory of a thread
FALLBACKS: dict[str, dict[str, int]] = {}

NVCC = shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.access(p, os.X_OK)), None)
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no CUDA compiler (nvcc) on PATH or in /usr/local/cuda"),
    pytest.mark.timeout(2400),  # the first test compiles everything
]


class Kernel(NamedTuple):
    stack: int  # bytes of local memory of a thread
    spilled: int  # bytes stored
    registers: int
    shared: int  # bytes of static shared memory of a block


def parse(report: str) -> dict[str, Kernel]:
    """`ptxas -v` by kernel, its own functions included: name without namespace and parameters -> Kernel."""
    mangled, stack, spilled, found = None, {}, {}, {}
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            mangled = match[1]
            stack[mangled] = spilled[mangled] = 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            stack[mangled] = max(stack[mangled], int(match[1]))
            spilled[mangled] += int(match[2])
            if mangled in found:  # of a function that the kernel calls: it comes after the kernel's own
                found[mangled] = found[mangled]._replace(stack=stack[mangled], spilled=spilled[mangled])
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            cumulative = re.search(r"(\d+) bytes cumulative stack", line)
            found[mangled] = Kernel(
                max(stack[mangled], int(cumulative[1]) if cumulative else 0),
                spilled[mangled],
                int(match[1]),
                int(shared[1]) if shared else 0,
            )
    command = ["c++filt", *found]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # A value of an enumeration is written (type)number.
    plain = [re.sub(r"\(anonymous namespace\)::|crosspoint::cuda::|\([\w:]+\)(?=\d)", "", n) for n in names]
    return {re.search(r"(\w+(?:<[^()]*>)?)\(", n)[1]: k for n, k in zip(plain, found.values(), strict=True)}


def command_of(source: Path, architecture: str) -> list[str]:
    """As setup.py compiles it."""
    spec = importlib.util.spec_from_file_location("crosspoint_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    capability = f"{architecture[3:-1]}.{architecture[-1]}"
    of_one = setup.Cuda(Path(), "", (capability,)).gencode(source)
    return [NVCC, *setup.NVCC_FLAGS, *of_one, f"-I{CSRC}", f"-I{CSRC / 'include'}", str(source)]


def compile_kernels(source: Path, architecture: str) -> dict[str, Kernel]:
    return parse(report_of(source, architecture))


def report_of(source: Path, architecture: str) -> str:
    """What ptxas says of a source, kept by the content of everything that goes into it."""
    command = [*command_of(source, architecture), "-cubin", "-Xptxas=-v"]
    content = hashlib.sha256(" ".join(command).encode())
    content.update(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
    headers = [p for p in sorted(CSRC.rglob("*.h")) if not {"cpu", "torch"} & set(p.relative_to(CSRC).parts)]
    for path in [source, *headers]:
        content.update(path.read_bytes())
    kept = CACHE / f"{source.stem}-{architecture}-{content.hexdigest()[:16]}.txt"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        cubin = kept.with_suffix(f".{os.getpid()}.cubin")
        done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        cubin.unlink()
        kept.write_text(done.stderr)
    return kept.read_text()


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, Kernel]]:
    pairs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        kernels = pool.map(lambda pair: compile_kernels(*pair), pairs)
        return {
            (source.name, architecture): k for (source, architecture), k in zip(pairs, kernels, strict=True)
        }


def test_every_source_and_kernel_is_in_the_tables(compiled):
    assert {source.name for source in SOURCES} == TUNED.keys() | FALLBACKS.keys()
    for (source, architecture), kernels in compiled.items():
        tabled = TUNED.get(source, {}).keys() | FALLBACKS.get(source, {}).keys()
        assert kernels, f"{source} has no kernel for {architecture}"
        assert kernels.keys() == tabled, f"{source} for {architecture}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", TUNED)
def test_tuned_kernels_use_no_local_memory(compiled, source, architecture):
    for name in TUNED[source]:
        kernel = compiled[source, architecture][name]
        assert (kernel.stack, kernel.spilled) == (0, 0), f"{name}: {kernel}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", TUNED)
def test_registers_and_shared_memory_leave_room(compiled, source, architecture):
    for name, (threads, blocks) in TUNED[source].items():
        kernel = compiled[source, architecture][name]
        rounded = -(-kernel.registers // 8) * 8  # registers are handed out by eights
        assert rounded * threads * blocks <= REGISTERS_OF_AN_SM, f"{name}: {kernel}"
        assert kernel.shared <= STATIC_SHARED, f"{name}: {kernel}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fallbacks_use_the_local_memory_that_is_listed(compiled, architecture):
    for source, kernels in FALLBACKS.items():
        for name, stack in kernels.items():
            assert 0 < compiled[source, architecture][name].stack <= stack


def test_hopper_multiplies_by_warpgroups(compiled, tmp_path):
    """Only where registers that products are under way in are left alone: else ptxas serialises them, and says so."""
    source = CSRC / "cuda" / "nt_xent_wgmma.cu"
    done = subprocess.run(
        [*command_of(source, "sm_90"), "-ptx", "-o", str(tmp_path / "hopper.ptx")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = (tmp_path / "hopper.ptx").read_text().split(".entry ")[1:]
    assert len(kernels) == len(TUNED[source.name])
    for kernel in kernels:
        width, columns, _ = map(int, re.findall(r"Li(\d+)E", kernel.partition("(")[0])[-3:])
        gradient = "row_gradient" in kernel.partition("(")[0]
        products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32", kernel)
        expected = [columns] * (width // 16) + ([width] * (columns // 16) if gradient else [])
        assert list(map(int, products)) == expected
        assert "cp.async.bulk.shared::cluster.global.mbarrier" in kernel
        assert ("setmaxnreg.inc" in kernel) == ("setmaxnreg.dec" in kernel) == gradient
        assert "ld.local" not in kernel and "st.local" not in kernel
    assert "erialized" not in report_of(source, "sm_90")


def test_local_memory_is_seen(tmp_path):
    """A list with a running index lies in local memory: the report must say so."""
    source = tmp_path / "local.cu"
    source.write_text("""
__global__ void lists(const float* x, const int* place, float* out, int n) {
  float list[64];
  for (int i = 0; i < 64; ++i) list[i] = 0;
  for (int i = 0; i < n; ++i) list[place[i]] += x[i];
  for (int i = 0; i < n; ++i) out[i] = list[place[n - i]];
}
__device__ __noinline__ float called(const int* place, int n) {
  float list[32];
  for (int i = 0; i < 32; ++i) list[i] = i;
  for (int i = 0; i < n; ++i) list[place[i]] += 1;
  return list[place[n]];
}
__global__ void calls(const int* place, float* out, int n) { out[0] = called(place, n) + called(place + 1, n); }
""")
    kernels = compile_kernels(source, "sm_90")
    assert kernels.keys() == {"lists", "calls"}
    assert kernels["lists"].stack >= 256
    assert kernels["calls"].stack >= 128
