// edge_conv and edge_conv_backward: allocate, check the graph, launch.
#include "crosspoint/edge_conv.h"

#include "common.h"
#include "common/checks.h"

namespace crosspoint::binding {
namespace {

// What the forward operator returns after `out`, in its order.
struct SavedTensors {
  Tensor winner, slot, out_sum, in_sum, degrees, centre, offset, rstd;

  template <class T>
  EdgeConvSaved<T> pointers(int64_t nodes, bool backward, bool training) {
    EdgeConvSaved<T> saved{};
    saved.out_degree = mutable_data<int32_t>(degrees);
    saved.in_degree = saved.out_degree + nodes;
    saved.centre = mutable_data<T>(centre);
    saved.offset = mutable_data<double>(offset);
    saved.rstd = mutable_data<double>(rstd);
    saved.slot_bytes = slot.scalar_type() == ScalarType::Byte ? 1 : 4;
    if (backward) {
      saved.winner = mutable_data<T>(winner);
      saved.slot = slot.mutable_data_ptr();
    }
    if (backward && training) {
      saved.out_sum = mutable_data<T>(out_sum);
      saved.in_sum = mutable_data<T>(in_sum);
    }
    return saved;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv(
    const Tensor& x, const Tensor& idx, const Tensor& weight, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    bool training, double momentum, double eps, double negative_slope, bool backward) {
  const int64_t batch = idx.size(0), n = idx.size(1), k = idx.size(2), c_in = x.size(2),
                c_out = weight.size(0);
  const ScalarType dtype = compute_dtype(x);
  training = training && gamma.has_value();
  const std::vector<int64_t> nodes{batch, n, c_out}, none{0};
  Tensor out = new_tensor(x, nodes, dtype);
  SavedTensors saved{new_tensor(x, backward ? nodes : none, dtype),
                     new_tensor(x, backward ? nodes : none, k <= 256 ? ScalarType::Byte : ScalarType::Int),
                     new_tensor(x, backward && training ? nodes : none, dtype),
                     new_tensor(x, backward && training ? nodes : none, dtype),
                     new_tensor(x, {2, batch, n}, ScalarType::Int),
                     new_tensor(x, {batch, c_in}, dtype),
                     new_tensor(x, {batch, c_out}, ScalarType::Double),
                     new_tensor(x, {c_out}, ScalarType::Double)};
  const Tensor moments = new_tensor(x, none, ScalarType::Double);  // kept by the GPU kernels alone
  if (batch * n * k == 0) {
    for (Tensor* output : {&out, &saved.winner, &saved.slot, &saved.out_sum, &saved.in_sum, &saved.degrees,
                           &saved.centre, &saved.offset, &saved.rstd})
      torch::stable::zero_(*output);
  } else {
    const Tensor x_dense = dense(x, dtype), idx_dense = torch::stable::contiguous(idx),
                 weight_dense = dense(weight, dtype);
    const auto gamma_dense = optional_dense(gamma, dtype), beta_dense = optional_dense(beta, dtype);
    auto mean_dense = optional_dense(running_mean, dtype), var_dense = optional_dense(running_var, dtype);
    const Parallel parallel = torch_pool();
    check_graph("edge_conv", data<int64_t>(idx_dense), batch, n, n, k, parallel);
    with_compute_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      EdgeConvForwardArgs<T> args{};
      args.batch = batch, args.n = n, args.k = k, args.c_in = c_in, args.c_out = c_out;
      args.x = data<T>(x_dense);
      args.idx = data<int64_t>(idx_dense);
      args.weight = data<T>(weight_dense);
      args.gamma = optional_data<T>(gamma_dense);
      args.beta = optional_data<T>(beta_dense);
      if (mean_dense.has_value()) {
        args.running_mean = mutable_data<T>(*mean_dense);
        args.running_var = mutable_data<T>(*var_dense);
      }
      args.training = training;
      args.momentum = momentum, args.eps = eps, args.negative_slope = negative_slope;
      args.out = mutable_data<T>(out);
      args.saved = saved.pointers<T>(batch * n, backward, training);
      edge_conv_forward(args, parallel);
    });
    if (training) {
      copy_back(running_mean, mean_dense);
      copy_back(running_var, var_dense);
    }
  }
  if (x.scalar_type() != dtype) out = torch::stable::to(out, x.scalar_type());
  return {out,           saved.winner, saved.slot,   saved.out_sum, saved.in_sum,
          saved.degrees, saved.centre, saved.offset, saved.rstd,    moments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edge_conv_backward(
    const Tensor& grad, const Tensor& x, const Tensor& idx, const Tensor& weight,
    const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, const Tensor& winner,
    const Tensor& slot, const Tensor& out_sum, const Tensor& in_sum, const Tensor& degrees,
    const Tensor& centre, const Tensor& offset, const Tensor& rstd, const Tensor&, bool training,
    double negative_slope, bool need_x, bool need_weight) {
  const int64_t batch = idx.size(0), n = idx.size(1), k = idx.size(2), c_in = x.size(2),
                c_out = weight.size(0);
  const ScalarType dtype = compute_dtype(x);
  training = training && gamma.has_value();
  const std::vector<int64_t> none{0}, channels{gamma.has_value() ? c_out : 0};
  Tensor grad_x = new_tensor(x, need_x ? std::vector<int64_t>{batch, n, c_in} : none, dtype);
  Tensor grad_weight = new_tensor(x, need_weight ? std::vector<int64_t>{c_out, 2 * c_in} : none, dtype);
  Tensor grad_gamma = new_tensor(x, channels, dtype), grad_beta = new_tensor(x, channels, dtype);
  if (batch * n * k == 0) {
    for (Tensor* gradient : {&grad_x, &grad_weight, &grad_gamma, &grad_beta}) torch::stable::zero_(*gradient);
  } else {
    const Tensor grad_dense = dense(grad, dtype), x_dense = dense(x, dtype);
    const Tensor idx_dense = torch::stable::contiguous(idx), weight_dense = dense(weight, dtype);
    const auto gamma_dense = optional_dense(gamma, dtype), beta_dense = optional_dense(beta, dtype);
    SavedTensors saved{winner, slot, out_sum, in_sum, degrees, centre, offset, rstd};
    with_compute_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      EdgeConvBackwardArgs<T> args{};
      args.batch = batch, args.n = n, args.k = k, args.c_in = c_in, args.c_out = c_out;
      args.grad = data<T>(grad_dense);
      args.x = data<T>(x_dense);
      args.idx = data<int64_t>(idx_dense);
      args.weight = data<T>(weight_dense);
      args.gamma = optional_data<T>(gamma_dense);
      args.beta = optional_data<T>(beta_dense);
      args.training = training;
      args.negative_slope = negative_slope;
      args.saved = saved.pointers<T>(batch * n, true, training);
      if (need_x) args.grad_x = mutable_data<T>(grad_x);
      if (need_weight) args.grad_weight = mutable_data<T>(grad_weight);
      args.grad_gamma = mutable_data<T>(grad_gamma);
      args.grad_beta = mutable_data<T>(grad_beta);
      edge_conv_backward(args, torch_pool());
    });
  }
  if (x.scalar_type() != dtype) grad_x = torch::stable::to(grad_x, x.scalar_type());
  return {grad_x, grad_weight, grad_gamma, grad_beta};
}

}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CPU, m) {
  m.impl("edge_conv", TORCH_BOX(&crosspoint::binding::edge_conv));
  m.impl("edge_conv_backward", TORCH_BOX(&crosspoint::binding::edge_conv_backward));
}
