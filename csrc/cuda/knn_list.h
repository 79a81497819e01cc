// The candidates of one query, kept by one warp in shared memory: appended by ballot, cut to the nearest when
// there is no more room. Whatever comes in whatever order, what stays is exact.
#pragma once

#include <cmath>

#include "common/neighbours.h"
#include "crosspoint/knn.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {

inline constexpr int kMostListed = 128;  // neighbours that a list keeps
inline constexpr int kListRoom = 256;    // keys of a list: what it keeps, and one tile of candidates

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

// sum + (a - b)^2. Every path sums channel by channel with it, so that equal pairs get equal distances.
template <class T>
__device__ __forceinline__ T add_square(T sum, T a, T b) {
  const T d = a - b;
  return multiply_add(d, d, sum);
}

template <class T>
__device__ __forceinline__ T infinity() {
  return static_cast<T>(INFINITY);
}

// NaN made +inf.
template <class T>
__device__ __forceinline__ T comparable(T distance) {
  return distance < infinity<T>() ? distance : infinity<T>();
}

// Sorts keys[0, count), ascending; there is room for count rounded up to a power of two. The warp calls it
// together, after __syncwarp, and may read the keys after it.
template <class Key>
__device__ __noinline__ void sort_keys(Key* keys, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + lane_id(); i < size; i += kWarp) keys[i] = Key::last();
  __syncwarp();
  for (int run = 2; run <= size; run *= 2)
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = lane_id(); i < size / 2; i += kWarp) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const Key a = keys[low], b = keys[high];
        const bool descending = (low & run) != 0;
        if ((b < a) != descending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncwarp();
    }
}

template <class Key>
struct KeyList {
  Key* keys;  // kListRoom of them
  int count;
  Key limit;  // every key that can matter precedes it

  // `count` must leave room for 32 more.
  __device__ __forceinline__ void offer(bool exists, Key key) {
    const unsigned votes = __ballot_sync(kAllLanes, exists && key < limit);
    if (votes == 0) return;
    if (votes >> lane_id() & 1) keys[count + votes_before(votes)] = key;
    count += __popc(votes);
  }

  // Keeps the first `most`, in order.
  __device__ inline void settle(int most) {
    __syncwarp();
    sort_keys(keys, count);
    if (count >= most) {
      count = most;
      limit = keys[most - 1];
    }
  }
};

// Where one query's row goes.
template <class T>
struct Row {
  int64_t* idx;
  T* dist2;  // or null

  __device__ __forceinline__ void write(int64_t place, NeighbourKey<T> key) const {
    idx[place] = key.index();
    if (dist2 != nullptr) dist2[place] = key.distance();
  }
  __device__ __forceinline__ void write_missing(int64_t place) const {
    idx[place] = -1;
    if (dist2 != nullptr) dist2[place] = infinity<T>();
  }
};

// What every path needs to know of a search; passed to kernels by value.
template <class T>
struct Search {
  KnnArgs<T> args;

  __device__ __forceinline__ int64_t valid_queries(int64_t b) const {
    return clamped(args.lengths_query, b, args.queries);
  }
  __device__ __forceinline__ int32_t valid_points(int64_t b) const {
    return static_cast<int32_t>(clamped(args.lengths_points, b, args.candidates));
  }
  __device__ __forceinline__ const T* query(int64_t b, int64_t i) const {
    return args.query + (b * args.queries + i) * args.channels;
  }
  __device__ __forceinline__ const T* points(int64_t b) const {
    return args.points + b * args.candidates * args.channels;
  }
  // The point that query i is itself, or -1; it is left out of every search.
  __device__ __forceinline__ int32_t own(int64_t i) const {
    return args.self == Self::other_set ? -1 : static_cast<int32_t>(i);
  }
  // Places of a row that are filled without a search.
  __device__ __forceinline__ int64_t leading() const { return args.self == Self::first ? 1 : 0; }
  __device__ __forceinline__ Row<T> row(int64_t b, int64_t i) const {
    const int64_t at = (b * args.queries + i) * args.k;
    return {args.idx + at, args.dist2 == nullptr ? nullptr : args.dist2 + at};
  }

  // The threads of the block write what the search of queries [first, end) leaves over: themselves, the places
  // after the `searched` ones, and rows without a query.
  __device__ inline void write_rest(int64_t b, int64_t first, int64_t end, int64_t searched) const {
    const int64_t valid = valid_queries(b);
    if (end > args.queries) end = args.queries;
    for (int64_t i = first + threadIdx.x / kWarp; i < end; i += blockDim.x / kWarp) {
      const bool exists = i < valid;
      if (exists && leading() == 1 && lane_id() == 0)
        row(b, i).write(0, NeighbourKey<T>::of(T(0), static_cast<int32_t>(i)));
      for (int64_t place = (exists ? leading() + searched : 0) + lane_id(); place < args.k; place += kWarp)
        row(b, i).write_missing(place);
    }
  }
};

}  // namespace crosspoint::cuda
