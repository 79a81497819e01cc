// The leaves of edge_conv2 on CUDA tensors, as crosspoint/ops/_gpu/_cuda.py declares them. What they are given is
// contiguous and allocated by the orchestrator.
#include "crosspoint/cuda/edge_conv2.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

template <class T>
cuda::EdgeTiles<T> tiles_of(const Tensor& nodes, const Tensor& idx, const Tensor& gain, const Tensor& shift,
                            double negative_slope, int64_t product) {
  return {{data<int64_t>(idx), idx.size(0), idx.size(1), idx.size(2)},
          gain.size(0),
          data<T>(nodes),
          data<T>(gain),
          data<T>(shift),
          negative_slope,
          static_cast<cuda::Product>(product)};
}

int bytes_of(const Tensor& slot) { return slot.scalar_type() == ScalarType::Byte ? 1 : 4; }

template <class T>
cuda::EdgeTileGradientArgs<T> gradient_of(const cuda::EdgeTiles<T>& tiles, const Tensor& g, const Tensor& slot) {
  return {tiles, g.size(2), data<T>(g), slot.const_data_ptr(), bytes_of(slot), nullptr, 0, nullptr};
}

template <class T>
cuda::EdgeTileGradientArgs<T> gradient_of(const cuda::EdgeTiles<T>& tiles, const Tensor& g, const Tensor& slot,
                                          const Tensor& rows, const Tensor& q) {
  cuda::EdgeTileGradientArgs<T> args = gradient_of(tiles, g, slot);
  args.rows = data<T>(rows);
  args.row_count = rows.size(0);
  args.q = data<T>(q);
  return args;
}

void edge_max(const Tensor& nodes, const Tensor& idx, const Tensor& gain, const Tensor& shift, const Tensor& weight,
              const std::optional<Tensor>& gamma, double negative_slope, int64_t product, Tensor winner,
              std::optional<Tensor> slot, Tensor sums) {
  const OnDeviceOf device(nodes);
  with_compute_type(nodes.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::EdgeTileMaxArgs<T> args{tiles_of<T>(nodes, idx, gain, shift, negative_slope, product), winner.size(2),
                                  data<T>(weight), optional_data<T>(gamma), mutable_data<T>(winner), nullptr, 1, nullptr};
    if (slot.has_value()) {
      args.slot = slot->mutable_data_ptr();
      args.slot_bytes = bytes_of(*slot);
    }
    if (sums.numel() > 0) args.sums = mutable_data<double>(sums);
    throw_if_failed(cuda::edge_tile_max(args, device.stream()), "edge_conv2: edge_max");
  });
}

void activate(Tensor winner, const Tensor& degrees, const Tensor& scale, const Tensor& shift, double negative_slope,
              Tensor out) {
  const OnDeviceOf device(winner);
  with_compute_type(winner.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeActivateArgs<T> args{winner.size(0),  winner.size(1), winner.size(2), data<T>(winner),
                                         data<int32_t>(degrees), data<T>(scale), data<T>(shift), negative_slope,
                                         mutable_data<T>(out)};
    throw_if_failed(cuda::edge_activate(args, device.stream()), "edge_conv2: activate");
  });
}

void own_gradient(const Tensor& nodes, const Tensor& idx, const Tensor& gain, const Tensor& shift, const Tensor& g,
                  const Tensor& slot, double negative_slope, int64_t product, const Tensor& rows, const Tensor& q,
                  Tensor routed, Tensor sums) {
  const OnDeviceOf device(nodes);
  with_compute_type(nodes.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto args = gradient_of(tiles_of<T>(nodes, idx, gain, shift, negative_slope, product), g, slot, rows, q);
    throw_if_failed(cuda::edge_own_gradient(args, mutable_data<T>(routed), mutable_data<double>(sums), device.stream()),
                    "edge_conv2: own_gradient");
  });
}

void neighbour_gradient(const Tensor& nodes, const Tensor& idx, const Tensor& gain, const Tensor& shift, const Tensor& g,
                        const Tensor& slot, double negative_slope, int64_t product, const Tensor& rows, const Tensor& q,
                        const Tensor& start, const Tensor& edges, Tensor runs) {
  const OnDeviceOf device(nodes);
  with_compute_type(nodes.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto args = gradient_of(tiles_of<T>(nodes, idx, gain, shift, negative_slope, product), g, slot, rows, q);
    const cuda::ReverseEdges reverse{data<int32_t>(start), data<int32_t>(edges), idx.size(0), idx.size(1), idx.size(2)};
    throw_if_failed(cuda::edge_neighbour_gradient(args, reverse, mutable_data<T>(runs), device.stream()),
                    "edge_conv2: neighbour_gradient");
  });
}

void add_runs(const Tensor& runs, const Tensor& start, int64_t k, Tensor routed) {
  const OnDeviceOf device(runs);
  with_compute_type(runs.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::ReverseEdges reverse{data<int32_t>(start), nullptr, routed.size(0), routed.size(1), k};
    throw_if_failed(
        cuda::edge_add_runs(data<T>(runs), reverse, runs.size(2), mutable_data<T>(routed), device.stream()),
        "edge_conv2: add_runs");
  });
}

void edge_products(const Tensor& nodes, const Tensor& idx, const Tensor& gain, const Tensor& shift, const Tensor& g,
                   const Tensor& slot, double negative_slope, int64_t product, Tensor out) {
  const OnDeviceOf device(nodes);
  with_compute_type(nodes.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto args = gradient_of(tiles_of<T>(nodes, idx, gain, shift, negative_slope, product), g, slot);
    args.row_count = out.size(2);
    throw_if_failed(cuda::edge_products(args, out.size(1), mutable_data<T>(out), device.stream()),
                    "edge_conv2: edge_products");
  });
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CUDA, m) {
  m.impl("_edge_conv2_edge_max", TORCH_BOX(&crosspoint::binding::edge_max));
  m.impl("_edge_conv2_activate", TORCH_BOX(&crosspoint::binding::activate));
  m.impl("_edge_conv2_own_gradient", TORCH_BOX(&crosspoint::binding::own_gradient));
  m.impl("_edge_conv2_neighbour_gradient", TORCH_BOX(&crosspoint::binding::neighbour_gradient));
  m.impl("_edge_conv2_add_runs", TORCH_BOX(&crosspoint::binding::add_runs));
  m.impl("_edge_conv2_edge_products", TORCH_BOX(&crosspoint::binding::edge_products));
}
