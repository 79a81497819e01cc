// EdgeConv's forward pass: degrees, centred clouds, sums over neighbours and over edges, and the gather that ends it.
#include "crosspoint/cuda/edge_conv.h"

#include <cmath>

#include "cuda/edge_slices.h"
#include "cuda/mma.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCentreThreads = 1024;
constexpr int kCentreWarps = kCentreThreads / kWarp;
constexpr int kAhead = 8;  // nodes that a warp reads before it needs the first of them

// ---- degrees and centres

__global__ void __launch_bounds__(kThreads) conv_degrees(Graph graph, int32_t* degrees) {
  const int64_t nodes = graph.batch * graph.n;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < nodes; i += gridDim.x * int64_t(kThreads)) {
    int32_t* in_degree = degrees + nodes + i / graph.n * graph.n;
    const int64_t* row = graph.idx + i * graph.k;
    int count = 0;
    for (int64_t s = 0; s < graph.k; ++s) {
      const int64_t j = row[s];
      if (j < 0 || j >= graph.n) continue;
      ++count;
      atomicAdd(in_degree + j, 1);  // of integers: the order does not matter
    }
    degrees[i] = count;
  }
}

// A block for 32 channels of a cloud: a lane for each, a warp for every 32nd node.
template <class T>
__global__ void __launch_bounds__(kCentreThreads) conv_centre(EdgeConvCentreArgs<T> args) {
  CROSSPOINT_SHARED(sums, double[kCentreWarps][kWarp]);
  CROSSPOINT_SHARED(squares, double[kCentreWarps][kWarp]);
  CROSSPOINT_SHARED(counts, int[kCentreWarps]);
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t slices = (args.channels + kWarp - 1) / kWarp;
  for (int64_t piece = blockIdx.x; piece < args.batch * slices; piece += gridDim.x) {
    const int64_t b = piece / slices, c = piece % slices * kWarp + lane;
    const bool here = c < args.channels;
    double sum = 0, square = 0;
    int count = 0;
    for (int64_t first = warp; first < args.n; first += kCentreWarps * kAhead) {
      T values[kAhead];
      bool counted[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t i = first + u * kCentreWarps, node = b * args.n + i;
        counted[u] = i < args.n && args.degrees[node] > 0;
        values[u] = i < args.n && here ? args.x[node * args.channels + c] : T(0);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (!counted[u]) continue;
        const double x = values[u];
        ++count;
        sum += x;
        square += x * x;
      }
    }
    sums[warp][lane] = sum;
    squares[warp][lane] = square;
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    if (warp == 0 && here) {
      for (int w = 1; w < kCentreWarps; ++w) {
        sum += sums[w][lane];
        square += squares[w][lane];
        count += counts[w];
      }
      const double nodes = count > 1 ? count : 1;
      double mean = sum / nodes;
      const double spread = std::sqrt(square / nodes - mean * mean);
      if (spread > 0 && spread < 1e300) {
        int exponent;
        std::frexp(spread, &exponent);
        const double grid = std::ldexp(1.0, exponent - 2);
        mean = std::nearbyint(mean / grid) * grid;
      }
      args.centre[b * args.channels + c] = std::fabs(mean) < 1e300 ? T(mean) : T(0);
    }
    __syncthreads();
  }
}

// A thread for four channels of a node.
template <class T>
__global__ void __launch_bounds__(kThreads) conv_subtract(EdgeConvCentreArgs<T> args, T* out, bool fours) {
  const int64_t nodes = args.batch * args.n, C = args.channels, groups = (C + kFour - 1) / kFour;
  for (int64_t t = blockIdx.x * int64_t(kThreads) + threadIdx.x; t < nodes * groups; t += gridDim.x * int64_t(kThreads)) {
    const int64_t i = quotient(t, groups), c = (t - i * groups) * kFour, at = i * C + c;
    const int count = part_of_four(C - c);
    const Four<T> x = load_four<T>(args.x + at, count, fours);
    const Four<T> centre = load_four<T>(args.centre + quotient(i, args.n) * C + c, count, fours);
    const bool touched = args.degrees[i] > 0 || args.degrees[nodes + i] > 0;
    Four<T> difference;
#pragma unroll
    for (int v = 0; v < kFour; ++v) difference.v[v] = touched ? x.v[v] - centre.v[v] : T(0);
    store_four<T>(out + at, difference, count, fours);
  }
}

