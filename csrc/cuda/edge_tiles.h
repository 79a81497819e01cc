// Tiles of 64 edges in shared memory, and their products: a warp for every 16 rows, 64 columns of float or
// 16 of double.
#pragma once

#include "crosspoint/cuda/edge_conv2.h"
#include "cuda/mma.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {

inline constexpr int kTileThreads = 128;
inline constexpr int kTileRows = static_cast<int>(kTileEdges);
inline constexpr int kDepth = 64;  // channels, or edges, that one product goes through
// Elements of a row in shared memory: no two lanes of a fragment meet in a bank.
inline constexpr int kLeftPitch = kDepth + 4;
inline constexpr int kRightPitch = 64 + 8;
inline constexpr size_t kMostTileShared = 96 << 10;  // fits every chip since sm_80
template <class T>
inline constexpr int kEighths = sizeof(T) == 4 ? 8 : 2;  // of eight columns each, as registers go
template <class T>
inline constexpr int kColumns = 8 * kEighths<T>;

// The rows of a tile: edges of one cloud.
struct TileEdges {
  int source[kTileRows];
  int target[kTileRows];  // -1: no edge
  int slot[kTileRows];
};

template <class T>
__device__ __forceinline__ T leaky_less_pivot(T z, T shift, T slope) {
  // leaky(z + shift) - leaky(shift); the side of shift itself adds exactly nothing.
  const T bend = shift * (T(1) - slope);
  const T above = shift > T(0) ? T(0) : bend, below = shift > T(0) ? -bend : T(0);
  return z + shift > T(0) ? z + above : z * slope + below;
}

// Channels [c0, c0 + 64) of a on each row's edge, or of U + V; zeros where there is none. The whole block calls.
template <class T, bool raw>
__device__ __forceinline__ void fill_edges(T* tile, int pitch, const EdgeTiles<T>& args, int64_t b,
                                           const TileEdges& edges, int64_t c0) {
  constexpr int at_once = kDepth / kFour;
  const int mine = threadIdx.x % at_once * kFour;
  const int64_t C = args.c_mid, c = c0 + mine;
  const int count = part_of_four(C - c);
  const bool fours = C % kFour == 0;
  const T slope = static_cast<T>(args.negative_slope);
  const T* cloud = args.nodes + b * args.graph.n * 2 * C + c;
  Four<T> gain{}, shift{};
  if constexpr (!raw) {
    gain = load_four<T>(args.gain + c, count, fours);
    shift = load_four<T>(args.shift + b * C + c, count, fours);
  }
#pragma unroll 2
  for (int row = threadIdx.x / at_once; row < kTileRows; row += kTileThreads / at_once) {
    const int j = edges.target[row];
    Four<T> value{};
    if (j >= 0) {
      const Four<T> u = load_four<T>(cloud + j * 2 * C, count, fours);
      const Four<T> v = load_four<T>(cloud + edges.source[row] * 2 * C + C, count, fours);
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        value.v[i] = u.v[i] + v.v[i];
        if constexpr (!raw) value.v[i] = leaky_less_pivot(value.v[i] * gain.v[i], shift.v[i], slope);
      }
    }
    values_at<kFour>(tile + row * pitch + mine) = value;
  }
}

// Channels [c0, c0 + 64) of g of each row's source where its edge wins, else 0. The whole block calls.
template <class T, class Slot>
__device__ __forceinline__ void fill_winners(T* tile, int pitch, const EdgeTileGradientArgs<T>& args, int64_t b,
                                             const TileEdges& edges, int64_t c0) {
  constexpr int at_once = kDepth / kFour;
  const int mine = threadIdx.x % at_once * kFour;
  const int64_t C = args.c_out, c = c0 + mine, first = b * args.tiles.graph.n * C + c;
  const int count = part_of_four(C - c);
  const bool fours = C % kFour == 0;
  const Slot* slots = static_cast<const Slot*>(args.slot) + first;
#pragma unroll 2
  for (int row = threadIdx.x / at_once; row < kTileRows; row += kTileThreads / at_once) {
    Four<T> value{};
    if (edges.target[row] >= 0) {
      const int64_t at = edges.source[row] * C;
      const auto slot = load_four<Slot>(slots + at, count, fours);
#pragma unroll
      for (int i = 0; i < kFour; ++i)
        if (i < count && static_cast<int>(slot.v[i]) == edges.slot[row]) value.v[i] = args.g[first + at + i];
    }
    values_at<kFour>(tile + row * pitch + mine) = value;
  }
}

