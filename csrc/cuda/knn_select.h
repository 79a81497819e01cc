// How a warp finds the few candidates that matter among many values, and ranks them.
#pragma once

#include "cuda/knn_list.h"

namespace crosspoint::cuda {

// Groups whose n-th smallest minimum bounds the n-th distance well; n <= 0.69 of them, or 0.5 of the most.
__host__ __device__ constexpr int groups_for(int n) { return n <= 22 ? 32 : n <= 44 ? 64 : n <= 88 ? 128 : 256; }

// The n-th smallest of 32 values, one in each lane: a bitonic sort. A lane that is to keep the larger of two holds it
// negated, so that both lanes take a minimum; from step to step it is signs that change.
__device__ __forceinline__ float nth_of_warp(float value, int n) {
  uint32_t lane_bit[6], negated = 0;  // as signs
#pragma unroll
  for (int b = 0; b < 6; ++b) lane_bit[b] = static_cast<uint32_t>(lane_id()) >> b << 31;
#pragma unroll
  for (int run = 1; run <= 5; ++run)
#pragma unroll
    for (int stride = run - 1; stride >= 0; --stride) {
      const uint32_t larger = lane_bit[stride] ^ lane_bit[run];
      value = __uint_as_float(__float_as_uint(value) ^ negated ^ larger);
      negated = larger;
      value = fminf(value, -__shfl_xor_sync(kAllLanes, value, 1 << stride));
    }
  return __shfl_sync(kAllLanes, __uint_as_float(__float_as_uint(value) ^ negated), n - 1);
}

// The n-th smallest of groups' minima, 8 in each lane of which groups_for(n) / 32 are told apart; `space` has room
// for as many keys as groups.
__device__ __forceinline__ float nth_of_groups(float (&minima)[8], int n, NeighbourKey<float>* space) {
  const int groups = groups_for(n);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (groups <= 128) minima[i] = fminf(minima[i], minima[i + 4]);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (groups <= 64) minima[i] = fminf(minima[i], minima[i + 2]);
  if (groups <= 32) return nth_of_warp(fminf(minima[0], minima[1]), n);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i * kWarp < groups) space[i * kWarp + lane_id()] = NeighbourKey<float>::of_score(minima[i], 0);
  __syncwarp();
  sort_keys(space, groups);
  const float nth = space[n - 1].score();
  __syncwarp();
  return nth;
}

// Writes the first `wanted` of keys[0, count), at most 64, by counting for each how many precede it: by distance, and
// by index only where two are equal, which shows in the sum of the ranks. There is room for one key more.
__device__ __forceinline__ void write_ranked(NeighbourKey<float>* keys, int count, int wanted, Row<float> row,
                                             int64_t at) {
  using Key = NeighbourKey<float>;
  const int lane = lane_id();
  const Key low = lane < count ? keys[lane] : Key::last();
  const Key high = lane + kWarp < count ? keys[lane + kWarp] : Key::last();
  if (lane == 0) keys[count] = Key::last();  // what follows reads in pairs
  __syncwarp();
  int rank_low = 0, rank_high = 0;
  const uint32_t own_low = static_cast<uint32_t>(low.bits >> 32), own_high = static_cast<uint32_t>(high.bits >> 32);
  const uint4* pairs = reinterpret_cast<const uint4*>(keys);  // index and distance, twice
  if (count <= kWarp) {
#pragma unroll 4
    for (int j = 0; 2 * j < count; ++j) rank_low += (pairs[j].y < own_low) + (pairs[j].w < own_low);
  } else {
#pragma unroll 2
    for (int j = 0; 2 * j < count; ++j) {
      const uint4 pair = pairs[j];
      rank_low += (pair.y < own_low) + (pair.w < own_low);
      rank_high += (pair.y < own_high) + (pair.w < own_high);
    }
  }
  const int ranks = (lane < count ? rank_low : 0) + (lane + kWarp < count ? rank_high : 0);
  if (__reduce_add_sync(kAllLanes, ranks) != count * (count - 1) / 2) {
    rank_low = rank_high = 0;
    for (int j = 0; j < count; ++j) {
      const Key key = keys[j];
      rank_low += key < low;
      rank_high += key < high;
    }
  }
  if (lane < count && rank_low < wanted) row.write(at + rank_low, low);
  if (lane + kWarp < count && rank_high < wanted) row.write(at + rank_high, high);
}

template <int C>
__device__ __forceinline__ void load_query(const float* from, int channels, float (&query)[C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) query[c] = c < channels ? from[c] : 0.f;
}

}  // namespace crosspoint::cuda