// ---- gathers

template <class T, bool shared>
__global__ void __launch_bounds__(kSliceThreads, kSliceBlocks<T>)
    conv_neighbor_sum(EdgeConvSumArgs<T> args, Slices slices, bool fours) {
  SharedArena arena;
  T* space = arena.take<T>(shared ? slices.n * slices.width : 0);
  const Graph& graph = args.graph;
  for (int64_t p = blockIdx.x; p < slices.pieces(); p += gridDim.x) {
    const Piece<T, shared> piece(slices, p, args.x, args.channels, fours, space);
    for (int64_t i = piece.first + piece.node; i < piece.last; i += piece.at_once) {
      const int64_t* idx = graph.idx + (piece.b * graph.n + i) * graph.k;
      Four<T> sum{};
      for (int64_t s = 0; s < graph.k; ++s) {
        const int64_t j = idx[s];
        if (j < 0 || j >= graph.n) continue;
        const Four<T> x = piece.row(j);
#pragma unroll
        for (int v = 0; v < kFour; ++v) sum.v[v] += x.v[v];
      }
      store_four<T>(args.out + (piece.b * graph.n + i) * args.channels + piece.c, sum, piece.count, fours);
    }
  }
}

__device__ __forceinline__ void store_slots(void* slot, int bytes, int64_t at, const int (&s)[kFour], int count,
                                            bool fours) {
  if (bytes == 1) {
    Four<uint8_t> x;
#pragma unroll
    for (int v = 0; v < kFour; ++v) x.v[v] = static_cast<uint8_t>(s[v]);
    store_four<uint8_t>(static_cast<uint8_t*>(slot) + at, x, count, fours);
    return;
  }
#pragma unroll
  for (int v = 0; v < kFour; ++v)
    if (v < count) static_cast<int32_t*>(slot)[at + v] = s[v];
}

