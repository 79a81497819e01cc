// The leaves of edge_conv and edge_conv2 that are the algebra of their layers, on CUDA tensors: see edge_conv.cpp.
#include "crosspoint/cuda/edge_layer.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

using Optional = std::optional<Tensor>;

template <class T>
T* optional_mutable_data(Optional& x) {
  return x.has_value() ? mutable_data<T>(*x) : nullptr;
}

template <class T>
cuda::EdgeLayer<T> layer_of(int64_t batch, int64_t channels, const Tensor& weight, const Optional& gamma, bool signs) {
  return {batch, channels, weight.size(1), weight.size(0), data<T>(weight), optional_data<T>(gamma), signs};
}

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

template <class T>
cuda::EdgeNorm<T> norm_of(const Tensor& edges, const Tensor& centre, const Optional& beta, Optional& running_mean,
                          Optional& running_var, double momentum, double eps, Tensor& offset, Tensor& rstd, Tensor& scale,
                          Tensor& shift) {
  const bool running = running_mean.has_value();
  return {data<double>(edges),
          centre.const_data_ptr(),
          is_double(centre),
          optional_data<T>(beta),
          running ? running_mean->mutable_data_ptr() : nullptr,
          running ? running_var->mutable_data_ptr() : nullptr,
          running && is_double(*running_mean),
          momentum,
          eps,
          mutable_data<double>(offset),
          mutable_data<double>(rstd),
          mutable_data<T>(scale),
          mutable_data<T>(shift)};
}

void sum_parts(const Tensor& gram, const Tensor& first, Tensor moments) {
  const OnDeviceOf device(gram);
  with_compute_type(gram.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeSumPartsArgs<T> args{gram.size(0),  gram.size(1),        gram.size(3),
                                         data<T>(gram), data<double>(first), mutable_data<double>(moments)};
    throw_if_failed(cuda::edge_sum_parts(args, device.stream()), "edge_conv: sum_parts");
  });
}

void norm(const Optional& moments, const Tensor& weight, const Optional& gamma, const Optional& beta, bool signs,
          Optional running_mean, Optional running_var, const Tensor& centre, const Tensor& edges, double momentum,
          double eps, Tensor halves, Tensor offset, Tensor rstd, Tensor scale, Tensor shift) {
  const OnDeviceOf device(weight);
  with_compute_type(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeNormArgs<T> args{layer_of<T>(centre.size(0), centre.size(1), weight, gamma, signs),
                                     optional_data<double>(moments),
                                     norm_of<T>(edges, centre, beta, running_mean, running_var, momentum, eps, offset, rstd, scale, shift),
                                     mutable_data<T>(halves)};
    throw_if_failed(cuda::edge_norm(args, device.stream()), "edge_conv: norm");
  });
}

void sums_norm(const Optional& partial, const Tensor& weight, const Optional& gamma, const Optional& beta, bool signs,
               Optional running_mean, Optional running_var, const Tensor& centre, const Tensor& edges, double momentum,
               double eps, Tensor offset, Tensor rstd, Tensor scale, Tensor shift) {
  const OnDeviceOf device(weight);
  with_compute_type(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeSumsNormArgs<T> args{layer_of<T>(centre.size(0), centre.size(1), weight, gamma, signs),
                                         partial.has_value() ? partial->size(2) : 0, optional_data<double>(partial),
                                         norm_of<T>(edges, centre, beta, running_mean, running_var, momentum, eps, offset, rstd, scale, shift)};
    throw_if_failed(cuda::edge_sums_norm(args, device.stream()), "edge_conv2: sums_norm");
  });
}

void pivot(const Optional& gamma, const Optional& beta, const Tensor& rstd, const Tensor& offset, double negative_slope,
           Tensor pivot) {
  const OnDeviceOf device(rstd);
  const ScalarType type = gamma.has_value() ? gamma->scalar_type() : ScalarType::Double;
  with_compute_type(type, [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgePivotArgs<T> args{offset.size(0),     offset.size(1),       optional_data<T>(gamma), optional_data<T>(beta),
                                      data<double>(rstd), data<double>(offset), negative_slope,          mutable_data<double>(pivot)};
    throw_if_failed(cuda::edge_pivot(args, device.stream()), "edge_conv2: pivot");
  });
}

