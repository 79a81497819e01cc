// What a tile of products becomes, in registers: sums of exponentials forward, weights of columns backward. A warp
// holds 16 `tall` rows by 8 `wide` columns, laid out as mma.sync and wgmma leave them: of each 16 by 8, lane 4 g + t
// has rows g and g + 8, columns 2 t and 2 t + 1.
#pragma once

#include "cuda/contrast.h"

namespace crosspoint::cuda {

inline constexpr int kStatistics = 3;  // of a row: bound, sum, positives

// What a row has met so far: the sum of 2^x is `sum` times 2^`bound`.
struct RowSum {
  float bound = -3.4028235e38f, sum = 0, positives = 0;

  __device__ __forceinline__ void raise(float to) {
    const float higher = fmaxf(bound, to);
    sum *= fast_exp2(bound - higher);
    bound = higher;
  }
  __device__ __forceinline__ void add(const RowSum& other) {
    raise(other.bound);
    sum += other.sum * fast_exp2(other.bound - bound);
    positives += other.positives;
  }
  // With those of the four lanes that hold a row.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      RowSum other;
      other.bound = __shfl_xor_sync(kAllLanes, bound, step);
      other.sum = __shfl_xor_sync(kAllLanes, sum, step);
      other.positives = __shfl_xor_sync(kAllLanes, positives, step);
      add(other);
    }
  }
};

// What is known of a tile's columns, in shared memory; weights only backward.
struct TileColumns {
  const float *scale, *weight;
  const int32_t* label;
  int first;  // the first of them, as a column
};

// A thread's rows, thread_row + 8 r of the block, forward.
template <int tall>
struct RowSums {
  static constexpr int rows = 2 * tall;
  RowSum state[rows];
  float factor[rows];
  int32_t label[rows];
  bool several[rows];

  __device__ __forceinline__ RowSums(const ContrastColumns& c, const BlockOfRows& block, int thread_row,
                                     const Exponents<float>& exponents) {
    const float *scale = static_cast<const float*>(c.scale), *target = static_cast<const float*>(c.target);
    const bool labelled = c.labels != nullptr;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int i = thread_row + 8 * r, at = block.own + i;
      const bool there = i < block.count;
      factor[r] = there ? scale[at] * static_cast<float>(exponents.scale) : 0.f;
      label[r] = there && labelled ? c.labels[at] : -1;
      several[r] = there && labelled && target[at] != 0.f;
      if (exponents.shared) state[r].bound = exponents.bound;
    }
  }

  // Adds a tile of products with `count` columns, of which this thread's are thread_column + 8 n and the next.
  template <int wide>
  __device__ __forceinline__ void add(float (&products)[tall][wide][4], const TileColumns& columns, int count,
                                      const BlockOfRows& block, int thread_row, int thread_column, bool labelled,
                                      const Exponents<float>& exponents) {
    const bool exceptions = labelled || block.has_exceptions(columns.first, count);
#pragma unroll
    for (int n = 0; n < wide; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = thread_column + 8 * n + e;
        const float other = columns.scale[j];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          float& x = products[r / 2][n][r % 2 * 2 + e];
          x *= factor[r] * other;
          if (!exceptions) continue;
          bool counts = block.counts(thread_row + 8 * r, columns.first + j);
          if (labelled && columns.label[j] == label[r]) {
            if (counts && several[r]) state[r].positives += x;
            counts = counts && several[r];
          }
          if (!counts) x = -INFINITY;
        }
      }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (!exponents.shared) {
        float most = state[r].bound;  // a NaN is left to the sum
#pragma unroll
        for (int n = 0; n < wide; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) most = fmaxf(most, products[r / 2][n][r % 2 * 2 + e]);
        state[r].raise(most);
      }
      float sum = 0;
#pragma unroll
      for (int n = 0; n < wide; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) sum += fast_exp2(products[r / 2][n][r % 2 * 2 + e] - state[r].bound);
      state[r].sum += sum;
    }
  }
};

// A thread's rows backward.
template <int tall>
struct RowWeights {
  static constexpr int rows = 2 * tall;
  float factor[rows], weight[rows], lacks[rows];
  int32_t label[rows];

  __device__ __forceinline__ RowWeights(const ContrastColumns& c, const BlockOfRows& block, int thread_row,
                                        const Exponents<float>& exponents, const float* exponents_of) {
    const float *scale = static_cast<const float*>(c.scale), *target = static_cast<const float*>(c.target);
    const bool labelled = c.labels != nullptr;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int i = thread_row + 8 * r, at = block.own + i;
      const bool there = i < block.count;
      factor[r] = there ? scale[at] * static_cast<float>(exponents.scale) : 0.f;
      weight[r] = exponents.weight(there ? exponents_of[at] : INFINITY);
      label[r] = there && labelled ? c.labels[at] : -1;
      lacks[r] = there && labelled ? target[at] : 0.f;
    }
  }

  // Calls store(row r, n, weights of columns thread_column + 8 n and the next) for a tile of `count` columns, and adds
  // the sums of weights times x to `met`.
  template <int wide, class Store>
  __device__ __forceinline__ void weigh(const float (&products)[tall][wide][4], float (&met)[rows],
                                        const TileColumns& columns, int count, const BlockOfRows& block, int thread_row,
                                        int thread_column, bool labelled, const Exponents<float>& exponents,
                                        Store&& store) const {
    const bool exceptions = labelled || block.has_exceptions(columns.first, count);
#pragma unroll
    for (int n = 0; n < wide; ++n) {
      const int j = thread_column + 8 * n;
      const float2 column_weights = *reinterpret_cast<const float2*>(columns.weight + j);
      const float2 column_scales = *reinterpret_cast<const float2*>(columns.scale + j);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        float w[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float other = e == 0 ? column_weights.x : column_weights.y;
          const float length = e == 0 ? column_scales.x : column_scales.y;
          const float x = products[r / 2][n][r % 2 * 2 + e] * factor[r] * length;
          w[e] = exponents.shared ? fast_exp2(x - exponents.bound) * (weight[r] + other)
                                  : fast_exp2(x + weight[r]) + fast_exp2(x + other);
          if (exceptions) {
            bool counts = block.counts(thread_row + 8 * r, columns.first + j + e);
            if (labelled && columns.label[j + e] == label[r]) {
              counts = counts && lacks[r] != 0.f;
              w[e] -= lacks[r];
            }
            if (!counts) w[e] = 0.f;
            met[r] += counts ? w[e] * x : 0.f;
          } else {
            met[r] += w[e] * x;
          }
          w[e] *= length;
        }
        store(r, n, w[0], w[1]);
      }
    }
  }
};

}  // namespace crosspoint::cuda
