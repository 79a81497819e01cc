// EdgeConv's backward pass: gradients of the winners, and sums over the edges that lead to each node.
#include "crosspoint/cuda/edge_conv.h"
#include "cuda/edge_slices.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A block for 32 channels and a part of a cloud's nodes: a lane for each channel, a warp for every eighth node.
template <class T>
__global__ void __launch_bounds__(kThreads) conv_winner_gradient(EdgeConvGradientArgs<T> args) {
  CROSSPOINT_SHARED(sums, double[kWarps][kWarp]);
  CROSSPOINT_SHARED(weighted, double[kWarps][kWarp]);
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t C = args.channels, slices = (C + kWarp - 1) / kWarp, each = (args.n + args.parts - 1) / args.parts;
  const T slope = static_cast<T>(args.negative_slope);
  for (int64_t piece = blockIdx.x; piece < args.batch * args.parts * slices; piece += gridDim.x) {
    const int64_t part = piece / slices, b = part / args.parts, c = piece % slices * kWarp + lane;
    const int64_t first = part % args.parts * each, last = first + each < args.n ? first + each : args.n;
    double sum = 0, sum_weighted = 0;
    if (c < C) {
      const T scale = args.scale[c], shift = args.shift[b * C + c];
      for (int64_t i = first + warp; i < last; i += kWarps) {
        const int64_t node = b * args.n + i;
        T g = 0;
        if (args.degrees[node] > 0) {
          const T h = args.winner[node * C + c], grad = args.grad[node * C + c];
          g = h * scale + shift > T(0) ? grad : grad * slope;
          sum += g;
          sum_weighted += g * h;
        }
        args.routed[(node + 1) * args.stride - C + c] = g;
      }
    }
    sums[warp][lane] = sum;
    weighted[warp][lane] = sum_weighted;
    __syncthreads();
    if (warp == 0 && c < C) {
      for (int w = 1; w < kWarps; ++w) {
        sum += sums[w][lane];
        sum_weighted += weighted[w][lane];
      }
      args.sums[part * C + c] = sum;
      args.sums[(args.batch * args.parts + part) * C + c] = sum_weighted;
    }
    __syncthreads();
  }
}

// ---- over the edges that lead to a node: four channels a thread, so many threads a node

struct Layout {
  int64_t nodes, channels;
  int per_node;  // threads

  __host__ __device__ int64_t threads() const {
    return nodes * ((channels + kFour * per_node - 1) / (kFour * per_node)) * per_node;
  }
};

Layout layout_of(int64_t nodes, int64_t channels) {
  int per_node = 1;
  while (per_node < 16 && per_node * kFour < channels) per_node *= 2;
  return {nodes, channels, per_node};
}

// Slot and node of edge e = i * k + s: a division by a number that is the same all along.
struct Division {
  uint32_t by, inverse;  // floor(2^32 / by), or the most there is

  __host__ __device__ explicit Division(int64_t k)
      : by(static_cast<uint32_t>(k)), inverse(k > 1 ? uint32_t((uint64_t(1) << 32) / uint64_t(k)) : UINT32_MAX) {}

  __device__ __forceinline__ void divide(uint32_t e, uint32_t& quotient, uint32_t& rest) const {
    quotient = static_cast<uint32_t>(uint64_t(e) * inverse >> 32);  // or one less than what it should be
    rest = e - quotient * by;
    if (rest >= by) ++quotient, rest -= by;
  }
};

// Calls use(i, s) for the edges that lead to node j of cloud b, in ascending order.
template <class Use>
__device__ __forceinline__ void for_edges_to(const ReverseEdges& graph, const Division& division, int64_t b, int64_t j,
                                             Use&& use) {
  const int32_t* start = graph.start + b * (graph.n + 1) + j;
  const int32_t* edges = graph.edges + b * graph.n * graph.k;
  const int32_t last = start[1];
  for (int32_t p = start[0]; p < last; ++p) {
    uint32_t i, s;
    division.divide(static_cast<uint32_t>(edges[p]), i, s);
    use(static_cast<int64_t>(i), static_cast<int>(s));
  }
}

// Which node and channels a thread works on.
struct Place {
  int64_t b, j, node, c;
  int count;

  __device__ Place(const Layout& layout, int64_t n, int64_t thread) {
    const int64_t slice = thread / layout.per_node / layout.nodes;
    node = thread / layout.per_node % layout.nodes;
    b = node / n, j = node % n;
    c = (slice * layout.per_node + thread % layout.per_node) * kFour;
    count = part_of_four(layout.channels - c);
  }
};

template <class T, class Slot>
__global__ void __launch_bounds__(kThreads) conv_route(EdgeConvRouteArgs<T> args, Layout layout, Division division,
                                                       bool fours) {
  const ReverseEdges& graph = args.graph;
  const int64_t C = args.channels;
  const Slot* slots = static_cast<const Slot*>(args.slot);
  for (int64_t t = blockIdx.x * int64_t(kThreads) + threadIdx.x; t < layout.threads();
       t += gridDim.x * int64_t(kThreads)) {
    const Place at(layout, graph.n, t);
    if (at.count == 0) continue;
    Four<T> sum{};
    for_edges_to(graph, division, at.b, at.j, [&](int64_t i, int s) {
      const int64_t row = (at.b * graph.n + i) * C;
      const auto slot = load_four<Slot>(slots + row + at.c, at.count, fours);
      const T* g = args.routed + 2 * row + C + at.c;
#pragma unroll
      for (int v = 0; v < kFour; ++v)
        if (v < at.count && static_cast<int>(slot.v[v]) == s) sum.v[v] += g[v];
    });
    store_four<T>(args.routed + at.node * 2 * C + at.c, sum, at.count, fours);
  }
}

