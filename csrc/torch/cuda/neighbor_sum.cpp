// neighbor_sum and neighbor_sum_backward on CUDA tensors.
#include "crosspoint/cuda/neighbor_sum.h"

#include "graph.h"

namespace crosspoint::binding {
namespace {

Tensor neighbor_sum(const Tensor& x, const Tensor& idx) {
  const OnDeviceOf device(x);
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2), n = x.size(1), channels = x.size(2);
  const ScalarType dtype = compute_dtype(x);
  Tensor out = new_tensor(x, {batch, nodes, channels}, dtype);
  const Tensor x_dense = dense(x, dtype), idx_dense = prepared_graph("neighbor_sum", idx, n);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const NeighborSumArgs<T> args{batch, n, nodes, k, channels, data<T>(x_dense), data<int64_t>(idx_dense),
                                  mutable_data<T>(out)};
    throw_if_failed(cuda::neighbor_sum(args, device.stream()), "neighbor_sum");
  });
  return x.scalar_type() == dtype ? out : torch::stable::to(out, x.scalar_type());
}

Tensor neighbor_sum_backward(const Tensor& grad, const Tensor& idx, int64_t n) {
  const OnDeviceOf device(grad);
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2), channels = grad.size(2);
  const ScalarType dtype = compute_dtype(grad);
  Tensor grad_x = new_tensor(grad, {batch, n, channels}, dtype);
  const Tensor grad_dense = dense(grad, dtype), idx_dense = torch::stable::contiguous(idx);
  const TurnedGraph turned = turned_around("neighbor_sum_backward", idx_dense, n, device);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const NeighborSumBackwardArgs<T> args{batch, n, nodes, k, channels, data<T>(grad_dense), data<int64_t>(idx_dense),
                                          mutable_data<T>(grad_x)};
    throw_if_failed(
        cuda::neighbor_sum_backward(args, data<int32_t>(turned.start), data<int32_t>(turned.edges), device.stream()),
        "neighbor_sum_backward");
  });
  return grad.scalar_type() == dtype ? grad_x : torch::stable::to(grad_x, grad.scalar_type());
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CUDA, m) {
  m.impl("neighbor_sum", TORCH_BOX(&crosspoint::binding::neighbor_sum));
  m.impl("neighbor_sum_backward", TORCH_BOX(&crosspoint::binding::neighbor_sum_backward));
}
