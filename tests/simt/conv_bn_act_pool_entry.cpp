// The leaves of csrc/cuda/conv_bn_act_pool.cu for ctypes, with the arguments of the operators that bind them.
#include "crosspoint/cuda/conv_bn_act_pool.h"

using namespace crosspoint::cuda;

namespace {

template <class F>
int with_type(int64_t is_double, F&& f) {
  return is_double != 0 ? f(double{}) : f(float{});
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int sums(int64_t batch, int64_t n, int64_t c_in, const void* x, int64_t bytes, const int64_t* lengths, int64_t tiles,
         double* out) {
  return conv_bn_act_pool_sums({{batch, n, c_in, x, bytes == 2, lengths}, tiles, bytes == 8, out}, nullptr);
}

int gram(int64_t batch, int64_t n, int64_t c_in, const void* x, int64_t bytes, const int64_t* lengths, const void* centre,
         int64_t product, int64_t parts, void* gram, double* first) {
  return conv_bn_act_pool_gram(
      {{batch, n, c_in, x, bytes == 2, lengths}, static_cast<Product>(product), parts, centre, gram, first}, nullptr);
}

int pool(int64_t batch, int64_t n, int64_t c_in, const void* x, int64_t bytes, const int64_t* lengths, const void* centre,
         const void* weight, const void* gamma, const void* scale, const void* shift, int64_t product, int64_t c_out,
         int64_t tiles, void* values, int32_t* places, int32_t* mask) {
  return conv_bn_act_pool_tiles({{batch, n, c_in, x, bytes == 2, lengths}, static_cast<Product>(product), c_out, tiles, centre,
                                 weight, gamma, scale, shift, values, places, mask},
                                nullptr);
}

int finish(int64_t is_double, int64_t batch, int64_t n, int64_t channels, int64_t tiles, const void* values,
           const int32_t* places, const int64_t* lengths, const void* gamma, const void* scale, const void* shift,
           const double* mean, const double* rstd, double negative_slope, void* out, int32_t* winner, double* slopes) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return conv_bn_act_pool_finish(
        PoolFinishArgs<T>{batch, n, channels, tiles, static_cast<const T*>(values), places, lengths,
                          static_cast<const T*>(gamma), static_cast<const T*>(scale), static_cast<const T*>(shift), mean,
                          rstd, negative_slope, static_cast<T*>(out), winner, slopes},
        nullptr);
  });
}

int terms(int64_t is_double, int64_t batch, int64_t n, int64_t channels, const void* grad, const double* slopes,
          const int64_t* lengths, const double* count, const void* gamma, const void* scale, const void* shift,
          const double* mean, const double* rstd, double negative_slope, int64_t training, void* spread, double* affine) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return conv_bn_act_pool_terms(
        PoolTermsArgs<T>{batch, n, channels, static_cast<const T*>(grad), slopes, lengths, count,
                         static_cast<const T*>(gamma), static_cast<const T*>(scale), static_cast<const T*>(shift), mean, rstd,
                         negative_slope, training != 0, static_cast<T*>(spread), affine},
        nullptr);
  });
}

int x_gradient(int64_t batch, int64_t n, int64_t c_in, const void* x, int64_t bytes, const int64_t* lengths,
               const void* centre, int64_t product, int64_t c_out, const int32_t* mask, const int32_t* winner,
               const void* spread, const void* weight, const void* square, void* out) {
  return conv_bn_act_pool_x_gradient({{batch, n, c_in, x, bytes == 2, lengths}, static_cast<Product>(product), c_out, mask,
                                      winner, spread, weight, centre, square, out},
                                     nullptr);
}

int weight_gradient(int64_t batch, int64_t n, int64_t c_in, const void* x, int64_t bytes, const int64_t* lengths,
                    const void* centre, int64_t product, int64_t c_out, int64_t parts, const int32_t* mask,
                    const int32_t* winner, const void* spread, void* out) {
  return conv_bn_act_pool_weight_gradient({{batch, n, c_in, x, bytes == 2, lengths}, static_cast<Product>(product), c_out, parts,
                                           mask, winner, spread, centre, out},
                                          nullptr);
}

}  // extern "C"
