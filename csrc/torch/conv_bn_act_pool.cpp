// conv_bn_act_pool and conv_bn_act_pool_backward: allocate, launch.
#include "crosspoint/conv_bn_act_pool.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

// What the forward operator returns after `out`, in its order.
struct PoolTensors {
  Tensor h, winner, statistics, slopes;

  template <class T>
  ConvBnActPoolSaved<T> pointers(int64_t batch, int64_t c_out, bool with_h, bool backward) {
    double* moments = mutable_data<double>(statistics);
    double* sums = backward ? mutable_data<double>(slopes) : nullptr;
    return {with_h ? mutable_data<T>(h) : nullptr,
            backward ? mutable_data<int32_t>(winner) : nullptr,
            moments,
            moments + c_out,
            sums,
            backward ? sums + batch * c_out : nullptr};
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_pool(
    const Tensor& x, const Tensor& weight, const Tensor& gamma, const Tensor& beta, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, const Lengths& lengths, bool training, double momentum, double eps,
    double negative_slope, bool backward) {
  const int64_t batch = x.size(0), n = x.size(1), c_in = x.size(2), c_out = weight.size(0);
  const ScalarType dtype = compute_dtype(x);
  const Lengths valid = checked(lengths, batch, n, "lengths");
  const bool with_h = backward || training;
  const auto sized = [&](bool wanted, std::vector<int64_t> shape) { return wanted ? shape : std::vector<int64_t>{0}; };
  Tensor out = new_tensor(x, {batch, 2 * c_out}, dtype);
  Tensor h = new_tensor(x, sized(with_h, {batch, n, c_out}), dtype);
  PoolTensors saved{h, new_tensor(x, sized(backward, {batch, c_out}), ScalarType::Int),
                    new_tensor(x, {2, c_out}, ScalarType::Double),
                    new_tensor(x, sized(backward, {2, batch, c_out}), ScalarType::Double)};
  if (x.numel() == 0 || c_out == 0) {
    for (Tensor* output : {&out, &saved.h, &saved.winner, &saved.statistics, &saved.slopes})
      torch::stable::zero_(*output);
  } else {
    const Tensor x_dense = dense(x, dtype), weight_dense = dense(weight, dtype), gamma_dense = dense(gamma, dtype),
                 beta_dense = dense(beta, dtype);
    auto mean = optional_dense(running_mean, dtype), var = optional_dense(running_var, dtype);
    with_compute_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      ConvBnActPoolForwardArgs<T> args{};
      args.batch = batch, args.n = n, args.c_in = c_in, args.c_out = c_out;
      args.x = data<T>(x_dense);
      args.lengths = pointer(valid);
      args.weight = data<T>(weight_dense);
      args.gamma = data<T>(gamma_dense);
      args.beta = data<T>(beta_dense);
      if (mean.has_value() && var.has_value()) {
        args.running_mean = mutable_data<T>(*mean);
        args.running_var = mutable_data<T>(*var);
      }
      args.training = training;
      args.momentum = momentum, args.eps = eps, args.negative_slope = negative_slope;
      args.out = mutable_data<T>(out);
      args.saved = saved.pointers<T>(batch, c_out, with_h, backward);
      conv_bn_act_pool_forward(args, torch_pool());
    });
    if (training) {
      copy_back(running_mean, mean);
      copy_back(running_var, var);
    }
  }
  if (!backward) saved.h = new_tensor(x, {0}, dtype);
  if (x.scalar_type() != dtype) out = torch::stable::to(out, x.scalar_type());
  return {out, saved.h, saved.winner, saved.statistics, saved.slopes, new_tensor(x, {0}, ScalarType::Double)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_pool_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
    const Lengths& lengths, const Tensor& h, const Tensor& winner, const Tensor& statistics, const Tensor& slopes,
    const Tensor& /* moments, which a GPU keeps */, bool training, double negative_slope, bool need_x, bool need_weight) {
  const int64_t batch = x.size(0), n = x.size(1), c_in = x.size(2), c_out = weight.size(0);
  const ScalarType dtype = compute_dtype(x);
  const Lengths valid = checked(lengths, batch, n, "lengths");
  const std::vector<int64_t> none{0};
  Tensor grad_x = new_tensor(x, need_x ? std::vector<int64_t>{batch, n, c_in} : none, dtype);
  Tensor grad_weight = new_tensor(x, need_weight ? std::vector<int64_t>{c_out, c_in} : none, dtype);
  Tensor grad_gamma = new_tensor(x, {c_out}, dtype), grad_beta = new_tensor(x, {c_out}, dtype);
  if (x.numel() == 0 || c_out == 0) {
    for (Tensor* gradient : {&grad_x, &grad_weight, &grad_gamma, &grad_beta}) torch::stable::zero_(*gradient);
  } else {
    const Tensor grad_dense = dense(grad, dtype), x_dense = dense(x, dtype), weight_dense = dense(weight, dtype),
                 gamma_dense = dense(gamma, dtype), beta_dense = dense(beta, dtype);
    PoolTensors saved{h, winner, statistics, slopes};
    with_compute_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      ConvBnActPoolBackwardArgs<T> args{};
      args.batch = batch, args.n = n, args.c_in = c_in, args.c_out = c_out;
      args.x = data<T>(x_dense);
      args.lengths = pointer(valid);
      args.weight = data<T>(weight_dense);
      args.gamma = data<T>(gamma_dense);
      args.beta = data<T>(beta_dense);
      args.training = training;
      args.negative_slope = negative_slope;
      args.grad = data<T>(grad_dense);
      args.saved = saved.pointers<T>(batch, c_out, true, true);
      if (need_x) args.grad_x = mutable_data<T>(grad_x);
      if (need_weight) args.grad_weight = mutable_data<T>(grad_weight);
      args.grad_gamma = mutable_data<T>(grad_gamma);
      args.grad_beta = mutable_data<T>(grad_beta);
      conv_bn_act_pool_backward(args, torch_pool());
    });
  }
  if (x.scalar_type() != dtype) grad_x = torch::stable::to(grad_x, x.scalar_type());
  return {grad_x, grad_weight, grad_gamma, grad_beta};
}

}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CPU, m) {
  m.impl("conv_bn_act_pool", TORCH_BOX(&crosspoint::binding::conv_bn_act_pool));
  m.impl("conv_bn_act_pool_backward", TORCH_BOX(&crosspoint::binding::conv_bn_act_pool_backward));
}
