// neighbor_sum and neighbor_sum_backward: allocate, check the graph, launch.
#include "crosspoint/neighbor_sum.h"

#include "common.h"
#include "common/checks.h"

namespace crosspoint::binding {

Tensor neighbor_sum(const Tensor& x, const Tensor& idx) {
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2), n = x.size(1), channels = x.size(2);
  check_cloud_size(n);
  const ScalarType dtype = compute_dtype(x);
  Tensor out = new_tensor(x, {batch, nodes, channels}, dtype);
  const Tensor x_dense = dense(x, dtype), idx_dense = torch::stable::contiguous(idx);
  const Parallel parallel = torch_pool();
  check_graph("neighbor_sum", data<int64_t>(idx_dense), batch, nodes, n, k, parallel);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    NeighborSumArgs<T> args{batch, n, nodes, k, channels, data<T>(x_dense), data<int64_t>(idx_dense),
                            mutable_data<T>(out)};
    neighbor_sum(args, parallel);
  });
  return x.scalar_type() == dtype ? out : torch::stable::to(out, x.scalar_type());
}

Tensor neighbor_sum_backward(const Tensor& grad, const Tensor& idx, int64_t n) {
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2), channels = grad.size(2);
  check_cloud_size(nodes);
  const ScalarType dtype = compute_dtype(grad);
  Tensor grad_x = new_tensor(grad, {batch, n, channels}, dtype);
  const Tensor grad_dense = dense(grad, dtype), idx_dense = torch::stable::contiguous(idx);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    NeighborSumBackwardArgs<T> args{batch, n, nodes, k, channels, data<T>(grad_dense), data<int64_t>(idx_dense),
                                    mutable_data<T>(grad_x)};
    neighbor_sum_backward(args, torch_pool());
  });
  return grad.scalar_type() == dtype ? grad_x : torch::stable::to(grad_x, grad.scalar_type());
}

}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CPU, m) {
  m.impl("neighbor_sum", TORCH_BOX(&crosspoint::binding::neighbor_sum));
  m.impl("neighbor_sum_backward", TORCH_BOX(&crosspoint::binding::neighbor_sum_backward));
}
