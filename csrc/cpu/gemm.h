// Matrix products: a register-tiled micro-kernel, and a product on operands packed for it, the right one
// only once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.h"
#include "vec.h"

// Elements of two equal vectors, by index into both: GCC had it under its own name only before version 12.
#if defined(__clang__) || __GNUC__ >= 12
#define CROSSPOINT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CROSSPOINT_SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, (int __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

namespace crosspoint::CROSSPOINT_ISA {

// A tile of the result, held in registers: `rows` x `vectors` vectors. That leaves two registers for the
// right operand and one to broadcast.
template <class T>
struct Tile {
#if defined(__AVX512F__)
  static constexpr int rows = 12;
#elif defined(__AVX2__) || defined(__aarch64__)
  static constexpr int rows = 6;
#else
  static constexpr int rows = 4;
#endif
  static constexpr int vectors = 2;
  static constexpr int columns = vectors * lanes<T>;
  static constexpr int64_t depth = 256;  // of one pass: panels of the right operand stay in L1
};

// A strided view of a matrix: element (i, j) is data[i * row_stride + j * column_stride].
template <class T>
struct Strided {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;

  const T* at(int64_t i, int64_t j) const { return data + i * row_stride + j * column_stride; }
  Strided from(int64_t i, int64_t j) const { return {at(i, j), row_stride, column_stride}; }
  Strided transposed() const { return {data, column_stride, row_stride}; }
};

// Four lines of four floats, transposed in registers: element p of line i goes to out[p * stride + i].
inline void transpose_4x4(const float* lines, int64_t line_stride, float* out, int64_t stride) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad row[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&row[i], lines + i * line_stride, sizeof row[i]);
  const Quad low01 = CROSSPOINT_SHUFFLE(row[0], row[1], 0, 4, 1, 5);
  const Quad low23 = CROSSPOINT_SHUFFLE(row[2], row[3], 0, 4, 1, 5);
  const Quad high01 = CROSSPOINT_SHUFFLE(row[0], row[1], 2, 6, 3, 7);
  const Quad high23 = CROSSPOINT_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
  row[0] = CROSSPOINT_SHUFFLE(low01, low23, 0, 1, 4, 5);
  row[1] = CROSSPOINT_SHUFFLE(low01, low23, 2, 3, 6, 7);
  row[2] = CROSSPOINT_SHUFFLE(high01, high23, 0, 1, 4, 5);
  row[3] = CROSSPOINT_SHUFFLE(high01, high23, 2, 3, 6, 7);
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, &row[i], sizeof row[i]);
}

// Packs `width` lines (rows of a left operand, columns of a right one) of `depth` elements as depth x
// padded, zeros beyond `width`. Inlined so that `padded`, a constant at every call, gives copies of a fixed
// size.
template <class T>
[[gnu::always_inline]] inline void pack_panel(Strided<T> lines, int64_t width, int64_t depth, int64_t padded,
                                              T* out) {
  if (lines.row_stride == 1 && width == padded) {
    for (int64_t p = 0; p < depth; ++p) std::memcpy(out + p * padded, lines.at(0, p), padded * sizeof(T));
    return;
  }
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    for (; lines.column_stride == 1 && i + 4 <= width; i += 4) {
      int64_t p = 0;
      for (; p + 4 <= depth; p += 4)
        transpose_4x4(lines.at(i, p), lines.row_stride, out + p * padded + i, padded);
      for (; p < depth; ++p)
        for (int64_t r = i; r < i + 4; ++r) out[p * padded + r] = *lines.at(r, p);
    }
  }
  for (; i < width; ++i)
    for (int64_t p = 0; p < depth; ++p) out[p * padded + i] = *lines.at(i, p);
  for (; i < padded; ++i)
    for (int64_t p = 0; p < depth; ++p) out[p * padded + i] = T(0);
}

template <class T>
inline void clear(Vec<T> (&acc)[Tile<T>::rows][Tile<T>::vectors]) {
#pragma GCC unroll 12
  for (int i = 0; i < Tile<T>::rows; ++i) acc[i][0] = acc[i][1] = Vec<T>{};
}

// acc += a b where a(i, p) is a[i * row_stride + p * a_step] and row p of b starts at b[p * b_step].
template <int64_t row_stride, class T>
inline void multiply_tile(int64_t depth, const T* a, int64_t a_step, const T* b, int64_t b_step,
                          Vec<T> (&acc)[Tile<T>::rows][Tile<T>::vectors]) {
  for (int64_t p = 0; p < depth; ++p) {
    const Vec<T> b0 = load(b), b1 = load(b + lanes<T>);
#pragma GCC unroll 12
    for (int i = 0; i < Tile<T>::rows; ++i) {
      const Vec<T> broadcast = splat(a[i * row_stride]);
      acc[i][0] += broadcast * b0;
      acc[i][1] += broadcast * b1;
    }
    a += a_step;
    b += b_step;
  }
}

