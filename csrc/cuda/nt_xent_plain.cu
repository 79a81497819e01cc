// The contrastive losses on CUDA cores: in float64, and for rows of any width. A thread has one row and one column of a
// tile of 16 by 16; what it does is what nt_xent.cu and nt_xent_backward.cu do.
#include "cuda/contrast.h"
#include "cuda/contrast_plain.h"
#include "cuda/contrast_rows.h"

namespace crosspoint::cuda {
namespace {

constexpr int kSide = 16, kDepth = 32;
static_assert(kSide * kSide == kThreads, "a thread for each entry of a tile");

__device__ __forceinline__ float power_of_two(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

template <class T>
struct PlainTile {
  T left[kSide][kDepth + 1], right[kSide][kDepth + 1];
};

// A block's rows, this thread's row and column in the tile, and what they are scaled by.
template <class E, class T>
struct PlainRows {
  const ContrastColumns& c;
  const BlockOfRows& block;
  const E* rows;
  const T* scale;
  int row, column;
  T factor;
  bool there;

  __device__ PlainRows(const ContrastColumns& columns, const BlockOfRows& own, T exponent_scale)
      : c(columns),
        block(own),
        rows(static_cast<const E*>(columns.rows)),
        scale(static_cast<const T*>(columns.scale)),
        row(threadIdx.x / kSide),
        column(threadIdx.x % kSide),
        there(row < own.count) {
    factor = there ? scale[own.own + row] * exponent_scale : T(0);
  }

  // An element of a row, 0 where `there` is none.
  __device__ T element(int at, int64_t channel, bool there) const {
    return there && channel < c.width ? T(widen(rows[at * c.width + channel])) : T(0);
  }

  // x of this thread's row and the tile's column. The whole block calls.
  __device__ T entry(PlainTile<T>& tile, int first) const {
    T sum = 0;
    for (int64_t from = 0; from < c.width; from += kDepth) {
      __syncthreads();
      for (int e = threadIdx.x; e < kSide * kDepth; e += kThreads) {
        const int i = e / kDepth;
        const int64_t channel = from + e % kDepth;
        tile.left[i][e % kDepth] = element(block.own + i, channel, i < block.count);
        tile.right[i][e % kDepth] = element(first + i, channel, first + i < block.end);
      }
      __syncthreads();
      for (int d = 0; d < kDepth; ++d) sum += tile.left[row][d] * tile.right[column][d];
    }
    return sum * factor * (first + column < block.end ? scale[first + column] : T(0));
  }

  __device__ bool same_label(int first) const {
    return c.labels != nullptr && there && first + column < block.end &&
           c.labels[first + column] == c.labels[block.own + row];
  }
};

template <class E, class T>
__global__ void __launch_bounds__(kThreads) contrast_plain_row_sums(ContrastColumns c, int64_t row_views, T* sums) {
  CROSSPOINT_SHARED(tile, PlainTile<T>);
  CROSSPOINT_SHARED(met, T[kSide][kSide][3]);
  const BlockOfRows block(c, blockIdx.x, kSide);
  const auto tiles = block.tiles(kSide, blockIdx.y, c.parts);
  const Exponents<T> exponents(*static_cast<const T*>(c.temperature));
  const PlainRows<E, T> own(c, block, T(exponents.scale));
  const bool several = c.labels != nullptr && own.there && static_cast<const T*>(c.target)[block.own + own.row] != T(0);
  const T lowest = sizeof(T) == 4 ? T(-3.4028235e38f) : T(-1.7976931348623157e308);
  T bound = lowest, sum = 0, positives = 0;
  for (int t = tiles.first; t < tiles.last; ++t) {
    const int first = block.begin + t * kSide;
    const T x = own.entry(tile, first);
    if (!block.counts(own.row, first + own.column)) continue;
    if (own.same_label(first)) {
      if (!several) continue;
      positives += x;
    }
    const T higher = fmax(bound, x);
    sum = sum * power_of_two(bound - higher) + power_of_two(x - higher);
    bound = higher;
  }
  met[own.row][own.column][0] = bound, met[own.row][own.column][1] = sum, met[own.row][own.column][2] = positives;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= block.count) return;
  T most = lowest, total = 0, chosen = 0;
  for (int j = 0; j < kSide; ++j) most = fmax(most, met[threadIdx.x][j][0]);
  for (int j = 0; j < kSide; ++j) {
    total += met[threadIdx.x][j][1] * power_of_two(met[threadIdx.x][j][0] - most);
    chosen += met[threadIdx.x][j][2];
  }
  const int64_t plane = row_views * c.row_count;
  T* to = sums + (blockIdx.y * 3 * row_views + block.view) * c.row_count + block.first + threadIdx.x;
  to[0] = most, to[plane] = total, to[2 * plane] = chosen;
}

template <class E, class T>
__global__ void __launch_bounds__(kThreads, 2)
    contrast_plain_row_gradient(ContrastColumns c, const T* exponents_of, T* partial, T* moments) {
  CROSSPOINT_SHARED(tile, PlainTile<T>);
  CROSSPOINT_SHARED(weights, T[kSide][kSide]);
  const BlockOfRows block(c, blockIdx.x, kSide);
  const auto tiles = block.tiles(kSide, blockIdx.y, c.parts);
  const Exponents<T> exponents(*static_cast<const T*>(c.temperature));
  const PlainRows<E, T> own(c, block, T(exponents.scale));
  const T exponent = own.there ? exponents_of[block.own + own.row] : T(INFINITY);
  const T lacks = c.labels != nullptr && own.there ? static_cast<const T*>(c.target)[block.own + own.row] : T(0);
  const int64_t part = block.view * c.parts + blockIdx.y;
  T* out = partial + (part * c.row_count + block.first) * c.width;
  T moment = 0;
  for (int64_t channel = threadIdx.x; channel < c.width; channel += kThreads)
    for (int i = 0; i < block.count; ++i) out[i * c.width + channel] = 0;
  for (int t = tiles.first; t < tiles.last; ++t) {
    const int first = block.begin + t * kSide, column = first + own.column;
    const T x = own.entry(tile, first);
    bool counts = own.there && block.counts(own.row, column);
    T w = 0;
    if (counts) {
      w = power_of_two(x - exponent) + power_of_two(x - exponents_of[column]);
      if (own.same_label(first)) {
        counts = lacks != T(0);
        w -= lacks;
      }
      moment += counts ? w * x : T(0);
      w = counts ? w * own.scale[column] : T(0);
    }
    weights[own.row][own.column] = w;
    __syncthreads();
    for (int64_t channel = threadIdx.x; channel < c.width; channel += kThreads) {
      T z[kSide];
#pragma unroll
      for (int j = 0; j < kSide; ++j) z[j] = own.element(first + j, channel, first + j < block.end);
      for (int i = 0; i < block.count; ++i) {
        T sum = 0;
#pragma unroll
        for (int j = 0; j < kSide; ++j) sum += weights[i][j] * z[j];
        out[i * c.width + channel] += sum;
      }
    }
    __syncthreads();
  }
  weights[own.row][own.column] = moment;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= block.count) return;
  T sum = 0;
  for (int j = 0; j < kSide; ++j) sum += weights[threadIdx.x][j];
  moments[part * c.row_count + block.first + threadIdx.x] = sum;
}

// Calls f with a value of the rows' type, and of the sums'.
template <class F>
cudaError_t with_rows(Product product, F&& f) {
  switch (product) {
    case Product::bf16: return f(__nv_bfloat16(), float());
    case Product::f16: return f(__half(), float());
    case Product::float64: return f(double(), double());
    default: return f(float(), float());
  }
}

dim3 grid_of_rows(const ContrastColumns& c, int64_t views) {
  return dim3(static_cast<unsigned>(views * ((c.row_count + kSide - 1) / kSide)), static_cast<unsigned>(c.parts));
}

}  // namespace

cudaError_t contrast_plain_sums(const ContrastColumns& c, int64_t row_views, void* sums, cudaStream_t stream) {
  return with_rows(c.product, [&](auto row, auto sum) {
    using E = decltype(row);
    using T = decltype(sum);
    return launch(contrast_plain_row_sums<E, T>, grid_of_rows(c, row_views), dim3(kThreads), 0, stream, c, row_views,
                  static_cast<T*>(sums));
  });
}

cudaError_t contrast_plain_gradient(const ContrastColumns& c, const void* exponents, void* partial, void* moments,
                                    cudaStream_t stream) {
  return with_rows(c.product, [&](auto row, auto sum) {
    using E = decltype(row);
    using T = decltype(sum);
    return launch(contrast_plain_row_gradient<E, T>, grid_of_rows(c, c.views), dim3(kThreads), 0, stream, c,
                  static_cast<const T*>(exponents), static_cast<T*>(partial), static_cast<T*>(moments));
  });
}

}  // namespace crosspoint::cuda
