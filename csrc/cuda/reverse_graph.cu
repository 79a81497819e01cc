// Small clouds: a block counts the edges of a cloud by the node that they lead to, and puts them in place. Others: a
// stable sort of the edges by that node, then the places where each node's edges begin.
#include "crosspoint/cuda/reverse_graph.h"

#include <algorithm>

#include "cuda/radix_sort.h"

namespace crosspoint::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostEdges = 1 << 30;

Sort plan(const ReverseGraphArgs& args, Pieces& pieces) {
  int bits = 1;
  while (args.n >> bits > 0) ++bits;
  return plan_sort(segments(nullptr, args.batch, args.nodes * args.k), bits, pieces);
}

__global__ void __launch_bounds__(kThreads) list_edges(ReverseGraphArgs args, Sort sort) {
  make_pairs(sort, [&](int64_t b, int i) {
    const int64_t j = args.idx[b * sort.segments.stride + i];
    return static_cast<uint32_t>(j >= 0 && j < args.n ? j : args.n);  // what is no edge comes last
  });
}

// Place p of a cloud's sorted edges is where the edges begin of every node after that of place p - 1, up to its own.
__global__ void __launch_bounds__(kThreads) mark_starts(ReverseGraphArgs args, Pairs sorted) {
  const int64_t edges = args.nodes * args.k;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < args.batch * (edges + 1);
       i += gridDim.x * int64_t(kThreads)) {
    const int64_t b = i / (edges + 1), p = i % (edges + 1);
    const uint32_t* keys = sorted.keys + b * edges;
    int64_t j = p == 0 ? 0 : int64_t(keys[p - 1]) + 1;
    const int64_t last = p == edges ? args.n : keys[p];
    for (; j <= last; ++j) args.start[b * (args.n + 1) + j] = static_cast<int32_t>(p);
    if (p < edges) args.edges[b * edges + p] = sorted.values[b * edges + p];
  }
}

// ---- a block for a cloud

constexpr int kMostWarps = 16, kLeastWarps = 8;
constexpr size_t kCounters = 96 * 1024;  // bytes: so much shared memory a block may have on every supported GPU
constexpr int64_t kMostCloudEdges = 1 << 17;
constexpr int kAhead = 4;  // steps of a warp whose edges are read together

// How many warps share a cloud, each with a counter of its own for every node; 0 where the cloud is too large.
int warps_of(const ReverseGraphArgs& args) {
  if (args.n == 0 || args.nodes * args.k > kMostCloudEdges) return 0;
  const int64_t warps = std::min<int64_t>(kMostWarps, kCounters / (sizeof(int) * args.n));
  return warps < kLeastWarps ? 0 : static_cast<int>(warps);
}

__global__ void __launch_bounds__(kMostWarps * kWarp) sort_cloud(ReverseGraphArgs args) {
  SharedArena arena;
  CROSSPOINT_SHARED(sums, int[kMostWarps]);
  const int n = static_cast<int>(args.n), edges = static_cast<int>(args.nodes * args.k);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  int* counters = arena.take<int>(int64_t(warps) * n);  // (warps, n)
  int* own = counters + warp * n;
  // The warp's share: whole steps, so that shares follow each other in the order of the edges.
  const int share = (edges + warps * kWarp - 1) / (warps * kWarp) * kWarp;
  const int first = warp * share, end = first + share < edges ? first + share : edges;
  const int64_t* idx = args.idx + blockIdx.x * int64_t(edges);
  const auto read = [&](int begin, int (&targets)[kAhead]) {  // n: no edge
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      const int i = begin + step * kWarp + lane_id();
      const int64_t j = i < end ? idx[i] : -1;
      targets[step] = j >= 0 && j < n ? static_cast<int>(j) : n;
    }
  };

  for (int i = threadIdx.x; i < warps * n; i += blockDim.x) counters[i] = 0;
  __syncthreads();
  for (int begin = first; begin < end; begin += kAhead * kWarp) {
    int targets[kAhead];
    read(begin, targets);
#pragma unroll
    for (int step = 0; step < kAhead; ++step)
      if (targets[step] < n) atomicAdd(&own[targets[step]], 1);
  }
  __syncthreads();

  // Counts to places: node after node, of a node warp after warp.
  int32_t* start = args.start + blockIdx.x * int64_t(n + 1);
  int done = 0;
  for (int low = 0; low < n; low += blockDim.x) {
    const int j = low + static_cast<int>(threadIdx.x);
    int total = 0, all;
    for (int w = 0; w < warps && j < n; ++w) total += counters[w * n + j];
    int place = done + sum_before(total, all);
    if (lane_id() == 0) sums[warp] = all;
    __syncthreads();
    for (int w = 0; w < warps; ++w) {
      place += w < warp ? sums[w] : 0;
      done += sums[w];
    }
    if (j < n) {
      start[j] = place;
      for (int w = 0; w < warps; ++w) {
        const int count = counters[w * n + j];
        counters[w * n + j] = place;
        place += count;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) start[n] = done;

  for (int begin = first; begin < end; begin += kAhead * kWarp) {
    int targets[kAhead];
    read(begin, targets);
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      const bool edge = targets[step] < n;
      const unsigned peers = __match_any_sync(kAllLanes, targets[step]);
      const int rank = votes_before(peers), base = edge ? own[targets[step]] : 0;
      __syncwarp();
      if (edge && rank == 0) own[targets[step]] = base + __popc(peers);
      __syncwarp();
      if (edge) args.edges[blockIdx.x * int64_t(edges) + base + rank] = begin + step * kWarp + lane_id();
    }
  }
}

}  // namespace

bool reverse_graph_supports(const ReverseGraphArgs& args) {
  const int64_t tiles = (args.nodes * args.k + kSortTile - 1) / kSortTile;
  return args.nodes * args.k <= kMostEdges && args.n < INT32_MAX && args.batch * (tiles + kDigits) <= INT32_MAX;
}

size_t reverse_graph_workspace(const ReverseGraphArgs& args) {
  if (warps_of(args) > 0) return 0;
  Pieces pieces(nullptr);
  plan(args, pieces);
  return pieces.used();
}

cudaError_t reverse_graph(const ReverseGraphArgs& args, void* workspace, cudaStream_t stream) {
  if (!reverse_graph_supports(args)) return cudaErrorInvalidValue;
  if (args.batch == 0) return cudaSuccess;
  if (const int warps = warps_of(args); warps > 0)
    return launch(sort_cloud, dim3(static_cast<unsigned>(args.batch)), dim3(warps * kWarp),
                  shared_bytes<int>(warps * args.n), stream, args);
  Pieces pieces(workspace);
  Sort sort = plan(args, pieces);
  cudaError_t status = launch(list_edges, dim3(static_cast<unsigned>(sort.tiles())), dim3(kThreads), 0, stream, args, sort);
  if (status == cudaSuccess) status = sort_pairs(sort, stream);
  if (status == cudaSuccess)
    status = launch(mark_starts, grid_of(args.batch * (sort.segments.stride + 1), kThreads), dim3(kThreads), 0, stream, args,
                    sort.pairs);
  return status;
}

}  // namespace crosspoint::cuda