template <class T, bool shared>
__global__ void __launch_bounds__(kSliceThreads, kSliceBlocks<T>)
    conv_max(EdgeConvMaxArgs<T> args, Slices slices, bool fours) {
  SharedArena arena;
  T* space = arena.take<T>(shared ? slices.n * slices.width : 0);
  const Graph& graph = args.graph;
  const T slope = static_cast<T>(args.negative_slope);
  const int k = static_cast<int>(graph.k);
  for (int64_t p = blockIdx.x; p < slices.pieces(); p += gridDim.x) {
    const Piece<T, shared> piece(slices, p, args.nodes, 2 * args.channels, fours, space);
    const Four<T> scale = load_four<T>(args.scale + piece.c, piece.count, fours);
    const Four<T> shift = load_four<T>(args.shift + piece.b * args.channels + piece.c, piece.count, fours);
    // 0 where gamma is: all edges tie there, unless U is infinite or NaN.
    Four<T> factor{{T(1), T(1), T(1), T(1)}};
    if (args.gamma != nullptr) {
      const Four<T> gamma = load_four<T>(args.gamma + piece.c, piece.count, fours, T(1));
#pragma unroll
      for (int v = 0; v < kFour; ++v) factor.v[v] = gamma.v[v] == T(0) ? T(0) : T(1);
    }
    for (int64_t i = piece.first + piece.node; i < piece.last; i += piece.at_once) {
      const int64_t node = piece.b * graph.n + i, at = node * args.channels + piece.c;
      const int64_t* idx = graph.idx + node * k;
      int s = 0, slot[kFour] = {};
      Four<T> most{};
      for (; s < k; ++s)
        if (idx[s] >= 0 && idx[s] < graph.n) break;
      const bool any = s < k;
      if (any) {
        most = piece.row(idx[s]);
#pragma unroll
        for (int v = 0; v < kFour; ++v) most.v[v] *= factor.v[v], slot[v] = s;
      }
      for (++s; s < k; ++s) {
        const int64_t j = idx[s];
        if (j < 0 || j >= graph.n) continue;
        const Four<T> x = piece.row(j);
#pragma unroll
        for (int v = 0; v < kFour; ++v) {
          const T value = x.v[v] * factor.v[v];
          const bool wins = !(value <= most.v[v]) && most.v[v] == most.v[v];
          most.v[v] = wins ? value : most.v[v];
          slot[v] = wins ? s : slot[v];
        }
      }
      Four<T> out{};
      if (any) {
        const T* own = args.nodes + node * 2 * args.channels + args.channels + piece.c;
        const Four<T> v_own = load_four<T>(own, piece.count, fours);
#pragma unroll
        for (int v = 0; v < kFour; ++v) {
          if (factor.v[v] == T(0) && v < piece.count)
            most.v[v] = args.nodes[(piece.b * graph.n + idx[slot[v]]) * 2 * args.channels + piece.c + v];
          most.v[v] += v_own.v[v];
          const T z = most.v[v] * scale.v[v] + shift.v[v];
          out.v[v] = z > T(0) ? z : z * slope;
        }
      }
      store_four<T>(args.out + at, out, piece.count, fours);
      if (args.winner == nullptr) continue;
      store_four<T>(args.winner + at, most, piece.count, fours);
      store_slots(args.slot, args.slot_bytes, at, slot, piece.count, fours);
    }
  }
}

// ---- sums over edges in input space

// A square of channels and a part of a cloud's nodes.
struct MomentsPiece {
  int64_t part, b, left, right;  // the first channels of its rows and columns
  int64_t begin, end;            // nodes of cloud b

  template <class T>
  __device__ MomentsPiece(const EdgeConvMomentsArgs<T>& args, int64_t piece, int64_t width) {
    const int64_t tiles = (args.channels + width - 1) / width, each = (args.n + args.parts - 1) / args.parts;
    part = piece / (tiles * tiles), b = part / args.parts;
    left = piece / tiles % tiles * width, right = piece % tiles * width;
    begin = part % args.parts * each;
    end = begin + each < args.n ? begin + each : args.n;
  }
};

// Sums of x_j and of x_i over the edges, of the channel of each thread below W.
struct FirstSums {
  double j = 0, i = 0;

  template <class T, int rows, int pitch>
  __device__ __forceinline__ void add(const T (&x)[rows][pitch], const T (&degree)[2][rows]) {
    T part_j = 0, part_i = 0;
    for (int r = 0; r < rows; ++r) {
      part_j += degree[1][r] * x[r][threadIdx.x];
      part_i += degree[0][r] * x[r][threadIdx.x];
    }
    j += part_j;
    i += part_i;
  }
  template <class T>
  __device__ __forceinline__ void store(const EdgeConvMomentsArgs<T>& args, const MomentsPiece& piece) const {
    if (piece.left + threadIdx.x >= args.channels) return;
    double* first = args.first + piece.part * 2 * args.channels + piece.left + threadIdx.x;
    first[0] = j;
    first[args.channels] = i;
  }
};

// Degrees of `rows` nodes from i0 on, 0 beyond the piece's last; the threads below 2 rows call.
template <class T, int rows>
__device__ __forceinline__ void load_degrees(T (&degree)[2][rows], const EdgeConvMomentsArgs<T>& args, const MomentsPiece& piece,
                                             int64_t i0) {
  const int which = threadIdx.x / rows, row = threadIdx.x % rows;
  const int64_t at = (which * args.batch + piece.b) * args.n + i0 + row;
  degree[which][row] = i0 + row < piece.end ? T(args.degrees[at]) : T(0);
}