void affine(const Optional& gamma, const Optional& beta, bool signs, const Tensor& rstd, const Tensor& offset,
            Tensor scale, Tensor shift) {
  const OnDeviceOf device(rstd);
  with_compute_type(scale.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeAffineArgs<T> args{offset.size(0), offset.size(1),     optional_data<T>(gamma), optional_data<T>(beta),
                                       signs,          data<double>(rstd), data<double>(offset),    mutable_data<T>(scale),
                                       mutable_data<T>(shift)};
    throw_if_failed(cuda::edge_affine(args, device.stream()), "edge_conv: affine");
  });
}

void norm_gradient(const Tensor& partial, const Optional& gamma, bool signs, const Tensor& offset, const Tensor& rstd,
                   const Tensor& edges, Tensor grad_gamma, Tensor grad_beta, Tensor sum, Tensor mean_term,
                   Tensor slope_term) {
  const OnDeviceOf device(partial);
  with_compute_type(grad_gamma.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeNormGradientArgs<T> args{partial.size(1),
                                             partial.size(2),
                                             partial.size(3),
                                             data<double>(partial),
                                             optional_data<T>(gamma),
                                             signs,
                                             data<double>(offset),
                                             data<double>(rstd),
                                             data<double>(edges),
                                             mutable_data<T>(grad_gamma),
                                             mutable_data<T>(grad_beta),
                                             mutable_data<double>(sum),
                                             mutable_data<double>(mean_term),
                                             mutable_data<double>(slope_term)};
    throw_if_failed(cuda::edge_norm_gradient(args, device.stream()), "edge_conv: norm_gradient");
  });
}

void input_terms(const Tensor& weight, const Optional& gamma, bool signs, const Tensor& rstd, const Optional& mean_term,
                 const Optional& slope_term, Tensor halves, Optional constant, Optional square) {
  const OnDeviceOf device(weight);
  with_compute_type(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeInputTermsArgs<T> args{
        layer_of<T>(mean_term.has_value() ? mean_term->size(0) : 0, halves.size(1), weight, gamma, signs),
        data<double>(rstd),
        optional_data<double>(mean_term),
        optional_data<double>(slope_term),
        mutable_data<T>(halves),
        optional_mutable_data<T>(constant),
        optional_mutable_data<T>(square)};
    throw_if_failed(cuda::edge_input_terms(args, device.stream()), "edge_conv: input_terms");
  });
}

void weight_gradient(const Tensor& sparse, const Tensor& weight, const Optional& gamma, bool signs, const Tensor& rstd,
                     const Tensor& centre, const Tensor& edges, const Optional& mean_term, const Optional& slope_term,
                     const Optional& moments, Tensor sum, Tensor grad) {
  const OnDeviceOf device(weight);
  with_compute_type(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::EdgeWeightGradientArgs<T> args{layer_of<T>(centre.size(0), centre.size(1), weight, gamma, signs),
                                               data<T>(sparse),
                                               data<double>(rstd),
                                               centre.const_data_ptr(),
                                               is_double(centre),
                                               data<double>(edges),
                                               optional_data<double>(mean_term),
                                               optional_data<double>(slope_term),
                                               optional_data<double>(moments),
                                               mutable_data<double>(sum),
                                               mutable_data<T>(grad)};
    throw_if_failed(cuda::edge_weight_gradient(args, device.stream()), "edge_conv: weight_gradient");
  });
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CUDA, m) {
  m.impl("_edge_conv_sum_parts", TORCH_BOX(&crosspoint::binding::sum_parts));
  m.impl("_edge_conv_norm", TORCH_BOX(&crosspoint::binding::norm));
  m.impl("_edge_conv2_sums_norm", TORCH_BOX(&crosspoint::binding::sums_norm));
  m.impl("_edge_conv2_pivot", TORCH_BOX(&crosspoint::binding::pivot));
  m.impl("_edge_conv_affine", TORCH_BOX(&crosspoint::binding::affine));
  m.impl("_edge_conv_norm_gradient", TORCH_BOX(&crosspoint::binding::norm_gradient));
  m.impl("_edge_conv_input_terms", TORCH_BOX(&crosspoint::binding::input_terms));
  m.impl("_edge_conv_weight_gradient", TORCH_BOX(&crosspoint::binding::weight_gradient));
}
