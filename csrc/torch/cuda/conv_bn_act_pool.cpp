// The leaves of conv_bn_act_pool on CUDA tensors, as crosspoint/ops/_gpu/_cuda.py declares them. What they are given is
// contiguous and allocated by the orchestrator.
#include "crosspoint/cuda/conv_bn_act_pool.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

cuda::PoolCloud cloud_of(const Tensor& x, const Lengths& lengths) {
  return {x.size(0), x.size(1), x.size(2), x.const_data_ptr(), x.scalar_type() == ScalarType::BFloat16, pointer(lengths)};
}

void sums(const Tensor& x, const Lengths& lengths, Tensor out) {
  const OnDeviceOf device(x);
  const cuda::PoolSumsArgs args{cloud_of(x, lengths), out.size(1), x.scalar_type() == ScalarType::Double,
                                mutable_data<double>(out)};
  throw_if_failed(cuda::conv_bn_act_pool_sums(args, device.stream()), "conv_bn_act_pool: sums");
}

void gram(const Tensor& x, const Lengths& lengths, const Tensor& centre, int64_t product, Tensor gram, Tensor first) {
  const OnDeviceOf device(x);
  const cuda::PoolGramArgs args{cloud_of(x, lengths),    static_cast<cuda::Product>(product), gram.size(0),
                                centre.const_data_ptr(), gram.mutable_data_ptr(),   mutable_data<double>(first)};
  throw_if_failed(cuda::conv_bn_act_pool_gram(args, device.stream()), "conv_bn_act_pool: gram");
}

void pool(const Tensor& x, const Lengths& lengths, const Tensor& centre, const Tensor& weight, const Tensor& gamma,
          const Tensor& scale, const Tensor& shift, int64_t product, Tensor values, Tensor places,
          std::optional<Tensor> mask) {
  const OnDeviceOf device(x);
  const cuda::PoolArgs args{cloud_of(x, lengths),
                            static_cast<cuda::Product>(product),
                            weight.size(0),
                            values.size(2),
                            centre.const_data_ptr(),
                            weight.const_data_ptr(),
                            gamma.const_data_ptr(),
                            scale.const_data_ptr(),
                            shift.const_data_ptr(),
                            values.mutable_data_ptr(),
                            mutable_data<int32_t>(places),
                            mask.has_value() ? mutable_data<int32_t>(*mask) : nullptr};
  throw_if_failed(cuda::conv_bn_act_pool_tiles(args, device.stream()), "conv_bn_act_pool: pool");
}

void finish(const Tensor& values, const Tensor& places, const Lengths& lengths, int64_t n, const Tensor& gamma,
            const Tensor& scale, const Tensor& shift, const Tensor& mean, const Tensor& rstd, double negative_slope,
            Tensor out, std::optional<Tensor> winner, std::optional<Tensor> slopes) {
  const OnDeviceOf device(values);
  with_compute_type(values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::PoolFinishArgs<T> args{values.size(1),
                                       n,
                                       values.size(3),
                                       values.size(2),
                                       data<T>(values),
                                       data<int32_t>(places),
                                       pointer(lengths),
                                       data<T>(gamma),
                                       data<T>(scale),
                                       data<T>(shift),
                                       data<double>(mean),
                                       data<double>(rstd),
                                       negative_slope,
                                       mutable_data<T>(out),
                                       winner.has_value() ? mutable_data<int32_t>(*winner) : nullptr,
                                       slopes.has_value() ? mutable_data<double>(*slopes) : nullptr};
    throw_if_failed(cuda::conv_bn_act_pool_finish(args, device.stream()), "conv_bn_act_pool: finish");
  });
}

void terms(const Tensor& grad, const Tensor& slopes, const Lengths& lengths, int64_t n, const Tensor& count,
           const Tensor& gamma, const Tensor& scale, const Tensor& shift, const Tensor& mean, const Tensor& rstd,
           double negative_slope, bool training, Tensor spread, Tensor affine) {
  const OnDeviceOf device(grad);
  with_compute_type(spread.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::PoolTermsArgs<T> args{spread.size(1),
                                      n,
                                      spread.size(2),
                                      data<T>(grad),
                                      data<double>(slopes),
                                      pointer(lengths),
                                      data<double>(count),
                                      data<T>(gamma),
                                      data<T>(scale),
                                      data<T>(shift),
                                      data<double>(mean),
                                      data<double>(rstd),
                                      negative_slope,
                                      training,
                                      mutable_data<T>(spread),
                                      mutable_data<double>(affine)};
    throw_if_failed(cuda::conv_bn_act_pool_terms(args, device.stream()), "conv_bn_act_pool: terms");
  });
}

void x_gradient(const Tensor& mask, const Tensor& spread, const Tensor& winner, const Tensor& weight, const Tensor& x,
                const Lengths& lengths, const Tensor& centre, std::optional<Tensor> square, int64_t product, Tensor out) {
  const OnDeviceOf device(x);
  const cuda::PoolXGradientArgs args{cloud_of(x, lengths),
                                     static_cast<cuda::Product>(product),
                                     weight.size(0),
                                     data<int32_t>(mask),
                                     data<int32_t>(winner),
                                     spread.const_data_ptr(),
                                     weight.const_data_ptr(),
                                     centre.const_data_ptr(),
                                     square.has_value() ? square->const_data_ptr() : nullptr,
                                     out.mutable_data_ptr()};
  throw_if_failed(cuda::conv_bn_act_pool_x_gradient(args, device.stream()), "conv_bn_act_pool: x_gradient");
}

void weight_gradient(const Tensor& mask, const Tensor& spread, const Tensor& winner, const Tensor& x,
                     const Lengths& lengths, const Tensor& centre, int64_t product, Tensor out) {
  const OnDeviceOf device(x);
  const cuda::PoolWeightGradientArgs args{cloud_of(x, lengths),    static_cast<cuda::Product>(product), out.size(1),
                                          out.size(0),             data<int32_t>(mask),       data<int32_t>(winner),
                                          spread.const_data_ptr(), centre.const_data_ptr(),   out.mutable_data_ptr()};
  throw_if_failed(cuda::conv_bn_act_pool_weight_gradient(args, device.stream()), "conv_bn_act_pool: weight_gradient");
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CUDA, m) {
  m.impl("_conv_bn_act_pool_sums", TORCH_BOX(&crosspoint::binding::sums));
  m.impl("_conv_bn_act_pool_gram", TORCH_BOX(&crosspoint::binding::gram));
  m.impl("_conv_bn_act_pool_pool", TORCH_BOX(&crosspoint::binding::pool));
  m.impl("_conv_bn_act_pool_finish", TORCH_BOX(&crosspoint::binding::finish));
  m.impl("_conv_bn_act_pool_terms", TORCH_BOX(&crosspoint::binding::terms));
  m.impl("_conv_bn_act_pool_x_gradient", TORCH_BOX(&crosspoint::binding::x_gradient));
  m.impl("_conv_bn_act_pool_weight_gradient", TORCH_BOX(&crosspoint::binding::weight_gradient));
}
