// Kernels of well-known kinds, for the harness's own tests: each uses another part of what it emulates.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/mma.h"

using namespace crosspoint::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

__device__ float warp_sum(float x) {
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

__device__ float block_sum(float x) {
  CROSSPOINT_SHARED(partial, float[32]);
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = static_cast<int>(threadIdx.x) < warps ? partial[threadIdx.x] : 0.0f;
  if (threadIdx.x < kWarp) x = warp_sum(x);
  return x;
}

// The last block to finish adds up what the others left: memory is ordered by fences around the ticket.
__global__ void sum(const float* x, int64_t n, float* partial, unsigned* ticket, float* total) {
  CROSSPOINT_SHARED(last, bool);
  float mine = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) mine += x[i];
  const float whole = block_sum(mine);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = whole;
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float all = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) all += partial[b];
    *total = all;
  }
}

// Inclusive scan of each row, a block per row, through warp scans.
__global__ void scan(const int* x, int columns, int* y) {
  CROSSPOINT_SHARED(totals, int[32]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = static_cast<int>(threadIdx.x);
  int value = column < columns ? x[blockIdx.x * columns + column] : 0;
  for (int by = 1; by < kWarp; by *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, by);
    if (lane >= by) value += other;
  }
  if (lane == kWarp - 1) totals[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += totals[w];
  if (column < columns) y[blockIdx.x * columns + column] = value;
}

__global__ void transpose(const float* x, int rows, int columns, float* y) {
  CROSSPOINT_SHARED(tile, float[32][33]);
  const int row = static_cast<int>(blockIdx.y * 32 + threadIdx.y), column = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  for (int i = 0; i < 32; i += 8)
    if (row + i < rows && column < columns) tile[threadIdx.y + i][threadIdx.x] = x[(row + i) * columns + column];
  __syncthreads();
  const int to_row = static_cast<int>(blockIdx.x * 32 + threadIdx.y), to_column = static_cast<int>(blockIdx.y * 32 + threadIdx.x);
  for (int i = 0; i < 32; i += 8)
    if (to_row + i < columns && to_column < rows) y[(to_row + i) * rows + to_column] = tile[threadIdx.x][threadIdx.y + i];
}

// Counts of each value: lanes with the same one elect a leader, shared counters, then global ones.
__global__ void histogram(const int* x, int n, int bins, int* counts) {
  SharedArena arena;
  int* mine = arena.take<int>(bins);
  for (int i = static_cast<int>(threadIdx.x); i < bins; i += static_cast<int>(blockDim.x)) mine[i] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const unsigned active = __ballot_sync(kAllLanes, i < n);
  if (i < n) {
    const unsigned same = __match_any_sync(active, x[i]);
    if (__ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x % kWarp)) atomicAdd(&mine[x[i]], __popc(same));
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < bins; b += static_cast<int>(blockDim.x))
    if (mine[b] != 0) atomicAdd(&counts[b], mine[b]);
}

// c (16 m, 8 n) = a (rows, depth) b (columns, depth)^T with a warp per tile; bf16 operands by ldmatrix, from shared
// memory that cp.async fills one step ahead.
__global__ void product_bf16(const uint16_t* a, const uint16_t* b, int depth, int columns, float* c) {
  SharedArena arena;
  uint16_t* left = arena.take<uint16_t>(2 * 16 * 16);
  uint16_t* right = arena.take<uint16_t>(2 * 8 * 16);
  const int lane = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.y) * 16, column = static_cast<int>(blockIdx.x) * 8;
  const auto fetch = [&](int k, int stage) {
    cp_async<16>(left + stage * 256 + lane / 2 * 16 + lane % 2 * 8, a + (row + lane / 2) * depth + k + lane % 2 * 8);
    if (lane < 16)
      cp_async<16>(right + stage * 128 + lane / 2 * 16 + lane % 2 * 8, b + (column + lane / 2) * depth + k + lane % 2 * 8);
    cp_async_commit();
  };
  float d[4] = {};
  fetch(0, 0);
  for (int k = 0, stage = 0; k < depth; k += 16, stage ^= 1) {
    if (k + 16 < depth) {
      fetch(k + 16, stage ^ 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();
    uint32_t fa[4], fb[2];
    ldmatrix_x4(fa, left + stage * 256 + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x2(fb, right + stage * 128 + lane % 8 * 16 + lane / 8 % 2 * 8);
    mma_bf16(d, fa, fb);
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) c[(row + lane / 4 + i / 2 * 8) * columns + column + lane % 4 * 2 + i % 2] = d[i];
}

__global__ void product_tf32(const float* a, const float* b, int depth, int columns, float* c) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const int row = static_cast<int>(blockIdx.y) * 16, column = static_cast<int>(blockIdx.x) * 8;
  float d[4] = {};
  for (int k = 0; k < depth; k += 8) {
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) fa[i] = to_tf32(a[(row + g + i % 2 * 8) * depth + k + t + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) fb[i] = to_tf32(b[(column + g) * depth + k + t + i * 4]);
    mma_tf32(d, fa, fb);
  }
  for (int i = 0; i < 4; ++i) c[(row + g + i / 2 * 8) * columns + column + t * 2 + i % 2] = d[i];
}

// Rounds to both half types, and back.
__global__ void round_trip(const float* x, int n, uint16_t* half, uint16_t* bf16, float* from_half, float* from_bf16) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const __half h = __float2half_rn(x[i]);
  const __nv_bfloat16 b = __float2bfloat16_rn(x[i]);
  half[i] = __half_as_ushort(h);
  bf16[i] = __bfloat16_as_ushort(b);
  from_half[i] = __half2float(h);
  from_bf16[i] = __bfloat162float(b);
}

