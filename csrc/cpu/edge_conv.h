// What the passes of EdgeConv, of one layer and of two, share: the cut into channel blocks, centred clouds,
// statistics, and small products on unpacked operands.
#pragma once

#include <cmath>

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

// About the mean of the nodes that have edges. Any constant would be right: this one keeps rounding small far
// from the origin, and its few bits keep x - centre exact for points on a lattice, so that their ties stay
// ties.
template <class T>
inline void choose_centre(int64_t n, int64_t c_in, const T* x, const int32_t* out_degree, T* centre) {
  Buffer<double> sum(c_in), square(c_in);
  for (int64_t c = 0; c < c_in; ++c) sum[c] = square[c] = 0;
  int64_t nodes = 0;
  for (int64_t i = 0; i < n; ++i, x += c_in) {
    if (out_degree[i] == 0) continue;
    ++nodes;
    for (int64_t c = 0; c < c_in; ++c) {
      const double value = x[c];
      sum[c] += value;
      square[c] += value * value;
    }
  }
  for (int64_t c = 0; c < c_in; ++c) {
    const double count = std::max<int64_t>(nodes, 1), mean = sum[c] / count,
                 spread = std::sqrt(square[c] / count - mean * mean);
    double rounded = mean;
    if (spread > 0 && std::isfinite(spread)) {
      int exponent;
      std::frexp(spread, &exponent);
      const double grid = std::ldexp(1.0, exponent - 2);  // between a quarter and half of the spread
      rounded = std::nearbyint(mean / grid) * grid;
    }
    centre[c] = std::isfinite(rounded) ? T(rounded) : T(0);
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

// h of an edge from the centre to itself, which centring takes away; `row` is one of the weight, (2 c_in).
template <class T>
double centre_h(int64_t c_in, const T* row, const T* centre) {
  double h = 0;
  for (int64_t p = 0; p < c_in; ++p) h += double(row[c_in + p]) * centre[p];
  return h;
}

// Per-cloud sums over the edges of centred h become batch statistics: within-cloud and between-cloud scatter
// are added, so that clouds far from each other or from the origin cancel nothing. Replaces `offset` = mean of
// the centre's own h by that - mean. Values are signed by gamma (null: as they are).
template <class T>
void finish_statistics(int64_t batch, int64_t channels, const int64_t* edges, const double* sums,
                       const double* squares, const T* gamma, double eps, double* offset, double* rstd,
                       double momentum, T* running_mean, T* running_var) {
  int64_t count = 0;
  for (int64_t b = 0; b < batch; ++b) count += edges[b];
  Buffer<double> mean(channels), var(channels);
  for (int64_t c = 0; c < channels; ++c) mean[c] = var[c] = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < channels; ++c)
      mean[c] += sums[b * channels + c] + edges[b] * offset[b * channels + c];
  for (int64_t c = 0; c < channels; ++c) mean[c] /= std::max<int64_t>(count, 1);
  for (int64_t b = 0; b < batch; ++b) {
    const double cloud_edges = std::max<int64_t>(edges[b], 1);
    for (int64_t c = 0; c < channels; ++c) {
      double& constant = offset[b * channels + c];
      constant -= mean[c];
      if (edges[b] == 0) continue;
      const double own = sums[b * channels + c] / cloud_edges,
                   scatter = squares[b * channels + c] - own * sums[b * channels + c];
      const double between = own + constant;
      var[c] += (scatter < 0 ? 0 : scatter) + cloud_edges * between * between;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    var[c] /= std::max<int64_t>(count, 1);
    rstd[c] = 1 / std::sqrt(var[c] + eps);
    if (running_mean == nullptr || count == 0) continue;
    const double unbiased = var[c] * (count / double(std::max<int64_t>(count - 1, 1)));
    running_mean[c] += T(momentum * (sign_of(gamma, c) * mean[c] - running_mean[c]));
    running_var[c] += T(momentum * (unbiased - running_var[c]));
  }
}

// weight's gradient from its parts by group (neighbour's and own's, each c_in x c_out, stride ldc), times
// `factor` of each channel. Their clouds were centred; what that left out is `sums` of each cloud times its
// centre, of which A's share cancels.
template <class T>
void finish_weight(int64_t batch, int64_t c_in, int64_t c_out, int64_t ldc, int64_t groups, const T* partial,
                   const double* sums, const T* centres, bool training, const double* factor, T* grad_weight,
                   const Parallel& parallel) {
  parallel.ranges(c_in, std::max<int64_t>(1, 4096 / c_out), [&](int64_t begin, int64_t end) {
    Buffer<double> neighbour(c_out), own(c_out);
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t c = 0; c < c_out; ++c) neighbour[c] = own[c] = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const T* rows = partial + (g * 2 * c_in + p) * ldc;
        for (int64_t c = 0; c < c_out; ++c) {
          neighbour[c] += rows[c];
          own[c] += rows[c_in * ldc + c];
        }
      }
      // With batch statistics `sums` add up to 0 over the clouds, so what the centres share may go before it
      // is rounded.
      double shared = 0;
      if (training) {
        for (int64_t b = 0; b < batch; ++b) shared += centres[b * c_in + p];
        shared /= batch;
      }
      for (int64_t c = 0; c < c_out; ++c) neighbour[c] -= own[c];
      for (int64_t b = 0; b < batch; ++b) {
        const double centre = centres[b * c_in + p] - shared;
        for (int64_t c = 0; c < c_out; ++c) own[c] += sums[b * ldc + c] * centre;
      }
      for (int64_t c = 0; c < c_out; ++c) {
        grad_weight[c * 2 * c_in + p] = T(factor[c] * neighbour[c]);
        grad_weight[c * 2 * c_in + c_in + p] = T(factor[c] * own[c]);
      }
    }
  });
}

// out = leaky(scale * winner + shift) of every node, scale (c_out) and shift (batch, c_out), and 0 for nodes without
// an edge.
template <class T>
void activate(int64_t batch, int64_t n, int64_t c_out, const T* winner, const T* scale, const T* shift,
              const int32_t* out_degree, T slope, T* out, const Parallel& parallel) {
  constexpr int64_t L = lanes<T>;
  parallel.ranges(batch * n, std::max<int64_t>(1, 16384 / c_out), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = winner + i * c_out;
      const T* move = shift + i / n * c_out;
      T* to = out + i * c_out;
      for (int64_t c = 0; c < c_out; c += L) {
        const int64_t rest = c_out - c;
        const Vec<T> z = load_part(from + c, rest) * load_part(scale + c, rest) + load_part(move + c, rest);
        store_part(to + c, out_degree[i] > 0 ? leaky(z, slope) : Vec<T>{}, rest);
      }
    }
  });
}

}  // namespace crosspoint::CROSSPOINT_ISA
