// A stable sort of the edges by the node that they lead to, then the places where each node's edges begin.
#include "crosspoint/cuda/reverse_graph.h"

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

}  // namespace

bool reverse_graph_supports(const ReverseGraphArgs& args) {
  const int64_t tiles = (args.nodes * args.k + kSortTile - 1) / kSortTile;
  return args.nodes * args.k <= kMostEdges && args.n < INT32_MAX && args.batch * (tiles + kDigits) <= INT32_MAX;
}

size_t reverse_graph_workspace(const ReverseGraphArgs& args) {
  Pieces pieces(nullptr);
  plan(args, pieces);
  return pieces.used();
}

cudaError_t reverse_graph(const ReverseGraphArgs& args, void* workspace, cudaStream_t stream) {
  if (!reverse_graph_supports(args)) return cudaErrorInvalidValue;
  if (args.batch == 0) return cudaSuccess;
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