template <class T>
__device__ __forceinline__ void fill_winners(T* tile, int pitch, const EdgeTileGradientArgs<T>& args, int64_t b,
                                             const TileEdges& edges, int64_t c0) {
  if (args.slot_bytes == 1)
    fill_winners<T, uint8_t>(tile, pitch, args, b, edges, c0);
  else
    fill_winners<T, int32_t>(tile, pitch, args, b, edges, c0);
}

// tile[p][c] = matrix[p * down + c * across] for p < depth and c < columns, else 0; minus it where gamma[c] is
// negative. The whole block calls.
template <class T>
__device__ __forceinline__ void fill_right(T* tile, const T* matrix, int64_t down, int64_t across, int64_t depth,
                                           int64_t columns, const T* gamma = nullptr) {
  constexpr int W = kColumns<T>;
  for (int e = threadIdx.x; e < kDepth * W; e += kTileThreads) {
    const int p = across == 1 ? e / W : e % kDepth, c = across == 1 ? e % W : e / kDepth;
    const T value = p < depth && c < columns ? matrix[p * down + c * across] : T(0);
    tile[p * kRightPitch + c] = gamma != nullptr && c < columns && gamma[c] < T(0) ? -value : value;
  }
}

// This thread's part of 64 rows by kColumns: rows row(i), columns column(e, i) for i in [0, 4).
template <class T>
struct Accumulators {
  T v[kEighths<T>][4];

  static __device__ __forceinline__ int row(int i) { return threadIdx.x / kWarp * 16 + lane_id() / 4 + i / 2 * 8; }
  static __device__ __forceinline__ int column(int e, int i) { return e * 8 + lane_id() % 4 * 2 + i % 2; }
};

// x as tensor cores take it: in tf32, or in two of them.
template <Product product>
__device__ __forceinline__ void cut(float x, uint32_t& high, uint32_t& low) {
  if constexpr (product == Product::tf32x3)
    split_tf32(x, high, low);
  else
    high = to_tf32(x);
}

// sum += left right over `depth` (a multiple of 16; the tiles hold zeros beyond what there is). `turned`: left is
// (depth, rows), of pitch kRightPitch.
template <class T, Product product, bool turned>
__device__ __forceinline__ void multiply_tile(Accumulators<T>& sum, const T* left, const T* right, int depth) {
  const int g = lane_id() / 4, t = lane_id() % 4, first = threadIdx.x / kWarp * 16;
  const auto at = [&](int row, int p) {
    return turned ? left[p * kRightPitch + first + row] : left[(first + row) * kLeftPitch + p];
  };
  if constexpr (product == Product::float64) {
    for (int p = 0; p < depth; ++p) {
      const T a[2] = {at(g, p), at(g + 8, p)};
#pragma unroll
      for (int e = 0; e < kEighths<T>; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.v[e][i] += a[i / 2] * right[p * kRightPitch + Accumulators<T>::column(e, i)];
    }
  } else if constexpr (product == Product::bf16) {
    for (int p = 0; p < depth; p += 16) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int from = p + 2 * t + i / 2 * 8;
        a[i] = pack_bf16(at(g + i % 2 * 8, from), at(g + i % 2 * 8, from + 1));
      }
#pragma unroll
      for (int e = 0; e < kEighths<T>; ++e) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const T* from = right + (p + 2 * t + i * 8) * kRightPitch + e * 8 + g;
          b[i] = pack_bf16(from[0], from[kRightPitch]);
        }
        mma_bf16(sum.v[e], a, b);
      }
    }
  } else {
    for (int p = 0; p < depth; p += 8) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        cut<product>(at(g + i % 2 * 8, p + t + i / 2 * 4), high[i], low[i]);
      }
