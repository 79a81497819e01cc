// edge_conv2 and edge_conv2_backward: allocate, check the graph, launch.
#include "crosspoint/edge_conv2.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

// A layer's tensors, dense and in the computing dtype, for as long as the kernel runs.
struct Layer {
  Layer(ScalarType dtype, const Tensor& weight, const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
        const std::optional<Tensor>& running_mean = std::nullopt,
        const std::optional<Tensor>& running_var = std::nullopt)
      : weight(dense(weight, dtype)),
        gamma(optional_dense(gamma, dtype)),
        beta(optional_dense(beta, dtype)),
        mean(optional_dense(running_mean, dtype)),
        var(optional_dense(running_var, dtype)) {}

  template <class T>
  EdgeConv2Layer<T> pointers() {
    EdgeConv2Layer<T> layer{data<T>(weight), optional_data<T>(gamma), optional_data<T>(beta), nullptr, nullptr};
    if (mean.has_value()) layer.running_mean = mutable_data<T>(*mean);
    if (var.has_value()) layer.running_var = mutable_data<T>(*var);
    return layer;
  }

  Tensor weight;
  std::optional<Tensor> gamma, beta, mean, var;
};

// What the forward operator returns after `out`, in its order.
struct SavedTensors {
  Tensor winner, slot, degrees, centre, offset1, rstd1, offset2, rstd2;

