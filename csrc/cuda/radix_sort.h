// Stable sort of (key, value) pairs, segment by segment: 8 bits of the key at a time, lowest first. Three kernels
// a pass: tiles count their digits, a warp for each digit sums the counts over the tiles, tiles put their pairs in
// place. The order does not depend on how blocks run.
#pragma once

#include "cuda/warp.h"

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

// Sorts by the low `bits` of the keys and exchanges a and b so that a holds the result. counts has room for
// count * kDigits * tiles, totals for count * kDigits.
cudaError_t sort_pairs(const Segments&, int bits, Pairs& a, Pairs& b, int* counts, int* totals, cudaStream_t);

}  // namespace crosspoint::cuda