#pragma unroll
      for (int e = 0; e < kEighths<T>; ++e) {
        uint32_t b[2], rest[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          cut<product>(right[(p + t + i * 4) * kRightPitch + e * 8 + g], b[i], rest[i]);
        }
        if constexpr (product == Product::tf32x3) {
          mma_tf32(sum.v[e], low, b);
          mma_tf32(sum.v[e], high, rest);
        }
        mma_tf32(sum.v[e], high, b);
      }
    }
  }
}

// The matrix that tiles are multiplied by, in pieces of kDepth rows: all of them in shared memory from the start where
// they fit, else one at a time.
template <class T>
struct RightPieces {
  static size_t bytes(int pieces) { return shared_bytes<T>(size_t(pieces) * kDepth * kRightPitch); }
  // How many fit beside a left tile, if not all of them then one.
  static int resident(int64_t pieces) {
    const size_t left = shared_bytes<T>(kTileRows * kLeftPitch) + shared_bytes<TileEdges>(1);
    return left + bytes(static_cast<int>(pieces < 8 ? pieces : 8)) <= kMostTileShared && pieces <= 8
               ? static_cast<int>(pieces)
               : 1;
  }
};

__host__ __device__ inline int64_t blocks_of(int64_t channels, int64_t width) { return (channels + width - 1) / width; }

__device__ __forceinline__ int depth_of(int64_t left) {
  return left >= kDepth ? kDepth : static_cast<int>((left + 15) / 16 * 16);
}

// The edges in slot s of the nodes [first, first + 64) of cloud b.
__device__ __forceinline__ void take_slot(TileEdges& edges, const Graph& graph, int64_t b, int64_t first, int64_t last,
                                          int64_t s) {
  if (threadIdx.x >= kTileRows) return;
  const int64_t i = first + threadIdx.x;
  int64_t j = i < last ? graph.idx[(b * graph.n + i) * graph.k + s] : -1;
  if (j < 0 || j >= graph.n) j = -1;
  edges.source[threadIdx.x] = static_cast<int>(i);
  edges.target[threadIdx.x] = static_cast<int>(j);
  edges.slot[threadIdx.x] = static_cast<int>(s);
}

// Sums over the tile's rows of each column, from each thread's of its own rows, to sums[column] for the columns below
// `columns`. `space`: (4, kColumns) doubles. The whole block calls, and may write to the space after.
template <class T>
__device__ __forceinline__ void sum_columns(const Accumulators<T>& values, double* space, int64_t columns,
                                            double* sums) {
  constexpr int W = kColumns<T>;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEighths<T>; ++e)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T sum = values.v[e][half] + values.v[e][half + 2];
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (lane_id() < 4) space[threadIdx.x / kWarp * W + Accumulators<T>::column(e, half)] = sum;
    }
  __syncthreads();
  if (threadIdx.x < W && threadIdx.x < columns) {
    double sum = space[threadIdx.x];
    for (int w = 1; w < kTileThreads / kWarp; ++w) sum += space[w * W + threadIdx.x];
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
}

// Calls run with the product that tiles are multiplied by.
template <class Run>
cudaError_t with_product(const EdgeTiles<float>& tiles, Run&& run) {
  switch (tiles.product) {
    case Product::bf16: return run(Constant<Product::bf16>{});
    case Product::tf32: return run(Constant<Product::tf32>{});
    case Product::tf32x3: return run(Constant<Product::tf32x3>{});
    default: return cudaErrorInvalidValue;
  }
}
template <class Run>
cudaError_t with_product(const EdgeTiles<double>&, Run&& run) {
  return run(Constant<Product::float64>{});
}

}  // namespace crosspoint::cuda
