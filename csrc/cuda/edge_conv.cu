// EdgeConv's forward pass: degrees, centred clouds, sums over neighbours and over edges, and the gather that ends it.
#include "crosspoint/cuda/edge_conv.h"

#include <cmath>

#include "cuda/rows.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGatherThreads = 512;
template <class T>
constexpr int kGatherBlocks = sizeof(T) == 4 ? 2 : 1;  // of a multiprocessor, as far as registers go
constexpr int kCentreThreads = 1024;
constexpr int kCentreWarps = kCentreThreads / kWarp;
constexpr int kAhead = 8;  // nodes that a warp reads before it needs the first of them
constexpr int64_t kMostShared = 96 << 10;  // leaves room for two blocks, and fits every chip since sm_80
constexpr int64_t kWidest = 16;            // channels of a slice: 64 kB of a cloud of 1,024 nodes
constexpr int64_t kEnoughBlocks = 256;     // about two on each multiprocessor

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
    const int count = C - c < kFour ? static_cast<int>(C - c) : kFour;
    const Four<T> x = load_four<T>(args.x + at, count, fours);
    const Four<T> centre = load_four<T>(args.centre + quotient(i, args.n) * C + c, count, fours);
    const bool touched = args.degrees[i] > 0 || args.degrees[nodes + i] > 0;
    Four<T> difference;
#pragma unroll
    for (int v = 0; v < kFour; ++v) difference.v[v] = touched ? x.v[v] - centre.v[v] : T(0);
    store_four<T>(out + at, difference, count, fours);
  }
}

// ---- gathers: a block for a slice of a cloud's channels (and a part of its nodes), four channels a thread

struct Slices {
  int64_t batch, n, channels, width, parts;  // width: channels of a slice, a multiple of four
  bool shared;                               // the slice of all nodes in shared memory, else read where it is

  __host__ __device__ int64_t count() const { return (channels + width - 1) / width; }
  __host__ __device__ int64_t pieces() const { return batch * count() * parts; }
};

template <class T>
Slices slices_of(const Graph& graph, int64_t channels) {
  Slices s{graph.batch, graph.n, channels, kWidest, 1, true};
  while (s.width > kFour && (channels <= s.width / 2 || graph.n * s.width * int64_t(sizeof(T)) > kMostShared))
    s.width /= 2;
  s.shared = graph.n * s.width * int64_t(sizeof(T)) <= kMostShared;
  if (!s.shared) s.width = channels <= kFour ? kFour : channels <= 2 * kFour ? 2 * kFour : kWidest;
  const int64_t at_once = kGatherThreads / (s.width / kFour), most = (graph.n + at_once - 1) / at_once;
  const int64_t wanted = (kEnoughBlocks + s.pieces() - 1) / s.pieces();
  s.parts = !s.shared ? most : wanted < most ? wanted : most;
  return s;
}

// One piece of a gather: which cloud, channels and nodes, and the rows to gather.
template <class T, bool shared>
struct Piece {
  int64_t b, first, last;  // nodes [first, last)
  int64_t c;               // this thread's first channel
  int count;               // of its four channels, those that exist
  int node;                // this thread's place among those that work on a node each
  int at_once;
  const T* rows;
  int64_t stride;
  bool whole;

  // `table` has `row_stride` elements a node; the slice's columns of all nodes are copied to `space`. The whole block
  // calls.
  __device__ Piece(const Slices& s, int64_t piece, const T* table, int64_t row_stride, bool fours, T* space) {
    const int per_node = static_cast<int>(s.width / kFour), slices = static_cast<int>(s.count());
    const int64_t part = piece % s.parts, slice = piece / s.parts % slices;
    b = piece / s.parts / slices;
    at_once = kGatherThreads / per_node;
    node = threadIdx.x / per_node;
    const int mine = threadIdx.x % per_node * kFour;
    c = slice * s.width + mine;
    const int64_t left = s.channels - c;
    count = left < 0 ? 0 : left < kFour ? static_cast<int>(left) : kFour;
    first = part * s.n / s.parts;
    last = (part + 1) * s.n / s.parts;
    table += b * s.n * row_stride + c;
    if constexpr (shared) {
      __syncthreads();  // the piece before is done with the space
      for (int64_t j = node; j < s.n; j += at_once)
        *reinterpret_cast<Four<T>*>(space + j * s.width + mine) = load_four<T>(table + j * row_stride, count, fours);
      __syncthreads();
      rows = space + mine, stride = s.width, whole = true;
    } else {
      rows = table, stride = row_stride, whole = fours;
    }
  }