// Row r of y from row r of x, its place counted in 64 bits or, wrongly, in 32.
__global__ void copy_rows(const float* x, int columns, bool narrow, float* y) {
  const int column = static_cast<int>(threadIdx.x);
  const int64_t at = narrow ? static_cast<int>(blockIdx.x * columns) : blockIdx.x * int64_t(columns);
  if (column < columns) y[at + column] = x[at + column];
}

}  // namespace

EXPORT cudaError_t sample_sum(const float* x, int64_t n, int64_t blocks, float* partial, unsigned* ticket, float* total) {
  cudaMemsetAsync(ticket, 0, sizeof *ticket);
  return launch(sum, static_cast<unsigned>(blocks), 128, 0, nullptr, x, n, partial, ticket, total);
}

EXPORT cudaError_t sample_scan(const int* x, int64_t rows, int64_t columns, int* y) {
  return launch(scan, static_cast<unsigned>(rows), static_cast<unsigned>((columns + 31) / 32 * 32), 0, nullptr, x, columns, y);
}

EXPORT cudaError_t sample_transpose(const float* x, int64_t rows, int64_t columns, float* y) {
  const dim3 grid(static_cast<unsigned>(columns + 31) / 32, static_cast<unsigned>(rows + 31) / 32);
  return launch(transpose, grid, dim3(32, 8), 0, nullptr, x, rows, columns, y);
}

EXPORT cudaError_t sample_histogram(const int* x, int64_t n, int64_t bins, int* counts) {
  cudaMemsetAsync(counts, 0, bins * sizeof *counts);
  return launch(histogram, static_cast<unsigned>((n + 95) / 96), 96, shared_bytes<int>(bins), nullptr, x, n, bins, counts);
}

EXPORT cudaError_t sample_product_bf16(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t columns, int64_t depth, float* c) {
  const size_t shared = shared_bytes<uint16_t>(512) + shared_bytes<uint16_t>(256);
  const dim3 grid(static_cast<unsigned>(columns / 8), static_cast<unsigned>(rows / 16));
  return launch(product_bf16, grid, 32, shared, nullptr, a, b, depth, columns, c);
}

EXPORT cudaError_t sample_product_tf32(const float* a, const float* b, int64_t rows, int64_t columns, int64_t depth, float* c) {
  const dim3 grid(static_cast<unsigned>(columns / 8), static_cast<unsigned>(rows / 16));
  return launch(product_tf32, grid, 32, 0, nullptr, a, b, depth, columns, c);
}

EXPORT cudaError_t sample_round_trip(const float* x, int64_t n, uint16_t* half, uint16_t* bf16, float* from_half, float* from_bf16) {
  return launch(round_trip, static_cast<unsigned>((n + 255) / 256), 256, 0, nullptr, x, n, half, bf16, from_half, from_bf16);
}

EXPORT cudaError_t sample_copy_rows(const float* x, int64_t rows, int64_t columns, int64_t narrow, float* y) {
  return launch(copy_rows, static_cast<unsigned>(rows), 64, 0, nullptr, x, columns, narrow != 0, y);
}