// A block for kSide M channels by as many, M x M of each matrix a thread.
constexpr int kSide = 16, kRows = 16;

template <class T, int M>
__global__ void __launch_bounds__(kSide* kSide) conv_moments(EdgeConvMomentsArgs<T> args) {
  constexpr int W = kSide * M;
  CROSSPOINT_SHARED(left, T[kRows][W]);
  CROSSPOINT_SHARED(sums, T[kRows][W]);
  CROSSPOINT_SHARED(right, T[kRows][W]);
  CROSSPOINT_SHARED(degree, T[2][kRows]);
  const int64_t C = args.channels, tiles = (C + W - 1) / W;
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  for (int64_t p = blockIdx.x; p < args.batch * args.parts * tiles * tiles; p += gridDim.x) {
    const MomentsPiece piece(args, p, W);
    T jj[M][M] = {}, ji[M][M] = {}, ii[M][M] = {};
    FirstSums first;
    for (int64_t i0 = piece.begin; i0 < piece.end; i0 += kRows) {
      __syncthreads();
      for (int e = threadIdx.x; e < kRows * W; e += kSide * kSide) {
        const int64_t i = i0 + e / W, l = piece.left + e % W, r = piece.right + e % W, at = (piece.b * args.n + i) * C;
        left[e / W][e % W] = i < piece.end && l < C ? args.x[at + l] : T(0);
        sums[e / W][e % W] = i < piece.end && l < C ? args.sums[at + l] : T(0);
        right[e / W][e % W] = i < piece.end && r < C ? args.x[at + r] : T(0);
      }
      if (threadIdx.x < 2 * kRows) load_degrees(degree, args, piece, i0);
      __syncthreads();
      if (threadIdx.x < W) first.add(left, degree);
#pragma unroll 4
      for (int i = 0; i < kRows; ++i) {
        T x[M], p[M], y[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          x[m] = left[i][row * M + m];
          p[m] = sums[i][row * M + m];
          y[m] = right[i][column * M + m];
        }
        const T in = degree[1][i], out = degree[0][i];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int l = 0; l < M; ++l) {
            jj[m][l] += in * x[m] * y[l];
            ji[m][l] += p[m] * y[l];
            ii[m][l] += out * x[m] * y[l];
          }
      }
    }
    T* gram = args.gram + piece.part * 3 * C * C;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int l = 0; l < M; ++l) {
        const int64_t a = piece.left + row * M + m, c = piece.right + column * M + l;
        if (a >= C || c >= C) continue;
        gram[a * C + c] = jj[m][l];
        gram[(C + a) * C + c] = ji[m][l];
        gram[(2 * C + a) * C + c] = ii[m][l];
      }
    if (piece.right == 0 && threadIdx.x < W) first.store(args, piece);
  }
}

// The same on tensor cores, in three products of tf32: a block for a square of 64 channels, a warp for 16 by 32 of each
// matrix. They cut sums off where others round, so sums over kNodes nodes are added up outside of them.
constexpr int kSquare = 64, kNodes = 16, kPitch = kSquare + 8;  // the loads of a fragment meet no bank twice
constexpr int kMomentsThreads = 256, kEighths = 4;              // of eight columns each