  template <class T>
  EdgeConv2Saved<T> pointers(int64_t nodes, bool backward) {
    EdgeConv2Saved<T> saved{};
    saved.out_degree = mutable_data<int32_t>(degrees);
    saved.in_degree = saved.out_degree + nodes;
    saved.centre = mutable_data<T>(centre);
    saved.offset1 = mutable_data<double>(offset1);
    saved.rstd1 = mutable_data<double>(rstd1);
    saved.offset2 = mutable_data<double>(offset2);
    saved.rstd2 = mutable_data<double>(rstd2);
    saved.slot_bytes = slot.scalar_type() == ScalarType::Byte ? 1 : 4;
    if (backward) {
      saved.winner = mutable_data<T>(winner);
      saved.slot = slot.mutable_data_ptr();
    }
    return saved;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv2(
    const Tensor& x, const Tensor& idx, const Tensor& weight1, const std::optional<Tensor>& gamma1,
    const std::optional<Tensor>& beta1, const Tensor& weight2, const std::optional<Tensor>& gamma2,
    const std::optional<Tensor>& beta2, std::optional<Tensor> running_mean1, std::optional<Tensor> running_var1,
    std::optional<Tensor> running_mean2, std::optional<Tensor> running_var2, bool training, double momentum, double eps,
    double negative_slope, bool backward, bool first_known) {
  const int64_t batch = idx.size(0), n = idx.size(1), k = idx.size(2), c_in = x.size(2), c_mid = weight1.size(0),
                c_out = weight2.size(0);
  check_cloud_size(n);
  const ScalarType dtype = compute_dtype(x);
  training = training && gamma1.has_value();
  const std::vector<int64_t> nodes{batch, n, c_out}, none{0};
  Tensor out = new_tensor(x, nodes, dtype);
  SavedTensors saved{new_tensor(x, backward ? nodes : none, dtype),
                     new_tensor(x, backward ? nodes : none, k <= 256 ? ScalarType::Byte : ScalarType::Int),
                     new_tensor(x, {2, batch, n}, ScalarType::Int),
                     new_tensor(x, {batch, c_in}, dtype),
                     new_tensor(x, {batch, c_mid}, ScalarType::Double),
                     new_tensor(x, {c_mid}, ScalarType::Double),
                     new_tensor(x, {batch, c_out}, ScalarType::Double),
                     new_tensor(x, {c_out}, ScalarType::Double)};
  if (batch * n * k == 0) {
    for (Tensor* output : {&out, &saved.winner, &saved.slot, &saved.degrees, &saved.centre, &saved.offset1,
                           &saved.rstd1, &saved.offset2, &saved.rstd2})
      torch::stable::zero_(*output);
  } else {
    const Tensor x_dense = dense(x, dtype), idx_dense = torch::stable::contiguous(idx);
    Layer first(dtype, weight1, gamma1, beta1, running_mean1, running_var1);
    Layer second(dtype, weight2, gamma2, beta2, running_mean2, running_var2);
    const Parallel parallel = torch_pool();
    check_graph("edge_conv2", data<int64_t>(idx_dense), batch, n, n, k, parallel);
    with_compute_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      EdgeConv2ForwardArgs<T> args{};
      args.batch = batch, args.n = n, args.k = k, args.c_in = c_in, args.c_mid = c_mid, args.c_out = c_out;
      args.x = data<T>(x_dense);
      args.idx = data<int64_t>(idx_dense);
      args.first = first.pointers<T>();
      args.second = second.pointers<T>();
      args.training = training, args.first_known = first_known;
      args.momentum = momentum, args.eps = eps, args.negative_slope = negative_slope;
      args.out = mutable_data<T>(out);
      args.saved = saved.pointers<T>(batch * n, backward);
      edge_conv2_forward(args, parallel);
    });
    if (training && !first_known) {
      copy_back(running_mean1, first.mean);
      copy_back(running_var1, first.var);
    }
    if (training) {
      copy_back(running_mean2, second.mean);
      copy_back(running_var2, second.var);
    }
  }
  if (x.scalar_type() != dtype) out = torch::stable::to(out, x.scalar_type());
  return {out,           saved.winner, saved.slot,    saved.degrees, saved.centre,
          saved.offset1, saved.rstd1,  saved.offset2, saved.rstd2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv2_backward(
    const Tensor& grad, const Tensor& x, const Tensor& idx, const Tensor& weight1, const std::optional<Tensor>& gamma1,
    const std::optional<Tensor>& beta1, const Tensor& weight2, const std::optional<Tensor>& gamma2,
    const std::optional<Tensor>& beta2, const Tensor& winner, const Tensor& slot, const Tensor& degrees,
    const Tensor& centre, const Tensor& offset1, const Tensor& rstd1, const Tensor& offset2, const Tensor& rstd2,
    bool training, double negative_slope, bool need_x, bool need_weight1, bool need_weight2, bool first_known,
    const std::optional<Tensor>& mean_term, const std::optional<Tensor>& slope_term) {
  const int64_t batch = idx.size(0), n = idx.size(1), k = idx.size(2), c_in = x.size(2), c_mid = weight1.size(0),
                c_out = weight2.size(0);
  const ScalarType dtype = compute_dtype(x);
  const bool norm = gamma1.has_value();
  training = training && norm;
  const auto gradient = [&](bool wanted, std::vector<int64_t> shape) {
    return new_tensor(x, wanted ? shape : std::vector<int64_t>{0}, dtype);
  };
  Tensor grad_x = gradient(need_x, {batch, n, c_in});
  Tensor grad_weight1 = gradient(need_weight1, {c_mid, 2 * c_in}), grad_weight2 = gradient(need_weight2, {c_out, c_mid});
  Tensor grad_gamma1 = gradient(norm, {c_mid}), grad_beta1 = gradient(norm, {c_mid});
  Tensor grad_gamma2 = gradient(norm, {c_out}), grad_beta2 = gradient(norm, {c_out});
  if (batch * n * k == 0) {
    for (Tensor* value :
         {&grad_x, &grad_weight1, &grad_gamma1, &grad_beta1, &grad_weight2, &grad_gamma2, &grad_beta2})
      torch::stable::zero_(*value);
  } else {
    const Tensor grad_dense = dense(grad, dtype), x_dense = dense(x, dtype);
    const Tensor idx_dense = torch::stable::contiguous(idx);
    Layer first(dtype, weight1, gamma1, beta1), second(dtype, weight2, gamma2, beta2);
    SavedTensors saved{winner, slot, degrees, centre, offset1, rstd1, offset2, rstd2};
    with_compute_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      EdgeConv2BackwardArgs<T> args{};
      args.batch = batch, args.n = n, args.k = k, args.c_in = c_in, args.c_mid = c_mid, args.c_out = c_out;
      args.grad = data<T>(grad_dense);
      args.x = data<T>(x_dense);
      args.idx = data<int64_t>(idx_dense);
      args.first = first.pointers<T>();
      args.second = second.pointers<T>();
      args.training = training, args.first_known = first_known;
      args.negative_slope = negative_slope;
      args.saved = saved.pointers<T>(batch * n, true);
      args.mean_term = optional_data<double>(mean_term);
      args.slope_term = optional_data<double>(slope_term);
      if (need_x) args.grad_x = mutable_data<T>(grad_x);
      if (need_weight1) args.grad_weight1 = mutable_data<T>(grad_weight1);
      if (need_weight2) args.grad_weight2 = mutable_data<T>(grad_weight2);
      if (norm) {
        args.grad_gamma1 = mutable_data<T>(grad_gamma1);
        args.grad_beta1 = mutable_data<T>(grad_beta1);
        args.grad_gamma2 = mutable_data<T>(grad_gamma2);
        args.grad_beta2 = mutable_data<T>(grad_beta2);
      }
      edge_conv2_backward(args, torch_pool());
    });
  }
  if (x.scalar_type() != dtype) grad_x = torch::stable::to(grad_x, x.scalar_type());
  return {grad_x, grad_weight1, grad_gamma1, grad_beta1, grad_weight2, grad_gamma2, grad_beta2};
}

}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CPU, m) {
  m.impl("edge_conv2", TORCH_BOX(&crosspoint::binding::edge_conv2));
  m.impl("edge_conv2_backward", TORCH_BOX(&crosspoint::binding::edge_conv2_backward));
}