  __device__ __forceinline__ Four<T> row(int64_t j) const {
    if constexpr (shared) return *reinterpret_cast<const Four<T>*>(rows + j * stride);
    return load_four<T>(rows + j * stride, count, whole);
  }
};

template <class T, bool shared>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks<T>)
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
    FourBytes x;
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
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks<T>)
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

// A block for a square of kSide M channels and a part of a cloud's nodes, M x M of each matrix a thread.
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
  for (int64_t piece = blockIdx.x; piece < args.batch * args.parts * tiles * tiles; piece += gridDim.x) {
    const int64_t part = piece / (tiles * tiles), b = part / args.parts;
    const int64_t c_left = piece / tiles % tiles * W, c_right = piece % tiles * W;
    const int64_t each = (args.n + args.parts - 1) / args.parts, begin = part % args.parts * each;
    const int64_t end = begin + each < args.n ? begin + each : args.n;
    T jj[M][M] = {}, ji[M][M] = {}, ii[M][M] = {};
    double first_j = 0, first_i = 0;  // of channel c_left + threadIdx.x
    for (int64_t i0 = begin; i0 < end; i0 += kRows) {
      __syncthreads();
      for (int e = threadIdx.x; e < kRows * W; e += kSide * kSide) {
        const int64_t i = i0 + e / W, at = (b * args.n + i) * C, l = c_left + e % W, r = c_right + e % W;
        left[e / W][e % W] = i < end && l < C ? args.x[at + l] : T(0);
        sums[e / W][e % W] = i < end && l < C ? args.sums[at + l] : T(0);
        right[e / W][e % W] = i < end && r < C ? args.x[at + r] : T(0);
      }
      if (threadIdx.x < 2 * kRows) {
        const int64_t i = i0 + threadIdx.x % kRows;
        const int32_t* degrees = args.degrees + threadIdx.x / kRows * args.batch * args.n;
        degree[threadIdx.x / kRows][threadIdx.x % kRows] = i < end ? T(degrees[b * args.n + i]) : T(0);
      }
      __syncthreads();
      if (threadIdx.x < W) {
        T part_j = 0, part_i = 0;
        for (int i = 0; i < kRows; ++i) {
          part_j += degree[1][i] * left[i][threadIdx.x];
          part_i += degree[0][i] * left[i][threadIdx.x];
        }
        first_j += part_j;
        first_i += part_i;
      }
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
    T* gram = args.gram + part * 3 * C * C;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int l = 0; l < M; ++l) {
        const int64_t a = c_left + row * M + m, c = c_right + column * M + l;
        if (a >= C || c >= C) continue;
        gram[a * C + c] = jj[m][l];
        gram[(C + a) * C + c] = ji[m][l];
        gram[(2 * C + a) * C + c] = ii[m][l];
      }
    if (c_right == 0 && threadIdx.x < W && c_left + threadIdx.x < C) {
      args.first[part * 2 * C + c_left + threadIdx.x] = first_j;
      args.first[(part * 2 + 1) * C + c_left + threadIdx.x] = first_i;
    }
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
  const Slices s = slices_of<T>(args.graph, args.channels);
  const bool fours = by_fours(args.channels);
  const dim3 grid = grid_for(s.pieces()), block(kGatherThreads);
  if (!s.shared) return launch(conv_neighbor_sum<T, false>, grid, block, 0, stream, args, s, fours);
  return launch(conv_neighbor_sum<T, true>, grid, block, shared_bytes<T>(s.n * s.width), stream, args, s, fours);
}

template <class T>
cudaError_t launch_max(const EdgeConvMaxArgs<T>& args, cudaStream_t stream) {
  const Slices s = slices_of<T>(args.graph, args.channels);
  const bool fours = by_fours(args.channels);
  const dim3 grid = grid_for(s.pieces()), block(kGatherThreads);
  if (!s.shared) return launch(conv_max<T, false>, grid, block, 0, stream, args, s, fours);
  return launch(conv_max<T, true>, grid, block, shared_bytes<T>(s.n * s.width), stream, args, s, fours);
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
  return args.channels <= 2 * kSide ? launch_moments<float, 2>(args, stream) : launch_moments<float, 4>(args, stream);
}
cudaError_t edge_conv_moments(const EdgeConvMomentsArgs<double>& args, cudaStream_t stream) {
  return args.channels <= kSide ? launch_moments<double, 1>(args, stream) : launch_moments<double, 2>(args, stream);
}

}  // namespace crosspoint::cuda
