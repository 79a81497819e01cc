// Neighbour graphs turned around on an NVIDIA GPU: once for a graph, for every pass that gathers from the nodes
// that edges lead to.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace crosspoint::cuda {

struct ReverseGraphArgs {
  const int64_t* idx;  // (batch, nodes, k): where edges lead to, in [0, n); anything else is no edge
  int64_t batch, nodes, k, n;
  // The edges of a cloud, i * k + s for slot s of node i, that lead to node j: edges[start[j]] to
  // edges[start[j + 1] - 1], ascending.
  int32_t* start;  // (batch, n + 1)
  int32_t* edges;  // (batch, nodes * k); what lies after the last edge is not defined
};

// Whether the sizes are supported: at most 2^30 edges of a cloud.
bool reverse_graph_supports(const ReverseGraphArgs&);

// Bytes of device memory, at an address that is a multiple of 256.
size_t reverse_graph_workspace(const ReverseGraphArgs&);

// Enqueues it; the result does not depend on how blocks run.
cudaError_t reverse_graph(const ReverseGraphArgs&, void* workspace, cudaStream_t);

}  // namespace crosspoint::cuda
