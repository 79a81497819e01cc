#include "cuda/radix_sort.h"

namespace crosspoint::cuda {
namespace {

constexpr int kSortThreads = kDigits;  // one for each digit
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kSortSteps = kSortTile / kSortThreads;  // pairs of a thread

// counts (segment, digit, tile)
__global__ void __launch_bounds__(kSortThreads) sort_count(Segments s, const uint32_t* keys, int shift, int* counts) {
  CROSSPOINT_SHARED(count, int[kDigits]);
  const int64_t b = blockIdx.x / s.tiles;
  const int tile = blockIdx.x % s.tiles, n = s.size(b), digit = threadIdx.x;
  count[digit] = 0;
  __syncthreads();
  for (int step = 0; step < kSortSteps; ++step) {
    const int i = tile * kSortTile + step * kSortThreads + static_cast<int>(threadIdx.x);
    if (i < n) atomicAdd(&count[keys[b * s.stride + i] >> shift & (kDigits - 1)], 1);
  }
  __syncthreads();
  counts[(b * kDigits + digit) * s.tiles + tile] = count[digit];
}

// Makes each count the sum of those of the tiles before; totals (segment, digit).
__global__ void __launch_bounds__(kSortThreads) sort_sum(Segments s, int* counts, int* totals) {
  const int64_t row = blockIdx.x * int64_t(kSortWarps) + threadIdx.x / kWarp;  // (segment, digit)
  int sum = 0;
  for (int first = 0; first < s.tiles; first += kWarp) {
    const int tile = first + lane_id();
    const int count = tile < s.tiles ? counts[row * s.tiles + tile] : 0;
    int all;
    const int before = sum_before(count, all);
    if (tile < s.tiles) counts[row * s.tiles + tile] = sum + before;
    sum += all;
  }
  if (lane_id() == 0) totals[row] = sum;
}

__global__ void __launch_bounds__(kSortThreads) sort_place(Segments s, Pairs from, Pairs to, int shift,
                                                           const int* counts, const int* totals) {
  CROSSPOINT_SHARED(next, int[kSortWarps][kDigits]);  // where each warp's next pair of a digit goes
  CROSSPOINT_SHARED(sums, int[kSortWarps]);
  const int64_t b = blockIdx.x / s.tiles;
  const int tile = blockIdx.x % s.tiles, n = s.size(b);
  const int warp = threadIdx.x / kWarp, lane = lane_id(), first = tile * kSortTile + warp * kSortSteps * kWarp + lane;
  for (int w = 0; w < kSortWarps; ++w) next[w][threadIdx.x] = 0;
  __syncthreads();

  uint32_t key[kSortSteps];
  unsigned peers[kSortSteps];  // lanes with the same digit
#pragma unroll
  for (int step = 0; step < kSortSteps; ++step) {
    const int i = first + step * kWarp;
    key[step] = i < n ? from.keys[b * s.stride + i] : 0;
    const unsigned digit = key[step] >> shift & (kDigits - 1);
    peers[step] = __match_any_sync(kAllLanes, i < n ? digit : kDigits);
    if (i < n && votes_before(peers[step]) == 0) next[warp][digit] += __popc(peers[step]);
    __syncwarp();
  }
  const int digit = threadIdx.x, own = totals[b * kDigits + digit];
  int all;
  int place = sum_before(own, all);
  if (lane == 0) sums[warp] = all;
  __syncthreads();
  for (int w = 0; w < warp; ++w) place += sums[w];
  place += counts[(b * kDigits + digit) * s.tiles + tile];
  for (int w = 0; w < kSortWarps; ++w) {
    const int count = next[w][digit];
    next[w][digit] = place;
    place += count;
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kSortSteps; ++step) {
    const int i = first + step * kWarp;
    const unsigned d = key[step] >> shift & (kDigits - 1);
    const int before = votes_before(peers[step]);
    const int base = next[warp][d];
    __syncwarp();
    if (i < n && before == 0) next[warp][d] = base + __popc(peers[step]);
    __syncwarp();
    if (i < n) {
      const int64_t at = b * s.stride + base + before;
      to.keys[at] = key[step];
      to.values[at] = from.values[b * s.stride + i];
    }
  }
}

}  // namespace

cudaError_t sort_pairs(const Segments& s, int bits, Pairs& a, Pairs& b, int* counts, int* totals,
                              cudaStream_t stream) {
  const dim3 tiles(static_cast<unsigned>(s.count * s.tiles)), threads(kSortThreads);
  const dim3 rows(static_cast<unsigned>(s.count * kDigits / kSortWarps));
  for (int shift = 0; shift < bits; shift += kDigitBits) {
    cudaError_t status = launch(sort_count, tiles, threads, 0, stream, s, a.keys, shift, counts);
    if (status == cudaSuccess) status = launch(sort_sum, rows, threads, 0, stream, s, counts, totals);
    if (status == cudaSuccess) status = launch(sort_place, tiles, threads, 0, stream, s, a, b, shift, counts, totals);
    if (status != cudaSuccess) return status;
    const Pairs sorted = b;
    b = a;
    a = sorted;
  }
  return cudaSuccess;
}

}  // namespace crosspoint::cuda