// By slices: see edge_slices.h.
template <class T, bool shared>
__global__ void __launch_bounds__(kSliceThreads, kSliceBlocks<T>)
    conv_dense_gradient(EdgeConvDenseArgs<T> args, Slices slices, bool fours) {
  SharedArena arena;
  T* space = arena.take<T>(shared ? slices.n * slices.width : 0);
  const ReverseEdges& graph = args.graph;
  const Division division(graph.k);
  const int64_t C = args.channels;
  for (int64_t p = blockIdx.x; p < slices.pieces(); p += gridDim.x) {
    const Piece<T, shared> piece(slices, p, args.x, C, fours, space);
    const int64_t c = piece.c;
    for (int64_t j = piece.first + piece.node; j < piece.last; j += piece.at_once) {
      Four<T> back{};
      for_edges_to(graph, division, piece.b, j, [&](int64_t i, int) {
        const Four<T> x = piece.row(i);
#pragma unroll
        for (int v = 0; v < kFour; ++v) back.v[v] += x.v[v];
      });
      const int64_t node = piece.b * graph.n + j, at = node * C + c;
      const T out = T(args.degrees[node]), in = T(args.degrees[graph.batch * graph.n + node]);
      const Four<T> x = piece.row(j), sums = load_four<T>(args.sums + at, piece.count, fours);
      const Four<T> other = load_four<T>(args.constant + piece.b * 2 * C + c, piece.count, fours);
      const Four<T> own = load_four<T>(args.constant + (piece.b * 2 + 1) * C + c, piece.count, fours);
      Four<T> grad = load_four<T>(args.grad_x + at, piece.count, fours), in_x, out_x;
#pragma unroll
      for (int v = 0; v < kFour; ++v) {
        in_x.v[v] = in * x.v[v];
        out_x.v[v] = out * x.v[v];
        grad.v[v] = grad.v[v] - in * other.v[v] - out * own.v[v];
      }
      T* dense = args.dense + node * 4 * C + c;
      store_four<T>(dense, in_x, piece.count, fours);
      store_four<T>(dense + C, back, piece.count, fours);
      store_four<T>(dense + 2 * C, sums, piece.count, fours);
      store_four<T>(dense + 3 * C, out_x, piece.count, fours);
      store_four<T>(args.grad_x + at, grad, piece.count, fours);
    }
  }
}

// ---- launches

template <class T>
cudaError_t launch_gradient(const EdgeConvGradientArgs<T>& args, cudaStream_t stream) {
  const int64_t slices = (args.channels + kWarp - 1) / kWarp;
  return launch(conv_winner_gradient<T>, grid_for(args.batch * args.parts * slices), dim3(kThreads), 0, stream, args);
}

template <class T>
cudaError_t launch_route(const EdgeConvRouteArgs<T>& args, cudaStream_t stream) {
  const ReverseEdges& graph = args.graph;
  const Layout layout = layout_of(graph.batch * graph.n, args.channels);
  const dim3 grid = grid_for((layout.threads() + kThreads - 1) / kThreads), block(kThreads);
  const Division division(graph.k);
  const bool fours = by_fours(args.channels);
  if (args.slot_bytes == 1)
    return launch(conv_route<T, uint8_t>, grid, block, 0, stream, args, layout, division, fours);
  return launch(conv_route<T, int32_t>, grid, block, 0, stream, args, layout, division, fours);
}

template <class T>
cudaError_t launch_dense(const EdgeConvDenseArgs<T>& args, cudaStream_t stream) {
  const Slices s = slices_of<T>(args.graph.batch, args.graph.n, args.channels);
  return launch_slices<T>(conv_dense_gradient<T, true>, conv_dense_gradient<T, false>, args, s, stream);
}

}  // namespace

cudaError_t edge_conv_winner_gradient(const EdgeConvGradientArgs<float>& a, cudaStream_t s) {
  return launch_gradient(a, s);
}
cudaError_t edge_conv_winner_gradient(const EdgeConvGradientArgs<double>& a, cudaStream_t s) {
  return launch_gradient(a, s);
}
cudaError_t edge_conv_route(const EdgeConvRouteArgs<float>& a, cudaStream_t s) { return launch_route(a, s); }
cudaError_t edge_conv_route(const EdgeConvRouteArgs<double>& a, cudaStream_t s) { return launch_route(a, s); }
cudaError_t edge_conv_dense_gradient(const EdgeConvDenseArgs<float>& a, cudaStream_t s) { return launch_dense(a, s); }
cudaError_t edge_conv_dense_gradient(const EdgeConvDenseArgs<double>& a, cudaStream_t s) { return launch_dense(a, s); }

}  // namespace crosspoint::cuda
