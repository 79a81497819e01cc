// What the kernels of the contrastive losses share: which columns a block meets, and tiles of products on tensor cores.
#pragma once

#include "common/contrast.h"
#include "crosspoint/cuda/nt_xent.h"
#include "cuda/mma.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {

// The rows of one block, of one view, and the columns that it meets: numbers over all views, view * N + sample.
struct BlockOfRows {
  int view, first, count;  // the first of its rows, in [0, row_count), and how many there are
  int own;                 // that row as a column
  int positive;            // and its positive; where there are labels, out of reach
  int begin, end;          // of the columns

  __device__ BlockOfRows(const ContrastColumns& c, int64_t block, int rows) {
    const int samples = static_cast<int>(c.samples), all = static_cast<int>(c.row_count);
    const int blocks = (all + rows - 1) / rows;
    view = static_cast<int>(block / blocks);
    first = static_cast<int>(block % blocks) * rows;
    count = all - first < rows ? all - first : rows;
    const int sample = static_cast<int>(c.first_row) + first;
    own = view * samples + sample;
    positive = c.views == 2 ? (1 - view) * samples + sample : -rows;
    begin = c.within_views || c.views == 1 ? 0 : (1 - view) * samples;
    end = c.within_views || c.views == 1 ? static_cast<int>(c.views) * samples : begin + samples;
    if (c.views == 1 && c.labels == nullptr) begin = all;
  }

  // Tiles of `columns` columns, of which part `part` takes [first_tile, last_tile).
  struct Tiles {
    int first, last;
  };
  __device__ Tiles tiles(int columns, int64_t part, int64_t parts) const {
    const int64_t all = (end - begin + columns - 1) / columns;
    return {static_cast<int>(part * all / parts), static_cast<int>((part + 1) * all / parts)};
  }

  // Whether columns [column, column + columns) hold one of the rows, a positive of theirs, or what is no column.
  __device__ bool has_exceptions(int column, int columns) const {
    const auto meets = [&](int from) { return column < from + count && from < column + columns; };
    return column < begin || column + columns > end || meets(own) || meets(positive);
  }

  // Of row i of the block: neither itself, nor its positive.
  __device__ bool counts(int i, int column) const {
    return column >= begin && column < end && column != own + i && column != positive + i;
  }
};

// What fragments hold, and how they are multiplied.
template <Product product>
inline constexpr int kElement = product == Product::bf16 || product == Product::f16 ? 2 : 4;  // bytes

inline constexpr int kGroup = 16;      // bytes that a lane names for ldmatrix
inline constexpr int kStep = 32;       // bytes of the depth of one product
inline constexpr int kLine = 128;      // bytes that all banks hold: rows in shared memory are multiples of it
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;

template <Product product, int n>
struct Fragment {
  uint32_t high[n];
  uint32_t low[product == Product::tf32x3 ? n : 1];

  __device__ __forceinline__ void split() {
    if constexpr (product == Product::tf32x3) {
#pragma unroll
      for (int i = 0; i < n; ++i) split_tf32(__uint_as_float(high[i]), high[i], low[i]);
    }
  }
};

// d += a b. What tensor cores add to is cut, not rounded: products of low digits have a sum of their own, `small`, where
// each loses next to nothing, and are added to d in float32 when it is done.
template <Product product>
__device__ __forceinline__ void multiply(float (&d)[4], float (&small)[4], const Fragment<product, 4>& a,
                                         const Fragment<product, 2>& b) {
  if constexpr (product == Product::bf16) {
    mma_bf16(d, a.high, b.high);
  } else if constexpr (product == Product::f16) {
    mma_f16(d, a.high, b.high);
  } else {
    if constexpr (product == Product::tf32x3) {
      mma_tf32(small, a.low, b.high);
      mma_tf32(small, a.high, b.low);
    }
    mma_tf32(d, a.high, b.high);
  }
}

// Rows in shared memory, `pitch` bytes each. Within a line, groups of eight rows are permuted, so that neither ldmatrix
// nor 32-bit loads down four rows meet a bank conflict.
struct SharedRows {
  unsigned char* base;
  int pitch;

  __device__ __forceinline__ void* group(int row, int g) const {
    const int lines = pitch < kLine ? pitch / kGroup - 1 : kLine / kGroup - 1;
    return base + row * pitch + (g ^ (((row & 3) << 1 | (row >> 2 & 1)) & lines)) * kGroup;
  }
  template <class T>
  __device__ __forceinline__ T* at(int row, int byte) const {
    return reinterpret_cast<T*>(static_cast<unsigned char*>(group(row, byte / kGroup)) + byte % kGroup);
  }
};

