// What kernels of several operators do with a warp.
#pragma once

#include "cuda/platform.h"

namespace crosspoint::cuda {

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }

// How many of the lanes before this one are in `votes`.
__device__ __forceinline__ int votes_before(unsigned votes) { return __popc(votes & ((1u << lane_id()) - 1)); }

// Sum of `value` over the lanes before this one, and over all of them.
__device__ __forceinline__ int sum_before(int value, int& total) {
  int sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane_id() >= step) sum += other;
  }
  total = __shfl_sync(kAllLanes, sum, kWarp - 1);
  return sum - value;
}

// Sum over the warp, the same in every lane.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// lengths[b], kept in [0, most] whatever it is; most where there are no lengths.
__device__ __forceinline__ int64_t clamped(const int64_t* lengths, int64_t b, int64_t most) {
  if (lengths == nullptr) return most;
  const int64_t length = lengths[b];
  return length < 0 ? 0 : length > most ? most : length;
}

}  // namespace crosspoint::cuda
