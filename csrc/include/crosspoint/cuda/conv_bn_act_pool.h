// What conv_bn_act_pool does on an NVIDIA GPU: docs/derivations/conv_bn_act_pool.md. Arrays are contiguous, in device
// memory; launchers enqueue, allocate nothing and never wait. x is centred as it is loaded, x' = x - centre, and rows
// past `lengths`, which are clamped, count as zeros; h = x' weight^T.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "crosspoint/cuda/product.h"

namespace crosspoint::cuda {

struct PoolCloud {
  int64_t batch, n, c_in;
  const void* x;           // (batch, n, c_in): double for float64, else float, or bfloat16 for bf16
  bool half;               // x is bfloat16
  const int64_t* lengths;  // (batch,) or null
};

// out (batch, tiles, 2, c_in): over the rows of each tile, x and its square.
struct PoolSumsArgs {
  PoolCloud cloud;
  int64_t tiles;
  bool wide;  // x is double
  double* out;
};
cudaError_t conv_bn_act_pool_sums(const PoolSumsArgs&, cudaStream_t);

// Sums over a part of the rows of x' x'^T, x' rounded as the product takes it, and of x'. T: double for float64.
struct PoolGramArgs {
  PoolCloud cloud;
  Product product;
  int64_t parts;
  const void* centre;  // (c_in) T
  void* gram;          // (parts, c_in, c_in) T
  double* first;       // (parts, c_in)
};
cudaError_t conv_bn_act_pool_gram(const PoolGramArgs&, cudaStream_t);

// Of h of each tile of rows and channel.
struct PoolArgs {
  PoolCloud cloud;
  Product product;
  int64_t c_out, tiles;  // tiles of 128 rows, of float64 32
  const void* centre;    // (c_in) T
  const void* weight;    // (c_out, c_in) T, bfloat16 for bf16
  const void* gamma;     // (c_out) T: where it is 0, every h counts as 0 in the maximum
  const void* scale;     // (c_out) T
  const void* shift;     // (c_out) T
  void* values;          // (3, batch, tiles, c_out) T: h of the winner, the sum of h, its sum where z = scale h + shift > 0
  int32_t* places;       // (2, batch, tiles, c_out): the winner's row (-1: no row), how many z > 0
  int32_t* mask;         // (batch, n, ceil(c_out / 32)): bit c % 32 of word c / 32 is z > 0 of channel c; or null
};
cudaError_t conv_bn_act_pool_tiles(const PoolArgs&, cudaStream_t);

// The tiles joined cloud by cloud.
template <class T>
struct PoolFinishArgs {
  int64_t batch, n, channels, tiles;
  const T* values;
  const int32_t* places;
  const int64_t* lengths;
  const T *gamma, *scale, *shift;
  const double *mean, *rstd;  // (channels), of h
  double negative_slope;
  T* out;           // (batch, 2 channels): maxima and means of leaky(z), 0 without rows
  int32_t* winner;  // (batch, channels), or null
  double* slopes;   // (3, batch, channels): sums of leaky'(z) and leaky'(z) (h - mean) rstd, h of the winner; or null
};
cudaError_t conv_bn_act_pool_finish(const PoolFinishArgs<float>&, cudaStream_t);
cudaError_t conv_bn_act_pool_finish(const PoolFinishArgs<double>&, cudaStream_t);

// dh = g - affine[2] h, g = (z > 0 ? spread[0] : spread[1]) + [the row wins] spread[2].
template <class T>
struct PoolTermsArgs {
  int64_t batch, n, channels;
  const T* grad;  // (batch, 2 channels)
  const double* slopes;
  const int64_t* lengths;
  const double* count;  // rows of all clouds
  const T *gamma, *scale, *shift;
  const double *mean, *rstd;
  double negative_slope;
  bool training;
  T* spread;       // (3, batch, channels)
  double* affine;  // (3, channels): gradients of |gamma| and beta, and the factor of h, which only training writes
};
cudaError_t conv_bn_act_pool_terms(const PoolTermsArgs<float>&, cudaStream_t);
cudaError_t conv_bn_act_pool_terms(const PoolTermsArgs<double>&, cudaStream_t);

// out (batch, n, c_in) = g weight + x' square, 0 in rows past lengths.
struct PoolXGradientArgs {
  PoolCloud cloud;
  Product product;
  int64_t c_out;
  const int32_t *mask, *winner;
  const void* spread;  // (3, batch, c_out) T
  const void* weight;  // as in PoolArgs
  const void* centre;
  const void* square;  // (c_in, c_in), symmetric, in the weight's type; or null
  void* out;           // in the type of x
};
cudaError_t conv_bn_act_pool_x_gradient(const PoolXGradientArgs&, cudaStream_t);

// out (parts, c_out, c_in) T = g^T x', summed over a part of the rows.
struct PoolWeightGradientArgs {
  PoolCloud cloud;
  Product product;
  int64_t c_out, parts;
  const int32_t *mask, *winner;
  const void* spread;
  const void* centre;
  void* out;
};
cudaError_t conv_bn_act_pool_weight_gradient(const PoolWeightGradientArgs&, cudaStream_t);

}  // namespace crosspoint::cuda
