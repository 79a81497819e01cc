// gather_max and gather_max_backward on CUDA tensors.
#include "crosspoint/cuda/gather_max.h"

#include "graph.h"

namespace crosspoint::binding {
namespace {

std::tuple<Tensor, Tensor> gather_max(const Tensor& x, const Tensor& idx) {
  const OnDeviceOf device(x);
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2), n = x.size(1), channels = x.size(2);
  const ScalarType dtype = compute_dtype(x);
  const std::vector<int64_t> shape{batch, nodes, channels};
  Tensor out = new_tensor(x, shape, dtype), slot = new_tensor(x, shape, ScalarType::Int);
  const Tensor x_dense = dense(x, dtype), idx_dense = prepared_graph("gather_max", idx, n);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const GatherMaxArgs<T> args{batch, n, nodes, k, channels, data<T>(x_dense), data<int64_t>(idx_dense),
                                mutable_data<T>(out), mutable_data<int32_t>(slot)};
    throw_if_failed(cuda::gather_max(args, device.stream()), "gather_max");
  });
  if (x.scalar_type() != dtype) out = torch::stable::to(out, x.scalar_type());
  return {out, slot};
}

Tensor gather_max_backward(const Tensor& grad, const Tensor& idx, const Tensor& slot, int64_t n) {
  const OnDeviceOf device(grad);
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2), channels = grad.size(2);
  const ScalarType dtype = compute_dtype(grad);
  Tensor grad_x = new_tensor(grad, {batch, n, channels}, dtype);
  const Tensor grad_dense = dense(grad, dtype), idx_dense = torch::stable::contiguous(idx),
               slot_dense = torch::stable::contiguous(slot);
  const TurnedGraph turned = turned_around("gather_max_backward", idx_dense, n, device);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const GatherMaxBackwardArgs<T> args{batch, n, nodes, k, channels, data<T>(grad_dense), data<int64_t>(idx_dense),
                                        data<int32_t>(slot_dense), mutable_data<T>(grad_x)};
    throw_if_failed(
        cuda::gather_max_backward(args, data<int32_t>(turned.start), data<int32_t>(turned.edges), device.stream()),
        "gather_max_backward");
  });
  return grad.scalar_type() == dtype ? grad_x : torch::stable::to(grad_x, grad.scalar_type());
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CUDA, m) {
  m.impl("gather_max", TORCH_BOX(&crosspoint::binding::gather_max));
  m.impl("gather_max_backward", TORCH_BOX(&crosspoint::binding::gather_max_backward));
}
