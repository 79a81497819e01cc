// gather_max and gather_max_backward: allocate, check the graph, launch.
#include "crosspoint/gather_max.h"

#include "common.h"
#include "common/checks.h"

namespace crosspoint::binding {

std::tuple<Tensor, Tensor> gather_max(const Tensor& x, const Tensor& idx) {
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2), n = x.size(1), channels = x.size(2);
  check_cloud_size(n);
  const ScalarType dtype = compute_dtype(x);
  const std::vector<int64_t> shape{batch, nodes, channels};
  Tensor out = new_tensor(x, shape, dtype), slot = new_tensor(x, shape, ScalarType::Int);
  const Tensor x_dense = dense(x, dtype), idx_dense = torch::stable::contiguous(idx);
  const Parallel parallel = torch_pool();
  check_graph("gather_max", data<int64_t>(idx_dense), batch, nodes, n, k, parallel);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    GatherMaxArgs<T> args{batch, n, nodes, k, channels, data<T>(x_dense), data<int64_t>(idx_dense),
                          mutable_data<T>(out), mutable_data<int32_t>(slot)};
    gather_max(args, parallel);
  });
  if (x.scalar_type() != dtype) out = torch::stable::to(out, x.scalar_type());
  return {out, slot};
}

Tensor gather_max_backward(const Tensor& grad, const Tensor& idx, const Tensor& slot, int64_t n) {
  const int64_t batch = idx.size(0), nodes = idx.size(1), k = idx.size(2), channels = grad.size(2);
  const ScalarType dtype = compute_dtype(grad);
  Tensor grad_x = new_tensor(grad, {batch, n, channels}, dtype);
  const Tensor grad_dense = dense(grad, dtype), idx_dense = torch::stable::contiguous(idx),
               slot_dense = torch::stable::contiguous(slot);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    GatherMaxBackwardArgs<T> args{batch, n, nodes, k, channels, data<T>(grad_dense), data<int64_t>(idx_dense),
                                  data<int32_t>(slot_dense), mutable_data<T>(grad_x)};
    gather_max_backward(args, torch_pool());
  });
  return grad.scalar_type() == dtype ? grad_x : torch::stable::to(grad_x, grad.scalar_type());
}

}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CPU, m) {
  m.impl("gather_max", TORCH_BOX(&crosspoint::binding::gather_max));
  m.impl("gather_max_backward", TORCH_BOX(&crosspoint::binding::gather_max_backward));
}
