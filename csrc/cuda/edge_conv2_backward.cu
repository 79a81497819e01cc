// EdgeConv2's backward pass: gradients of the first layer on tiles of edges that are computed again, summed by source
// and by target, and the sums of products that weight2's gradient is made of.
#include "cuda/edge_tiles.h"

namespace crosspoint::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTilesOfBlock = 8;  // edges come so, one tile after another, to a block that keeps the matrix

// The rows of args.rows in pieces of kDepth: first those of g, then those of a.
struct Pieces {
  int64_t winners, all;

  template <class T>
  __host__ __device__ explicit Pieces(const EdgeTileGradientArgs<T>& args)
      : winners((args.c_out + kDepth - 1) / kDepth),
        all(winners + (args.row_count > args.c_out ? (args.tiles.c_mid + kDepth - 1) / kDepth : 0)) {}
};

// What a block works with: the matrix's columns from c0 on, and a tile.
template <class T>
struct Workplace {
  T *left, *right;
  TileEdges* edges;
  int resident;

  __device__ Workplace(SharedArena& arena, int resident) : resident(resident) {
    left = arena.take<T>(kTileRows * kLeftPitch);
    right = arena.take<T>(resident * kDepth * kRightPitch);
    edges = arena.take<TileEdges>(1);
  }
  static size_t bytes(int resident) {
    return shared_bytes<T>(kTileRows * kLeftPitch) + RightPieces<T>::bytes(resident) + shared_bytes<TileEdges>(1);
  }

  __device__ void fill(const EdgeTileGradientArgs<T>& args, const Pieces& pieces, int64_t piece, int64_t c0, T* to) const {
    const int64_t C_mid = args.tiles.c_mid, left_columns = C_mid - c0;
    const bool winners = piece < pieces.winners;
    const int64_t first = winners ? piece * kDepth : args.c_out + (piece - pieces.winners) * kDepth;
    const int64_t end = winners ? args.c_out : args.row_count;
    fill_right(to, args.rows + first * C_mid + c0, C_mid, 1, end - first, left_columns);
  }
  __device__ void keep(const EdgeTileGradientArgs<T>& args, const Pieces& pieces, int64_t c0) const {
    if (resident != pieces.all) return;
    for (int64_t piece = 0; piece < pieces.all; ++piece) fill(args, pieces, piece, c0, right + piece * kDepth * kRightPitch);
  }
};

// dz1 at this thread's places of the tile, of channels from c0 on; and, if wanted, U + V and a there. The whole block
// calls after it has written the edges; it leaves U + V in place.left.
template <class T, Product product>
__device__ __forceinline__ void gradient_of_tile(const EdgeTileGradientArgs<T>& args, const Pieces& pieces,
                                                 const Workplace<T>& place, int64_t b, int64_t c0, Accumulators<T>& dz) {
  const EdgeTiles<T>& tiles = args.tiles;
  const int64_t C_mid = tiles.c_mid;
#pragma unroll
  for (int e = 0; e < kEighths<T>; ++e)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t c = c0 + dz.column(e, i);
      dz.v[e][i] = c < C_mid ? -args.q[b * C_mid + c] : T(0);
    }
  for (int64_t piece = 0; piece < pieces.all; ++piece) {
    __syncthreads();
    T* by = place.right;
    if (place.resident == pieces.all)
      by += piece * kDepth * kRightPitch;
    else
      place.fill(args, pieces, piece, c0, place.right);
    const int64_t winners = piece * kDepth, others = (piece - pieces.winners) * kDepth;
    if (piece < pieces.winners)
      fill_winners(place.left, kLeftPitch, args, b, *place.edges, winners);
    else
      fill_edges<T, false>(place.left, kLeftPitch, tiles, b, *place.edges, others);
    __syncthreads();
    multiply_tile<T, product, false>(dz, place.left, by,
                                     depth_of(piece < pieces.winners ? args.c_out - winners : C_mid - others));
  }
  __syncthreads();
  fill_edges<T, true>(place.left, kLeftPitch, tiles, b, *place.edges, c0);
  __syncthreads();
}

// Whether z1 of h = U + V is positive, a, at this thread's columns.
template <class T>
struct FirstLayer {
  T gain[kEighths<T>][2], shift[kEighths<T>][2], slope;

