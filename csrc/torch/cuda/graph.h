// What the bindings of operators on neighbour graphs need: the graph, and the graph turned around.
#pragma once

#include "common.h"
#include "common/checks.h"
#include "crosspoint/cuda/reverse_graph.h"

namespace crosspoint::binding {

// idx (batch, nodes, k) as contiguous memory; to the kernels what is out of [0, n) is no edge.
inline Tensor prepared_graph(const char* op, const Tensor& idx, int64_t n) {
  check_cloud_size(n);
  Tensor values = torch::stable::contiguous(idx);
  if (values_are_checked()) {
    const Tensor host = on_cpu(values);
    check_graph(op, data<int64_t>(host), host.size(0), host.size(1), n, host.size(2), torch_pool());
  }
  return values;
}

struct TurnedGraph {
  Tensor start;  // (batch, n + 1)
  Tensor edges;  // (batch, nodes * k)
};

// idx: contiguous.
inline TurnedGraph turned_around(const char* op, const Tensor& idx, int64_t n, const OnDeviceOf& device) {
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2);
  TurnedGraph graph{new_tensor(idx, {batch, n + 1}, ScalarType::Int), new_tensor(idx, {batch, nodes * k}, ScalarType::Int)};
  const cuda::ReverseGraphArgs args{data<int64_t>(idx), batch, nodes, k, n, mutable_data<int32_t>(graph.start),
                                    mutable_data<int32_t>(graph.edges)};
  if (!cuda::reverse_graph_supports(args))
    throw std::runtime_error(std::string(op) + ": a cloud of " + std::to_string(nodes * k) + " edges: at most 2^30 are supported");
  Tensor space = workspace(idx, cuda::reverse_graph_workspace(args));
  throw_if_failed(cuda::reverse_graph(args, space.mutable_data_ptr(), device.stream()), op);
  return graph;
}

}  // namespace crosspoint::binding