// acc += a b, for a packed depth x Tile::rows and b packed depth x Tile::columns.
template <class T>
inline void multiply_panels(int64_t depth, const T* a, const T* b,
                            Vec<T> (&acc)[Tile<T>::rows][Tile<T>::vectors]) {
  multiply_tile<1>(depth, a, Tile<T>::rows, b, Tile<T>::columns, acc);
}

// The first `height` rows and `width` columns of acc, to c (or added to it).
template <class T>
inline void store_tile(const Vec<T> (&acc)[Tile<T>::rows][Tile<T>::vectors], T* c, int64_t ldc,
                       int64_t height, int64_t width, bool add) {
  constexpr int64_t R = Tile<T>::rows, W = Tile<T>::columns, L = lanes<T>;
  if (width == W && height == R) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r, c += ldc) {
      store(c, add ? load(c) + acc[r][0] : acc[r][0]);
      store(c + L, add ? load(c + L) + acc[r][1] : acc[r][1]);
    }
    return;
  }
  T line[W];
  for (int64_t r = 0; r < height; ++r, c += ldc) {
    store(line, acc[r][0]);
    store(line + L, acc[r][1]);
    for (int64_t x = 0; x < width; ++x) c[x] = add ? c[x] + line[x] : line[x];
  }
}

// A right operand (depth x columns), packed once and shared by all threads.
template <class T>
class Packed {
 public:
  Packed(int64_t depth, int64_t columns, Strided<T> b)
      : depth_(depth), columns_(columns), data_(depth * padded(columns)) {
    for (int64_t p = 0; p < depth; p += Tile<T>::depth) {
      const int64_t dp = std::min(Tile<T>::depth, depth - p);
      for (int64_t j = 0; j < columns; j += Tile<T>::columns)
        pack_panel(b.from(p, j).transposed(), std::min<int64_t>(Tile<T>::columns, columns - j), dp,
                   int64_t(Tile<T>::columns), data_.data() + p * padded(columns) + j * dp);
    }
  }

  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }
  // The panel of columns [j, j + Tile::columns) for the pass that starts at depth p and is dp deep.
  const T* panel(int64_t p, int64_t dp, int64_t j) const {
    return data_.data() + p * padded(columns_) + j * dp;
  }

 private:
  static int64_t padded(int64_t columns) {
    return (columns + Tile<T>::columns - 1) / Tile<T>::columns * Tile<T>::columns;
  }

  int64_t depth_;
  int64_t columns_;
  Buffer<T> data_;
};

// c (rows x b.columns(), row-major with stride ldc) = a b, or += if accumulate. One thread: callers split
// the rows.
template <class T>
void multiply(int64_t rows, Strided<T> a, const Packed<T>& b, T* c, int64_t ldc, bool accumulate = false) {
  constexpr int64_t R = Tile<T>::rows, W = Tile<T>::columns;
  constexpr int64_t block = 8 * R;  // rows packed at a time: they stay in L2
  thread_local Buffer<T> packed_a;
  packed_a.resize(block * Tile<T>::depth);
  for (int64_t i0 = 0; i0 < rows; i0 += block) {
    const int64_t block_rows = std::min(block, rows - i0);
    for (int64_t p = 0; p < b.depth(); p += Tile<T>::depth) {
      const int64_t dp = std::min(Tile<T>::depth, b.depth() - p);
      for (int64_t i = 0; i < block_rows; i += R)
        pack_panel(a.from(i0 + i, p), std::min(R, block_rows - i), dp, R, packed_a.data() + i * dp);
      for (int64_t j = 0; j < b.columns(); j += W) {
        const int64_t width = std::min(W, b.columns() - j);
        for (int64_t i = 0; i < block_rows; i += R) {
          Vec<T> acc[R][Tile<T>::vectors];
          clear<T>(acc);
          multiply_panels(dp, packed_a.data() + i * dp, b.panel(p, dp, j), acc);
          const int64_t height = std::min(R, block_rows - i);
          store_tile<T>(acc, c + (i0 + i) * ldc + j, ldc, height, width, accumulate || p > 0);
        }
      }
    }
    if (b.depth() == 0 && !accumulate)
      for (int64_t i = 0; i < block_rows; ++i) std::fill_n(c + (i0 + i) * ldc, b.columns(), T(0));
  }
}

}  // namespace crosspoint::CROSSPOINT_ISA
