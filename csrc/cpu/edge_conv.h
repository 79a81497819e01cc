// What both passes of EdgeConv share: the cut into channel blocks, centred clouds, and small products on
// unpacked operands.
#pragma once

#include "crosspoint/edge_conv.h"
#include "gemm.h"
#include "vec.h"

namespace crosspoint::CROSSPOINT_ISA {

inline constexpr int64_t kStatisticsRows = 16;  // rows summed in T before the sum continues in double

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// The channels are worked on in blocks: a block of one cloud is a matrix of n x width that stays in the L2
// cache. The cut depends on the shapes alone, never on the number of threads, because the order of sums
// follows it.
template <class T>
struct ChannelBlocks {
  ChannelBlocks(int64_t batch, int64_t n, int64_t c_out) : c_out(c_out) {
    const int64_t least = Tile<T>::columns;
    width = std::max<int64_t>(least, 64);
    while (width > least && (n * width * int64_t(sizeof(T)) > 256 * 1024 || batch * c_out < 8 * width))
      width /= 2;
    count = (c_out + width - 1) / width;
  }

  int64_t first(int64_t block) const { return block * width; }
  int64_t channels(int64_t block) const { return std::min(width, c_out - first(block)); }
  int64_t padded(int64_t block) const { return round_up(channels(block), lanes<T>); }

  int64_t c_out, width, count;
};

template <class T>
inline Vec<T> load_part(const T* p, int64_t valid) {
  if (valid >= lanes<T>) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, valid * sizeof(T));
  return v;
}

template <class T>
inline void store_part(T* p, Vec<T> v, int64_t valid) {
  if (valid >= lanes<T>)
    store(p, v);
  else
    std::memcpy(p, &v, valid * sizeof(T));
}

// Asks for the same columns of a row that comes soon: rows of a channel block are too far apart for the
// hardware to see the pattern.
template <class T>
inline void prefetch_ahead(const T* row, int64_t columns, int64_t stride) {
  constexpr int64_t rows_ahead = 8, line = 64 / sizeof(T);
  for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(row + rows_ahead * stride + c);
}

template <class T>
inline auto leaky(T z, std::remove_reference_t<decltype(z[0])> slope) {
  return z > 0 ? z : z * slope;
}

template <class T>
inline T sum_lanes(Vec<T> v) {
  T line[lanes<T>];
  store(line, v);
  for (int half = lanes<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) line[l] += line[l + half];
  return line[0];
}

// Calls f(number of vectors as a constant, first column) over the block's columns.
template <class T, class F>
inline void over_columns(int64_t columns, F&& f) {
  constexpr int64_t L = lanes<T>;
  constexpr int most = vector_bytes == 64 ? 4 : 2;
  int64_t c = 0;
  for (; c + most * L <= columns; c += most * L) f(std::integral_constant<int, most>{}, c);
  if constexpr (most > 2)
    for (; c + 2 * L <= columns; c += 2 * L) f(std::integral_constant<int, 2>{}, c);
  for (; c < columns; c += L) f(std::integral_constant<int, 1>{}, c);
}

// acc += a b over `depth`, with a(r, p) = a[r * a_row + p * a_depth] (a_row = 1 if UnitRows) and b(p, :) =
// b[p * ldb].
template <int R, int V, bool UnitRows, class T>
inline void accumulate_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b,
                            int64_t ldb, Vec<T> (&acc)[R][V]) {
  const int64_t row = UnitRows ? 1 : a_row;
  for (int64_t p = 0; p < depth; ++p) {
    Vec<T> right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + v * lanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec<T> left = splat(a[r * row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += left * right[v];
    }
    a += a_depth;
    b += ldb;
  }
}

// One operand pair of a product: left (rows x depth) times right (depth x columns).
template <class T>
struct Factor {
  const T* left;
  int64_t left_row, left_depth;
  const T* right;
  int64_t ldb;
  int64_t depth;
};

// c (R x columns, stride ldc), = or +=, the sum of the products of `count` factors. Not inlined: in a larger
// function the accumulators would not stay in registers.
template <int R, int V, bool UnitRows, class T>
__attribute__((noinline)) void product_tile(const Factor<T>* factors, int count, int64_t row, int64_t columns,
                                            T* c, int64_t ldc, bool add) {
  constexpr int64_t L = lanes<T>;
  Vec<T> acc[R][V] = {};
  for (int f = 0; f < count; ++f) {
    const Factor<T>& x = factors[f];
    accumulate_tile<R, V, UnitRows>(x.depth, x.left + row * x.left_row, x.left_row, x.left_depth, x.right,
                                    x.ldb, acc);
  }
  c += row * ldc;
  if (columns >= V * L) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r, c += ldc)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c + v * L, add ? load(c + v * L) + acc[r][v] : acc[r][v]);
    return;
  }
  T line[V * L];
  for (int r = 0; r < R; ++r, c += ldc) {
    for (int v = 0; v < V; ++v) store(line + v * L, acc[r][v]);
    for (int64_t j = 0; j < columns; ++j) c[j] = add ? c[j] + line[j] : line[j];
  }
}

