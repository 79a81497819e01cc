// A few neighbouring channels of a row at a time.
#pragma once

#include "cuda/platform.h"

namespace crosspoint::cuda {

// V values that are read and written at once, or by 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Values {
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ const Values<T, V>& values_at(const T* place) {
  return *reinterpret_cast<const Values<T, V>*>(place);
}

template <int V, class T>
__device__ __forceinline__ Values<T, V>& values_at(T* place) {
  return *reinterpret_cast<Values<T, V>*>(place);
}

inline constexpr int kFour = 4;
template <class T>
using Four = Values<T, kFour>;

// Whether rows of `stride` elements from an aligned address can be read four at a time.
inline bool by_fours(int64_t stride) { return stride % kFour == 0; }

// Of four channels, those that exist where `left` do from the first of them on.
__device__ __forceinline__ int part_of_four(int64_t left) {
  return left < 0 ? 0 : left < kFour ? static_cast<int>(left) : kFour;
}

// Elements [0, count) of four from p, `fill` beyond; all of them in one access where rows are `whole`.
template <class T>
__device__ __forceinline__ Four<T> load_four(const T* p, int count, bool whole, T fill = T(0)) {
  Four<T> x;
  if (whole) {
    if (count > 0) return values_at<kFour>(p);
    count = 0;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) x.v[i] = i < count ? p[i] : fill;
  return x;
}

template <class T>
__device__ __forceinline__ void store_four(T* p, const Four<T>& x, int count, bool whole) {
  if (whole) {
    if (count > 0) values_at<kFour>(p) = x;
    return;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i)
    if (i < count) p[i] = x.v[i];
}

// a / b of numbers that are not negative: division of 64 bits is slow, and seldom needed.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Blocks take more than one piece of work where a grid cannot be that large.
inline dim3 grid_for(int64_t pieces) {
  constexpr int64_t most = 1 << 30;
  return dim3(static_cast<unsigned>(pieces < most ? pieces : most));
}

}  // namespace crosspoint::cuda