  __device__ FirstLayer(const EdgeTiles<T>& tiles, int64_t b, int64_t c0)
      : slope(static_cast<T>(tiles.negative_slope)) {
#pragma unroll
    for (int e = 0; e < kEighths<T>; ++e)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t c = c0 + Accumulators<T>::column(e, i);
        gain[e][i] = c < tiles.c_mid ? tiles.gain[c] : T(0);
        shift[e][i] = c < tiles.c_mid ? tiles.shift[b * tiles.c_mid + c] : T(0);
      }
  }
  __device__ __forceinline__ T derivative(int e, int i, T h) const {
    return h * gain[e][i % 2] + shift[e][i % 2] > T(0) ? T(1) : slope;
  }
  __device__ __forceinline__ T activated(int e, int i, T h) const {
    return leaky_less_pivot(h * gain[e][i % 2], shift[e][i % 2], slope);
  }
};

template <class T, Product product>
__global__ void __launch_bounds__(kTileThreads, 2)
    edges_own(EdgeTileGradientArgs<T> args, T* routed, double* sums, int resident) {
  constexpr int W = kColumns<T>;
  SharedArena arena;
  const Workplace<T> place(arena, resident);
  const Graph& graph = args.tiles.graph;
  const Pieces pieces(args);
  const int64_t C = args.tiles.c_mid, parts = blocks_of(graph.n, kTileRows), slices = blocks_of(C, W);
  for (int64_t item = blockIdx.x; item < graph.batch * parts * slices; item += gridDim.x) {
    const int64_t tile = item / slices, b = tile / parts, first = tile % parts * kTileRows, c0 = item % slices * W;
    const int64_t columns = C - c0 < W ? C - c0 : W;
    __syncthreads();
    place.keep(args, pieces, c0);
    Accumulators<T> sum{}, sum_h{}, sum_a{};
    for (int64_t s = 0; s < graph.k; ++s) {
      __syncthreads();
      take_slot(*place.edges, graph, b, first, graph.n, s);
      Accumulators<T> dz;
      gradient_of_tile<T, product>(args, pieces, place, b, c0, dz);
      const FirstLayer<T> layer(args.tiles, b, c0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = dz.row(i);
        if (place.edges->target[row] < 0) continue;
#pragma unroll
        for (int e = 0; e < kEighths<T>; ++e) {
          const T h = place.left[row * kLeftPitch + dz.column(e, i)];
          const T value = dz.v[e][i] * layer.derivative(e, i, h);
          sum.v[e][i] += value;
          sum_h.v[e][i] += value * h;
          sum_a.v[e][i] += layer.activated(e, i, h);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t node = first + sum.row(i);
      if (node >= graph.n) continue;
      T* out = routed + (b * graph.n + node) * 2 * C + C + c0;
#pragma unroll
      for (int e = 0; e < kEighths<T>; ++e)
        if (sum.column(e, i) < columns) out[sum.column(e, i)] = sum.v[e][i];
    }
    double* space = reinterpret_cast<double*>(place.left);
    double* to = sums + tile * C + c0;
    const int64_t next = graph.batch * parts * C;
    sum_columns(sum, space, columns, to);
    sum_columns(sum_h, space, columns, to + next);
    sum_columns(sum_a, space, columns, to + 2 * next);
  }
}

template <class T, Product product>
__global__ void __launch_bounds__(kTileThreads, 2)
    edges_neighbour(EdgeTileGradientArgs<T> args, ReverseEdges reverse, T* runs, int resident) {
  constexpr int W = kColumns<T>;
  SharedArena arena;
  const Workplace<T> place(arena, resident);
  const Graph& graph = args.tiles.graph;
  const Pieces pieces(args);
  const int64_t C = args.tiles.c_mid, count = graph.n * graph.k, tiles = blocks_of(count, kTileRows);
  const int64_t parts = blocks_of(tiles, kTilesOfBlock), slices = blocks_of(C, W);
  for (int64_t item = blockIdx.x; item < graph.batch * parts * slices; item += gridDim.x) {
    const int64_t part = item / slices, b = part / parts, c0 = item % slices * W;
    const int64_t columns = C - c0 < W ? C - c0 : W, all = reverse.start[b * (graph.n + 1) + graph.n];
    const int32_t* list = reverse.edges + b * count;
    __syncthreads();
    place.keep(args, pieces, c0);
    for (int64_t t = part % parts * kTilesOfBlock; t < (part % parts + 1) * kTilesOfBlock && t * kTileRows < all; ++t) {
      TileEdges& edges = *place.edges;
      __syncthreads();
      if (threadIdx.x < kTileRows) {
        const int64_t rank = t * kTileRows + threadIdx.x;
        const int32_t edge = rank < all ? list[rank] : 0;
        edges.target[threadIdx.x] = rank < all ? static_cast<int>(graph.idx[b * count + edge]) : -1;
        edges.source[threadIdx.x] = static_cast<int>(edge / graph.k);
        edges.slot[threadIdx.x] = static_cast<int>(edge % graph.k);
      }
      Accumulators<T> dz;
      gradient_of_tile<T, product>(args, pieces, place, b, c0, dz);
      const FirstLayer<T> layer(args.tiles, b, c0);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < kEighths<T>; ++e) {
          T& h = place.left[dz.row(i) * kLeftPitch + dz.column(e, i)];  // this thread's alone
          h = dz.v[e][i] * layer.derivative(e, i, h);
        }
      __syncthreads();
      if (threadIdx.x < columns) {
        T sum = 0;
        for (int row = 0; row < kTileRows && edges.target[row] >= 0; ++row) {
          sum += place.left[row * kLeftPitch + threadIdx.x];
          const int j = edges.target[row];
          if (row + 1 < kTileRows && edges.target[row + 1] == j) continue;
          runs[(b * (graph.n + tiles) + j + t) * C + c0 + threadIdx.x] = sum;
          sum = 0;
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) edges_add_runs(const T* runs, ReverseEdges graph, int64_t C, T* routed) {
  const int64_t values = graph.batch * graph.n * C, tiles = blocks_of(graph.n * graph.k, kTileRows);
  for (int64_t e = blockIdx.x * int64_t(kThreads) + threadIdx.x; e < values; e += gridDim.x * int64_t(kThreads)) {
    const int64_t node = e / C, b = node / graph.n, j = node % graph.n, c = e % C;
    const int32_t* start = graph.start + b * (graph.n + 1) + j;
    T sum = 0;
    if (start[1] > start[0])
      for (int64_t t = start[0] / kTileRows; t <= (start[1] - 1) / kTileRows; ++t)
        sum += runs[(b * (graph.n + tiles) + j + t) * C + c];
    routed[node * 2 * C + c] = sum;
  }
}

// A block for a square of 64 rows (g's, then a's) by kColumns, over the edges of a part of a cloud's nodes.
template <class T, Product product>
__global__ void __launch_bounds__(kTileThreads, 2) edges_products(EdgeTileGradientArgs<T> args, int64_t parts, T* out) {
  constexpr int W = kColumns<T>;
  SharedArena arena;
  T* left = arena.take<T>(kTileRows * kRightPitch);
  T* right = arena.take<T>(kTileRows * kRightPitch);
  TileEdges& edges = *arena.take<TileEdges>(1);
  const Graph& graph = args.tiles.graph;
  const Pieces pieces(args);
  const int64_t C = args.tiles.c_mid, slices = blocks_of(C, W), each = (graph.n + parts - 1) / parts;
  for (int64_t item = blockIdx.x; item < graph.batch * parts * pieces.all * slices; item += gridDim.x) {
    const int64_t part = item / slices / pieces.all, piece = item / slices % pieces.all, c0 = item % slices * W;
    const int64_t b = part / parts, begin = part % parts * each, end = begin + each < graph.n ? begin + each : graph.n;
    const bool winners = piece < pieces.winners;
    const int64_t r0 = (winners ? piece : piece - pieces.winners) * kDepth;
    Accumulators<T> sum{};
    for (int64_t first = begin; first < end; first += kTileRows)
      for (int64_t s = 0; s < graph.k; ++s) {
        __syncthreads();
        take_slot(edges, graph, b, first, end, s);
        __syncthreads();
        if (winners)
          fill_winners(left, kRightPitch, args, b, edges, r0);
        else
          fill_edges<T, false>(left, kRightPitch, args.tiles, b, edges, r0);
        fill_edges<T, false>(right, kRightPitch, args.tiles, b, edges, c0);
        __syncthreads();
        multiply_tile<T, product, true>(sum, left, right, kTileRows);
      }
    const int64_t rows = winners ? args.c_out : C, above = winners ? 0 : args.c_out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = r0 + sum.row(i);
      if (row >= rows) continue;
      T* to = out + (part * args.row_count + above + row) * C + c0;
#pragma unroll
      for (int e = 0; e < kEighths<T>; ++e)
        if (c0 + sum.column(e, i) < C) to[sum.column(e, i)] = sum.v[e][i];
    }
  }
}

// ---- launches

template <class T>
cudaError_t launch_own(const EdgeTileGradientArgs<T>& args, T* routed, double* sums, cudaStream_t stream) {
  const Graph& graph = args.tiles.graph;
  const int resident = RightPieces<T>::resident(Pieces(args).all);
  const int64_t items = graph.batch * blocks_of(graph.n, kTileRows) * blocks_of(args.tiles.c_mid, kColumns<T>);
  return with_product(args.tiles, [&](auto product) {
    return launch(edges_own<T, product.value>, grid_for(items), dim3(kTileThreads), Workplace<T>::bytes(resident), stream, args,
                  routed, sums, resident);
  });
}

template <class T>
cudaError_t launch_neighbour(const EdgeTileGradientArgs<T>& args, const ReverseEdges& reverse, T* runs, cudaStream_t stream) {
  const Graph& graph = args.tiles.graph;
  const int resident = RightPieces<T>::resident(Pieces(args).all);
  const int64_t tiles = blocks_of(graph.n * graph.k, kTileRows);
  const int64_t items = graph.batch * blocks_of(tiles, kTilesOfBlock) * blocks_of(args.tiles.c_mid, kColumns<T>);
  return with_product(args.tiles, [&](auto product) {
    return launch(edges_neighbour<T, product.value>, grid_for(items), dim3(kTileThreads), Workplace<T>::bytes(resident), stream,
                  args, reverse, runs, resident);
  });
}

template <class T>
cudaError_t launch_add_runs(const T* runs, const ReverseEdges& graph, int64_t c_mid, T* routed, cudaStream_t stream) {
  return launch(edges_add_runs<T>, grid_of(graph.batch * graph.n * c_mid, kThreads), dim3(kThreads), 0, stream, runs, graph,
                c_mid, routed);
}

template <class T>
cudaError_t launch_products(const EdgeTileGradientArgs<T>& args, int64_t parts, T* out, cudaStream_t stream) {
  const int64_t items = args.tiles.graph.batch * parts * Pieces(args).all * blocks_of(args.tiles.c_mid, kColumns<T>);
  const size_t shared = 2 * shared_bytes<T>(kTileRows * kRightPitch) + shared_bytes<TileEdges>(1);
  return with_product(args.tiles, [&](auto product) {
    return launch(edges_products<T, product.value>, grid_for(items), dim3(kTileThreads), shared, stream, args, parts, out);
  });
}

}  // namespace

cudaError_t edge_own_gradient(const EdgeTileGradientArgs<float>& a, float* routed, double* sums, cudaStream_t s) {
  return launch_own(a, routed, sums, s);
}
cudaError_t edge_own_gradient(const EdgeTileGradientArgs<double>& a, double* routed, double* sums, cudaStream_t s) {
  return launch_own(a, routed, sums, s);
}
cudaError_t edge_neighbour_gradient(const EdgeTileGradientArgs<float>& a, const ReverseEdges& r, float* runs, cudaStream_t s) {
  return launch_neighbour(a, r, runs, s);
}
cudaError_t edge_neighbour_gradient(const EdgeTileGradientArgs<double>& a, const ReverseEdges& r, double* runs, cudaStream_t s) {
  return launch_neighbour(a, r, runs, s);
}
cudaError_t edge_add_runs(const float* runs, const ReverseEdges& r, int64_t c, float* routed, cudaStream_t s) {
  return launch_add_runs(runs, r, c, routed, s);
}
cudaError_t edge_add_runs(const double* runs, const ReverseEdges& r, int64_t c, double* routed, cudaStream_t s) {
  return launch_add_runs(runs, r, c, routed, s);
}
cudaError_t edge_products(const EdgeTileGradientArgs<float>& a, int64_t parts, float* out, cudaStream_t s) {
  return launch_products(a, parts, out, s);
}
cudaError_t edge_products(const EdgeTileGradientArgs<double>& a, int64_t parts, double* out, cudaStream_t s) {
  return launch_products(a, parts, out, s);
}

}  // namespace crosspoint::cuda
