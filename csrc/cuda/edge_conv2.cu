// EdgeConv2's forward pass: the second layer on tiles of edges, its maxima and sums; then norm and activation.
#include "cuda/edge_tiles.h"

namespace crosspoint::cuda {
namespace {

constexpr int kThreads = 256;

// A block for 64 nodes and kColumns channels: a slot of all its nodes at a time is a tile.
template <class T, Product product>
__global__ void __launch_bounds__(kTileThreads, 2) edges_max(EdgeTileMaxArgs<T> args, int resident) {
  constexpr int W = kColumns<T>;
  SharedArena arena;
  T* left = arena.take<T>(kTileRows * kLeftPitch);
  T* right = arena.take<T>(resident * kDepth * kRightPitch);
  TileEdges& edges = *arena.take<TileEdges>(1);
  const Graph& graph = args.tiles.graph;
  const int64_t C = args.c_out, C_mid = args.tiles.c_mid, parts = blocks_of(graph.n, kTileRows), pieces = blocks_of(C_mid, kDepth);
  const int64_t slices = blocks_of(C, W);
  for (int64_t item = blockIdx.x; item < graph.batch * parts * slices; item += gridDim.x) {
    const int64_t tile = item / slices, b = tile / parts, first = tile % parts * kTileRows, c0 = item % slices * W;
    const int64_t columns = C - c0 < W ? C - c0 : W;
    const auto fill = [&](int64_t piece, T* to) {
      fill_right(to, args.weight + c0 * C_mid + piece * kDepth, 1, C_mid, C_mid - piece * kDepth, columns,
                 args.gamma == nullptr ? nullptr : args.gamma + c0);
    };
    __syncthreads();
    if (resident == pieces)
      for (int64_t piece = 0; piece < pieces; ++piece) fill(piece, right + piece * kDepth * kRightPitch);
    Accumulators<T> most{}, sum{}, square{};
    int slot[kEighths<T>][4];
    unsigned dead = 0;  // where gamma is 0, a bit for each of this thread's columns
#pragma unroll
    for (int e = 0; e < kEighths<T>; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        slot[e][i] = -1;
        const int c = Accumulators<T>::column(e, i);
        if (i < 2 && args.gamma != nullptr && c < columns && args.gamma[c0 + c] == T(0)) dead |= 1u << (2 * e + i);
      }
    for (int64_t s = 0; s < graph.k; ++s) {
      __syncthreads();
      take_slot(edges, graph, b, first, graph.n, s);
      Accumulators<T> h{};
      for (int64_t piece = 0; piece < pieces; ++piece) {
        __syncthreads();
        T* by = right;
        if (resident == pieces)
          by += piece * kDepth * kRightPitch;
        else
          fill(piece, right);
        fill_edges<T, false>(left, kLeftPitch, args.tiles, b, edges, piece * kDepth);
        __syncthreads();
        multiply_tile<T, product, false>(h, left, by, depth_of(C_mid - piece * kDepth));
      }
      const bool there[2] = {edges.target[h.row(0)] >= 0, edges.target[h.row(2)] >= 0};
#pragma unroll
      for (int e = 0; e < kEighths<T>; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const T value = h.v[e][i];
          sum.v[e][i] += value;  // of no edge it is 0
          square.v[e][i] += value * value;
          // Where gamma is 0 all edges tie, unless h is infinite or NaN.
          const T factor = dead >> (2 * e + i % 2) & 1 ? T(0) : T(1);
          const T rank = value * factor, best = most.v[e][i] * factor;
          const bool wins = there[i / 2] && (slot[e][i] < 0 || (!(rank <= best) && best == best));
          most.v[e][i] = wins ? value : most.v[e][i];
          slot[e][i] = wins ? static_cast<int>(s) : slot[e][i];
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t node = first + most.row(i);
      if (node >= graph.n) continue;
      const int64_t at = (b * graph.n + node) * C + c0;
#pragma unroll
      for (int e = 0; e < kEighths<T>; ++e) {
        const int c = most.column(e, i), s = slot[e][i] < 0 ? 0 : slot[e][i];
        if (c >= columns) continue;
        args.winner[at + c] = most.v[e][i];
        if (args.slot == nullptr) continue;
        if (args.slot_bytes == 1)
          static_cast<uint8_t*>(args.slot)[at + c] = static_cast<uint8_t>(s);
        else
          static_cast<int32_t*>(args.slot)[at + c] = s;
      }
    }
    if (args.sums == nullptr) continue;
    double* space = reinterpret_cast<double*>(left);
    double* sums = args.sums + tile * C + c0;
    sum_columns(sum, space, columns, sums);
    sum_columns(square, space, columns, sums + graph.batch * parts * C);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) edges_activate(EdgeActivateArgs<T> args) {
  const int64_t C = args.channels, cloud = args.n * C;
  const T slope = static_cast<T>(args.negative_slope);
  for (int64_t e = blockIdx.x * int64_t(kThreads) + threadIdx.x; e < args.batch * cloud; e += gridDim.x * int64_t(kThreads)) {
    const int64_t c = e % C;
    const T z = args.winner[e] * args.scale[c] + args.shift[e / cloud * C + c];
    args.out[e] = args.degrees[e / C] == 0 ? T(0) : z > T(0) ? z : z * slope;
  }
}

template <class T>
cudaError_t launch_max(const EdgeTileMaxArgs<T>& args, cudaStream_t stream) {
  const Graph& graph = args.tiles.graph;
  const int resident = RightPieces<T>::resident(blocks_of(args.tiles.c_mid, kDepth));
  const int64_t items = graph.batch * blocks_of(graph.n, kTileRows) * blocks_of(args.c_out, kColumns<T>);
  const size_t shared = shared_bytes<T>(kTileRows * kLeftPitch) + RightPieces<T>::bytes(resident) + shared_bytes<TileEdges>(1);
  return with_product(args.tiles, [&](auto product) {
    return launch(edges_max<T, product.value>, grid_for(items), dim3(kTileThreads), shared, stream, args, resident);
  });
}

template <class T>
cudaError_t launch_activate(const EdgeActivateArgs<T>& args, cudaStream_t stream) {
  return launch(edges_activate<T>, grid_of(args.batch * args.n * args.channels, kThreads), dim3(kThreads), 0, stream, args);
}

}  // namespace

cudaError_t edge_tile_max(const EdgeTileMaxArgs<float>& a, cudaStream_t s) { return launch_max(a, s); }
cudaError_t edge_tile_max(const EdgeTileMaxArgs<double>& a, cudaStream_t s) { return launch_max(a, s); }
cudaError_t edge_activate(const EdgeActivateArgs<float>& a, cudaStream_t s) { return launch_activate(a, s); }
cudaError_t edge_activate(const EdgeActivateArgs<double>& a, cudaStream_t s) { return launch_activate(a, s); }

}  // namespace crosspoint::cuda