// 16 rows by one step of the depth, from `row` and `group` on.
template <Product product>
__device__ __forceinline__ void load_left(Fragment<product, 4>& a, const SharedRows& rows, int row, int group) {
  ldmatrix_x4(a.high, rows.group(row + lane_id() % 16, group + lane_id() / 16));
  a.split();
}

// One step of the depth by 16 columns, which are rows in shared memory.
template <Product product>
__device__ __forceinline__ void load_right(Fragment<product, 2> (&b)[2], const SharedRows& rows, int row, int group) {
  uint32_t r[4];
  ldmatrix_x4(r, rows.group(row + lane_id() % 8 + lane_id() / 16 * 8, group + lane_id() / 8 % 2));
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2].high[i % 2] = r[i];
  b[0].split();
  b[1].split();
}

// One step of the depth, which goes down the rows, by 16 channels.
template <Product product>
__device__ __forceinline__ void load_turned(Fragment<product, 2> (&b)[2], const SharedRows& rows, int row,
                                            int channel) {
  if constexpr (kElement<product> == 2) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, rows.group(row + lane_id() % 16, channel / 8 + lane_id() / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].high[i % 2] = r[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b[i / 2].high[i % 2] =
          *rows.at<uint32_t>(row + lane_id() % 4 + i % 2 * 4, (channel + i / 2 * 8 + lane_id() / 4) * 4);
  }
  b[0].split();
  b[1].split();
}

// Starts to copy `bytes` of each of `count` rows, from byte `from` on, to `to`, whose rows it fills with zeros where
// there is nothing more of a row, and whose rows behind `valid` it fills with zeros. The whole block calls.
__device__ __forceinline__ void copy_rows(const SharedRows& to, const unsigned char* rows, int row_bytes, int count,
                                          int valid, int from, int bytes) {
  const int groups = bytes / kGroup;
  for (int i = threadIdx.x; i < count * groups; i += kThreads) {
    const int row = i / groups, byte = i % groups * kGroup;
    const bool there = row < valid && from + byte < row_bytes;
    cp_async<kGroup>(to.group(row, byte / kGroup), rows + (there ? int64_t(row) * row_bytes + from + byte : 0), there);
  }
}

// A warp's 16 `tall` by 16 `wide` scores.
template <Product product, int tall, int wide>
struct Scores {
  float sum[tall][2 * wide][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < tall; ++m)
#pragma unroll
      for (int n = 0; n < 2 * wide; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.f;
  }

  // Adds `steps` of the depth. The digits that tf32x3 is for would be cut off a long sum, so that it sums a few steps at
  // a time.
  template <int steps>
  __device__ __forceinline__ void add(const SharedRows& left, int row, int left_group, const SharedRows& right,
                                      int column, int right_group) {
    if constexpr (product == Product::tf32x3) {
      Scores part, small;
      part.clear();
      small.clear();
      part.template add_to<steps>(small, left, row, left_group, right, column, right_group);
#pragma unroll
      for (int m = 0; m < tall; ++m)
#pragma unroll
        for (int n = 0; n < 2 * wide; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][n][i] += part.sum[m][n][i] + small.sum[m][n][i];
    } else {
      add_to<steps>(*this, left, row, left_group, right, column, right_group);
    }
  }

 private:
  template <int steps>
  __device__ __forceinline__ void add_to(Scores& small, const SharedRows& left, int row, int left_group,
                                         const SharedRows& right, int column, int right_group) {
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      Fragment<product, 4> a[tall];
#pragma unroll
      for (int m = 0; m < tall; ++m) load_left(a[m], left, row + 16 * m, left_group + 2 * s);
#pragma unroll
      for (int n = 0; n < wide; ++n) {
        Fragment<product, 2> b[2];
        load_right(b, right, column + 16 * n, right_group + 2 * s);
#pragma unroll
        for (int m = 0; m < tall; ++m) {
          multiply(sum[m][2 * n], small.sum[m][2 * n], a[m], b[0]);
          multiply(sum[m][2 * n + 1], small.sum[m][2 * n + 1], a[m], b[1]);
        }
      }
    }
  }
};

// Bytes of a row in shared memory.
inline int shared_pitch(const ContrastColumns& c, int element) {
  return static_cast<int>((c.width * element + kLine - 1) / kLine * kLine);
}

inline constexpr int64_t kMostShared = 163 << 10;  // of a block, on sm_80

}  // namespace crosspoint::cuda