// c (rows x columns), columns <= V vectors: cut into tiles of as many rows as the registers hold, then
// smaller ones.
template <int V, bool UnitRows, class T>
inline void product_columns(const Factor<T>* factors, int count, int64_t rows, int64_t columns, T* c,
                            int64_t ldc, bool add) {
  constexpr int R = Tile<T>::rows;
  int64_t i = 0;
  for (; i + R <= rows; i += R) product_tile<R, V, UnitRows>(factors, count, i, columns, c, ldc, add);
  if constexpr (R > 8)
    for (; i + 8 <= rows; i += 8) product_tile<8, V, UnitRows>(factors, count, i, columns, c, ldc, add);
  if constexpr (R > 4)
    for (; i + 4 <= rows; i += 4) product_tile<4, V, UnitRows>(factors, count, i, columns, c, ldc, add);
  for (; i + 2 <= rows; i += 2) product_tile<2, V, UnitRows>(factors, count, i, columns, c, ldc, add);
  for (; i < rows; ++i) product_tile<1, V, UnitRows>(factors, count, i, columns, c, ldc, add);
}

// Columns are packed in panels of Tile::columns (the last one maybe of a single vector), each depth x panel
// width.
template <class T>
inline int64_t panel_width(int64_t columns, int64_t first) {
  return columns - first > lanes<T> ? int64_t(Tile<T>::columns) : int64_t(lanes<T>);
}

template <class T>
inline int64_t packed_columns(int64_t columns) {
  return round_up(columns, lanes<T>);
}

// value(p, j) for p < depth, j < columns as panels, zeros beyond the last column.
template <class T, class Value>
inline void pack_columns(int64_t depth, int64_t columns, T* out, Value&& value) {
  for (int64_t j = 0; j < columns; j += panel_width<T>(columns, j)) {
    const int64_t width = panel_width<T>(columns, j);
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t l = 0; l < width; ++l) *out++ = j + l < columns ? value(p, j + l) : T(0);
  }
}

// c (rows x columns) = or += sum of left * packed, for `count` (<= 2) pairs of row-major left operands and
// packed right ones.
template <class T>
inline void multiply_packed(int64_t rows, int64_t columns, const T* const* left, int64_t lda,
                            const T* const* packed, int64_t depth, int count, T* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < columns; j += panel_width<T>(columns, j)) {
    const int64_t width = panel_width<T>(columns, j);
    Factor<T> factors[2];
    for (int f = 0; f < count; ++f) factors[f] = {left[f], lda, 1, packed[f] + j * depth, width, depth};
    if (width == lanes<T>)
      product_columns<1, false>(factors, count, rows, columns - j, c + j, ldc, add);
    else
      product_columns<2, false>(factors, count, rows, columns - j, c + j, ldc, add);
  }
}

// c (a_columns x b_columns) += a^T b over rows, for row-major a (rows x a_columns) and b (rows x b_columns,
// whole vectors).
template <class T>
inline void multiply_transposed(int64_t rows, const T* a, int64_t lda, int64_t a_columns, const T* b,
                                int64_t ldb, int64_t b_columns, T* c, int64_t ldc) {
  constexpr int64_t chunk = 128;  // of rows: a panel of b stays in L1
  for (int64_t i = 0; i < rows; i += chunk) {
    const int64_t depth = std::min(chunk, rows - i);
    for (int64_t j = 0; j < b_columns; j += panel_width<T>(b_columns, j)) {
      const Factor<T> factor{a + i * lda, 1, lda, b + i * ldb + j, ldb, depth};
      if (panel_width<T>(b_columns, j) == lanes<T>)
        product_columns<1, true>(&factor, 1, a_columns, b_columns - j, c + j, ldc, true);
      else
        product_columns<2, true>(&factor, 1, a_columns, b_columns - j, c + j, ldc, true);
    }
  }
}

// out = x - centre for one cloud; rows that no edge touches become 0, so that padding (NaN included) reaches
// nothing.
template <class T>
inline void centre_cloud(int64_t n, int64_t c_in, const T* x, const T* centre, const int32_t* out_degree,
                         const int32_t* in_degree, T* out) {
  for (int64_t i = 0; i < n; ++i, x += c_in, out += c_in) {
    const bool touched = out_degree[i] > 0 || in_degree[i] > 0;
    for (int64_t c = 0; c < c_in; ++c) out[c] = touched ? x[c] - centre[c] : T(0);
  }
}

template <class T>
inline T sign_of(const T* gamma, int64_t channel) {
  return gamma != nullptr && gamma[channel] < T(0) ? T(-1) : T(1);
}

// Per channel: y = leaky(scale * winner + shift), where shift also depends on the cloud.
template <class T>
inline double scale_of(const T* gamma, const double* rstd, int64_t channel) {
  return gamma != nullptr ? std::abs(double(gamma[channel])) * rstd[channel] : 1.0;
}

template <class T>
inline double shift_of(const T* gamma, const T* beta, const double* rstd, const double* offset,
                       int64_t channel) {
  return scale_of(gamma, rstd, channel) * offset[channel] + (beta != nullptr ? double(beta[channel]) : 0.0);
}

}  // namespace crosspoint::CROSSPOINT_ISA