__global__ void __launch_bounds__(kMomentsThreads, 2) conv_moments_tiles(EdgeConvMomentsArgs<float> args, bool fours) {
  CROSSPOINT_SHARED(left, float[kNodes][kPitch]);
  CROSSPOINT_SHARED(sums, float[kNodes][kPitch]);
  CROSSPOINT_SHARED(right, uint32_t[2][kNodes][kPitch]);  // in tf32, and what is left
  CROSSPOINT_SHARED(degree, float[2][kNodes]);
  static_assert(kNodes * kSquare == kMomentsThreads * kFour, "a thread copies four channels of a node");
  const int node = threadIdx.x / (kSquare / kFour), channel = threadIdx.x % (kSquare / kFour) * kFour;
  const int64_t C = args.channels, tiles = (C + kSquare - 1) / kSquare;
  const int g = lane_id() / 4, t = lane_id() % 4, row = threadIdx.x / kWarp % 4 * 16 + g, column = threadIdx.x / kWarp / 4 * 32;
  for (int64_t p = blockIdx.x; p < args.batch * args.parts * tiles * tiles; p += gridDim.x) {
    const MomentsPiece piece(args, p, kSquare);
    Four<float> next[3];  // of x, sums and x
    const auto fetch = [&](int64_t i0) {
      const int64_t i = i0 + node, at = (piece.b * args.n + i) * C + channel;
      const int l = i < piece.end ? part_of_four(C - piece.left - channel) : 0;
      const int r = i < piece.end ? part_of_four(C - piece.right - channel) : 0;
      next[0] = load_four<float>(args.x + at + piece.left, l, fours);
      next[1] = load_four<float>(args.sums + at + piece.left, l, fours);
      next[2] = load_four<float>(args.x + at + piece.right, r, fours);
    };
    float total[3][kEighths][4] = {};
    FirstSums first;
    fetch(piece.begin);
    for (int64_t i0 = piece.begin; i0 < piece.end; i0 += kNodes) {
      __syncthreads();
      values_at<kFour>(&left[node][channel]) = next[0];
      values_at<kFour>(&sums[node][channel]) = next[1];
      Four<uint32_t> high, low;
#pragma unroll
      for (int v = 0; v < kFour; ++v) split_tf32(next[2].v[v], high.v[v], low.v[v]);
      values_at<kFour>(&right[0][node][channel]) = high;
      values_at<kFour>(&right[1][node][channel]) = low;
      if (threadIdx.x < 2 * kNodes) load_degrees(degree, args, piece, i0);
      __syncthreads();
      if (i0 + kNodes < piece.end) fetch(i0 + kNodes);
      if (threadIdx.x < kSquare) first.add(left, degree);
#pragma unroll
      for (int which = 0; which < 3; ++which) {
        float part[kEighths][4] = {};
#pragma unroll 1
        for (int k = 0; k < kNodes; k += 8) {
          uint32_t high[4], low[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int from = k + t + i / 2 * 4, c = row + i % 2 * 8;
            split_tf32(which == 1 ? sums[from][c] : degree[which == 0][from] * left[from][c], high[i], low[i]);
          }
#pragma unroll
          for (int half = 1; half >= 0; --half) {
            uint32_t b[kEighths][2];
#pragma unroll
            for (int e = 0; e < kEighths; ++e)
#pragma unroll
              for (int i = 0; i < 2; ++i) b[e][i] = right[half][k + t + i * 4][column + e * 8 + g];
            if (half == 0) {
#pragma unroll
              for (int e = 0; e < kEighths; ++e) mma_tf32(part[e], low, b[e]);
            }
#pragma unroll
            for (int e = 0; e < kEighths; ++e) mma_tf32(part[e], high, b[e]);
          }
        }
#pragma unroll
        for (int e = 0; e < kEighths; ++e)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[which][e][i] += part[e][i];
      }
    }
#pragma unroll
    for (int which = 0; which < 3; ++which)
#pragma unroll
      for (int e = 0; e < kEighths; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t a = piece.left + row + i / 2 * 8, c = piece.right + column + e * 8 + t * 2 + i % 2;
          if (a < C && c < C) args.gram[((piece.part * 3 + which) * C + a) * C + c] = total[which][e][i];
        }
    if (piece.right == 0 && threadIdx.x < kSquare) first.store(args, piece);
  }
}

// ---- launches

