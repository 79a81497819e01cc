#include "cuda/radix_sort.h"

namespace crosspoint::cuda {
namespace {

constexpr int kSortThreads = kDigits;  // one for each digit
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kSortSteps = kSortTile / kSortThreads;  // pairs of a thread
constexpr int kSumThreads = kWarp * kWarp;
constexpr int kSumBlocks = kDigits / kWarp;  // of a segment: a lane for each digit

// Blocks of sort_place sum the counts of their segment's tiles, a kilobyte each: up to so many of them in all, which
// is less work than to start a kernel that sums them once.
constexpr int64_t kFewCounts = 1 << 14;

bool summed_first(const Sort& sort) { return sort.tiles() * sort.segments.tiles > kFewCounts; }

// Makes each count the sum of those of the tiles before. Warps split the tiles.
__global__ void __launch_bounds__(kSumThreads) sort_sum(Segments s, int* counts, int* totals) {
  CROSSPOINT_SHARED(sums, int[kWarp][kWarp]);  // (warp, digit)
  const int64_t b = blockIdx.x / kSumBlocks;
  const int digit = blockIdx.x % kSumBlocks * kWarp + lane_id(), warp = threadIdx.x / kWarp;
  const int own = (s.tiles + kWarp - 1) / kWarp, first = warp * own, end = first + own < s.tiles ? first + own : s.tiles;
  int* column = counts + b * s.tiles * kDigits + digit;
  int sum = 0;
#pragma unroll 4
  for (int tile = first; tile < end; ++tile) sum += column[int64_t(tile) * kDigits];
  sums[warp][lane_id()] = sum;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kWarp; ++w) {
    const int count = sums[w][lane_id()];
    before += w < warp ? count : 0;
    all += count;
  }
#pragma unroll 4
  for (int tile = first; tile < end; ++tile) {
    const int count = column[int64_t(tile) * kDigits];
    column[int64_t(tile) * kDigits] = before;
    before += count;
  }
  if (warp == 0) totals[b * kDigits + digit] = all;
}

// counts (segment, tile, digit) are of this pass, with totals (segment, digit) sums of earlier tiles; next_counts, or
// null, are of the one to come.
__global__ void __launch_bounds__(kSortThreads, 4) sort_place(Segments s, Pairs from, Pairs to, int shift,
                                                              const int* counts, const int* totals, int* next_counts) {
  CROSSPOINT_SHARED(next, int[kSortWarps][kDigits]);  // where each warp's next pair of a digit goes
  CROSSPOINT_SHARED(sums, int[kSortWarps]);
  const int64_t b = blockIdx.x / s.tiles, first_count = b * s.tiles * kDigits;
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
  const int digit = threadIdx.x;
  int own, before;  // pairs with this digit: of the segment; of the tiles before
  if (totals != nullptr) {
    own = totals[b * kDigits + digit];
    before = counts[first_count + int64_t(tile) * kDigits + digit];
  } else {
    own = before = 0;
#pragma unroll 8
    for (int other = 0; other < s.tiles; ++other) {
      const int count = counts[first_count + int64_t(other) * kDigits + digit];
      own += count;
      before += other < tile ? count : 0;
    }
  }
  int all;
  int place = sum_before(own, all) + before;
  if (lane == 0) sums[warp] = all;
  __syncthreads();
  for (int w = 0; w < warp; ++w) place += sums[w];
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
    const int rank = votes_before(peers[step]);
    const int base = next[warp][d];
    __syncwarp();
    if (i < n && rank == 0) next[warp][d] = base + __popc(peers[step]);
    __syncwarp();
    if (i < n) {
      const int at = base + rank;
      to.keys[b * s.stride + at] = key[step];
      to.values[b * s.stride + at] = from.values[b * s.stride + i];
      if (next_counts != nullptr) {
        const unsigned next_digit = key[step] >> (shift + kDigitBits) & (kDigits - 1);
        atomicAdd(&next_counts[first_count + int64_t(at / kSortTile) * kDigits + next_digit], 1);
      }
    }
  }
}

}  // namespace

Sort plan_sort(const Segments& s, int bits, Pieces& pieces) {
  Sort sort{s, (bits + kDigitBits - 1) / kDigitBits, {}, {}, nullptr, nullptr};
  const int64_t all = s.count * s.stride;
  sort.pairs = {pieces.take<uint32_t>(all), pieces.take<int32_t>(all)};
  sort.spare = {pieces.take<uint32_t>(all), pieces.take<int32_t>(all)};
  sort.counts = pieces.take<int>(sort.passes * sort.tiles() * kDigits);
  if (summed_first(sort)) sort.totals = pieces.take<int>(s.count * kDigits);
  return sort;
}

cudaError_t sort_pairs(Sort& sort, cudaStream_t stream) {
  const Segments& s = sort.segments;
  const dim3 tiles(static_cast<unsigned>(sort.tiles())), sums(static_cast<unsigned>(s.count * kSumBlocks));
  for (int pass = 0; pass < sort.passes; ++pass) {
    int* counts = sort.counts + pass * sort.tiles() * kDigits;
    cudaError_t status = cudaSuccess;
    if (summed_first(sort)) status = launch(sort_sum, sums, dim3(kSumThreads), 0, stream, s, counts, sort.totals);
    if (status == cudaSuccess)
      status = launch(sort_place, tiles, dim3(kSortThreads), 0, stream, s, sort.pairs, sort.spare, pass * kDigitBits,
                      counts, sort.totals, pass + 1 < sort.passes ? counts + sort.tiles() * kDigits : nullptr);
    if (status != cudaSuccess) return status;
    const Pairs sorted = sort.spare;
    sort.spare = sort.pairs;
    sort.pairs = sorted;
  }
  return cudaSuccess;
}

}  // namespace crosspoint::cuda
