// The leaves of edge_conv on CUDA tensors, as crosspoint/ops/_gpu/_cuda.py declares them. What they are given is
// contiguous and allocated by the orchestrator.
#include "crosspoint/cuda/edge_conv.h"

#include "common.h"
#include "crosspoint/cuda/reverse_graph.h"

namespace crosspoint::binding {
namespace {

cuda::Graph graph_of(const Tensor& idx) { return {data<int64_t>(idx), idx.size(0), idx.size(1), idx.size(2)}; }

cuda::ReverseEdges reverse_of(const Tensor& start, const Tensor& edges, int64_t k) {
  return {data<int32_t>(start), data<int32_t>(edges), start.size(0), start.size(1) - 1, k};
}

void degrees(const Tensor& idx, Tensor degrees) {
  const OnDeviceOf device(idx);
  throw_if_failed(cuda::edge_conv_degrees(graph_of(idx), mutable_data<int32_t>(degrees), device.stream()),
                  "edge_conv: degrees");
}

void centre(const Tensor& x, const Tensor& degrees, Tensor centre) {
  const OnDeviceOf device(x);
  with_compute_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeConvCentreArgs<T> args{x.size(0), x.size(1), x.size(2), data<T>(x), data<int32_t>(degrees),
                                           mutable_data<T>(centre)};
    throw_if_failed(cuda::edge_conv_centre(args, device.stream()), "edge_conv: centre");
  });
}

void subtract(const Tensor& x, Tensor centre, const Tensor& degrees, Tensor out) {
  const OnDeviceOf device(x);
  with_compute_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeConvCentreArgs<T> args{x.size(0), x.size(1), x.size(2), data<T>(x), data<int32_t>(degrees),
                                           mutable_data<T>(centre)};
    throw_if_failed(cuda::edge_conv_subtract(args, mutable_data<T>(out), device.stream()), "edge_conv: subtract");
  });
}

void neighbor_sum(const Tensor& x, const Tensor& idx, Tensor out) {
  const OnDeviceOf device(x);
  with_compute_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeConvSumArgs<T> args{graph_of(idx), x.size(2), data<T>(x), mutable_data<T>(out)};
    throw_if_failed(cuda::edge_conv_neighbor_sum(args, device.stream()), "edge_conv: neighbor_sum");
  });
}

void moments(const Tensor& x, const Tensor& sums, const Tensor& degrees, Tensor gram, Tensor first) {
  const OnDeviceOf device(x);
  with_compute_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeConvMomentsArgs<T> args{x.size(0), x.size(1), x.size(2), gram.size(1), data<T>(x), data<T>(sums),
                                            data<int32_t>(degrees), mutable_data<T>(gram), mutable_data<double>(first)};
    throw_if_failed(cuda::edge_conv_moments(args, device.stream()), "edge_conv: moments");
  });
}

int bytes_of(const Tensor& slot) { return slot.scalar_type() == ScalarType::Byte ? 1 : 4; }

void gather_max(const Tensor& nodes, const Tensor& idx, const std::optional<Tensor>& gamma, const Tensor& scale,
                const Tensor& shift, double negative_slope, Tensor out, std::optional<Tensor> winner,
                std::optional<Tensor> slot) {
  const OnDeviceOf device(nodes);
  with_compute_type(nodes.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::EdgeConvMaxArgs<T> args{graph_of(idx),  out.size(2),    data<T>(nodes),       optional_data<T>(gamma),
                                  data<T>(scale), data<T>(shift), negative_slope, mutable_data<T>(out),
                                  nullptr,        nullptr,        1};
    if (winner.has_value()) {
      args.winner = mutable_data<T>(*winner);
      args.slot = slot->mutable_data_ptr();
      args.slot_bytes = bytes_of(*slot);
    }
    throw_if_failed(cuda::edge_conv_max(args, device.stream()), "edge_conv: gather_max");
  });
}

void winner_gradient(const Tensor& grad, const Tensor& winner, const Tensor& degrees, const Tensor& scale,
                     const Tensor& shift, double negative_slope, Tensor routed, Tensor sums) {
  const OnDeviceOf device(winner);
  with_compute_type(winner.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeConvGradientArgs<T> args{
        winner.size(0), winner.size(1),  winner.size(2),       sums.size(2),  data<T>(grad),
        data<T>(winner), data<int32_t>(degrees), data<T>(scale), data<T>(shift), negative_slope,
        mutable_data<T>(routed), routed.size(2), mutable_data<double>(sums)};
    throw_if_failed(cuda::edge_conv_winner_gradient(args, device.stream()), "edge_conv: winner_gradient");
  });
}

void reverse_graph(const Tensor& idx, Tensor start, Tensor edges) {
  const OnDeviceOf device(idx);
  const cuda::ReverseGraphArgs args{data<int64_t>(idx), idx.size(0), idx.size(1), idx.size(2), start.size(1) - 1,
                                    mutable_data<int32_t>(start), mutable_data<int32_t>(edges)};
  Tensor space = workspace(idx, cuda::reverse_graph_workspace(args));
  throw_if_failed(cuda::reverse_graph(args, space.mutable_data_ptr(), device.stream()), "edge_conv: reverse_graph");
}

void route(const Tensor& slot, const Tensor& start, const Tensor& edges, int64_t k, Tensor routed) {
  const OnDeviceOf device(slot);
  with_compute_type(routed.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeConvRouteArgs<T> args{reverse_of(start, edges, k), slot.size(2), slot.const_data_ptr(), bytes_of(slot),
                                          mutable_data<T>(routed)};
    throw_if_failed(cuda::edge_conv_route(args, device.stream()), "edge_conv: route");
  });
}

void dense_gradient(const Tensor& x, const Tensor& sums, const Tensor& degrees, const Tensor& start, const Tensor& edges,
                    int64_t k, const Tensor& constant, Tensor dense, Tensor grad_x) {
  const OnDeviceOf device(x);
  with_compute_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeConvDenseArgs<T> args{reverse_of(start, edges, k), x.size(2),         data<T>(x),
                                          data<T>(sums),               data<int32_t>(degrees), data<T>(constant),
                                          mutable_data<T>(dense),      mutable_data<T>(grad_x)};
    throw_if_failed(cuda::edge_conv_dense_gradient(args, device.stream()), "edge_conv: dense_gradient");
  });
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CUDA, m) {
  m.impl("_edge_conv_degrees", TORCH_BOX(&crosspoint::binding::degrees));
  m.impl("_edge_conv_centre", TORCH_BOX(&crosspoint::binding::centre));
  m.impl("_edge_conv_subtract", TORCH_BOX(&crosspoint::binding::subtract));
  m.impl("_edge_conv_neighbor_sum", TORCH_BOX(&crosspoint::binding::neighbor_sum));
  m.impl("_edge_conv_moments", TORCH_BOX(&crosspoint::binding::moments));
  m.impl("_edge_conv_gather_max", TORCH_BOX(&crosspoint::binding::gather_max));
  m.impl("_edge_conv_winner_gradient", TORCH_BOX(&crosspoint::binding::winner_gradient));
  m.impl("_edge_conv_reverse_graph", TORCH_BOX(&crosspoint::binding::reverse_graph));
  m.impl("_edge_conv_route", TORCH_BOX(&crosspoint::binding::route));
  m.impl("_edge_conv_dense_gradient", TORCH_BOX(&crosspoint::binding::dense_gradient));
}