template <class T>
cudaError_t launch_centre(const EdgeConvCentreArgs<T>& args, cudaStream_t stream) {
  const int64_t pieces = args.batch * ((args.channels + kWarp - 1) / kWarp);
  return launch(conv_centre<T>, grid_for(pieces), dim3(kCentreThreads), 0, stream, args);
}

template <class T>
cudaError_t launch_subtract(const EdgeConvCentreArgs<T>& args, T* out, cudaStream_t stream) {
  const int64_t pieces = args.batch * args.n * ((args.channels + kFour - 1) / kFour);
  return launch(conv_subtract<T>, grid_for((pieces + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, args, out,
                by_fours(args.channels));
}

template <class T>
cudaError_t launch_sum(const EdgeConvSumArgs<T>& args, cudaStream_t stream) {
  const Slices s = slices_of<T>(args.graph.batch, args.graph.n, args.channels);
  return launch_slices<T>(conv_neighbor_sum<T, true>, conv_neighbor_sum<T, false>, args, s, stream);
}

template <class T>
cudaError_t launch_max(const EdgeConvMaxArgs<T>& args, cudaStream_t stream) {
  const Slices s = slices_of<T>(args.graph.batch, args.graph.n, args.channels);
  return launch_slices<T>(conv_max<T, true>, conv_max<T, false>, args, s, stream);
}

template <class T, int M>
cudaError_t launch_moments(const EdgeConvMomentsArgs<T>& args, cudaStream_t stream) {
  const int64_t tiles = (args.channels + kSide * M - 1) / (kSide * M);
  return launch(conv_moments<T, M>, grid_for(args.batch * args.parts * tiles * tiles), dim3(kSide * kSide), 0, stream,
                args);
}

}  // namespace

cudaError_t edge_conv_degrees(const Graph& graph, int32_t* degrees, cudaStream_t stream) {
  return launch(conv_degrees, grid_for((graph.batch * graph.n + kThreads - 1) / kThreads), dim3(kThreads), 0, stream,
                graph, degrees);
}

cudaError_t edge_conv_centre(const EdgeConvCentreArgs<float>& a, cudaStream_t s) { return launch_centre(a, s); }
cudaError_t edge_conv_centre(const EdgeConvCentreArgs<double>& a, cudaStream_t s) { return launch_centre(a, s); }
cudaError_t edge_conv_subtract(const EdgeConvCentreArgs<float>& a, float* out, cudaStream_t s) {
  return launch_subtract(a, out, s);
}
cudaError_t edge_conv_subtract(const EdgeConvCentreArgs<double>& a, double* out, cudaStream_t s) {
  return launch_subtract(a, out, s);
}
cudaError_t edge_conv_neighbor_sum(const EdgeConvSumArgs<float>& a, cudaStream_t s) { return launch_sum(a, s); }
cudaError_t edge_conv_neighbor_sum(const EdgeConvSumArgs<double>& a, cudaStream_t s) { return launch_sum(a, s); }
cudaError_t edge_conv_max(const EdgeConvMaxArgs<float>& a, cudaStream_t s) { return launch_max(a, s); }
cudaError_t edge_conv_max(const EdgeConvMaxArgs<double>& a, cudaStream_t s) { return launch_max(a, s); }

cudaError_t edge_conv_moments(const EdgeConvMomentsArgs<float>& args, cudaStream_t stream) {
  if (args.channels <= kSide) return launch_moments<float, 1>(args, stream);
  const int64_t tiles = (args.channels + kSquare - 1) / kSquare;
  return launch(conv_moments_tiles, grid_for(args.batch * args.parts * tiles * tiles), dim3(kMomentsThreads), 0, stream, args,
                by_fours(args.channels));
}
cudaError_t edge_conv_moments(const EdgeConvMomentsArgs<double>& args, cudaStream_t stream) {
  return args.channels <= kSide ? launch_moments<double, 1>(args, stream) : launch_moments<double, 2>(args, stream);
}

}  // namespace crosspoint::cuda
