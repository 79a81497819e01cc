// Stable sort of (key, value) pairs, segment by segment: 8 bits of the key at a time, lowest first. Whoever makes the
// pairs counts their first digits, tile by tile; every pass puts the pairs of a tile in place and counts the next
// digits. The order does not depend on how blocks run.
#pragma once

#include "cuda/warp.h"
#include "cuda/workspace.h"

namespace crosspoint::cuda {

inline constexpr int kDigitBits = 8;
inline constexpr int kDigits = 1 << kDigitBits;
inline constexpr int kSortTile = 2048;  // pairs of a block

// Pairs of segment b stand in places [b * stride, b * stride + size(b)).
struct Segments {
  const int64_t* lengths;  // or null: all of them
  int64_t count, stride;
  int tiles;  // of a segment

  __device__ __forceinline__ int size(int64_t b) const { return static_cast<int>(clamped(lengths, b, stride)); }
};

inline Segments segments(const int64_t* lengths, int64_t count, int64_t stride) {
  return {lengths, count, stride, static_cast<int>((stride + kSortTile - 1) / kSortTile)};
}

struct Pairs {
  uint32_t* keys;
  int32_t* values;
};

struct Sort {
  Segments segments;
  int passes;
  Pairs pairs, spare;
  int* counts;  // (pass, segment, tile, digit)
  int* totals;  // (segment, digit)

  __host__ __device__ int64_t tiles() const { return segments.count * segments.tiles; }
};

// Of keys of so many bits.
Sort plan_sort(const Segments&, int bits, Pieces&);

// Makes the block's tile of pairs: place i of segment b gets the key of(b, i) and the value i. The grid has
// sort.tiles() blocks.
template <class KeyOf>
__device__ __forceinline__ void make_pairs(const Sort& sort, KeyOf&& key_of) {
  CROSSPOINT_SHARED(count, int[kDigits]);
  const Segments& s = sort.segments;
  const int64_t b = blockIdx.x / s.tiles;
  const int first = blockIdx.x % s.tiles * kSortTile, n = s.size(b), end = n - first < kSortTile ? n : first + kSortTile;
  for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) count[digit] = 0;
  __syncthreads();
  for (int i = first + static_cast<int>(threadIdx.x); i < end; i += blockDim.x) {
    const uint32_t key = key_of(b, i);
    sort.pairs.keys[b * s.stride + i] = key;
    sort.pairs.values[b * s.stride + i] = i;
    atomicAdd(&count[key & (kDigits - 1)], 1);
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) {
    int* counts = sort.counts + int64_t(blockIdx.x) * kDigits + digit;
    counts[0] = count[digit];
    for (int pass = 1; pass < sort.passes; ++pass) counts[pass * sort.tiles() * kDigits] = 0;
  }
}

// Sorts what make_pairs left in sort.pairs, where the result is; exchanges pairs and spare as it goes.
cudaError_t sort_pairs(Sort& sort, cudaStream_t);

}  // namespace crosspoint::cuda
