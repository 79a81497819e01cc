// A shared linear map of points, batch norm over all of them, LeakyReLU, and each cloud's maximum and mean: what follows
// DGCNN's edge convolutions.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

template <class T>
struct ConvBnActPoolLayer {
  int64_t batch, n, c_in, c_out;
  const T* x;              // (batch, n, c_in)
  const int64_t* lengths;  // (batch,), checked: in [0, n]; null: all n. Rows beyond are never read
  const T* weight;         // (c_out, c_in)
  const T* gamma;          // (c_out)
  const T* beta;           // (c_out)
  bool training;           // statistics of this batch
  double negative_slope;
};

// What the forward pass leaves for the backward pass beside its inputs.
template <class T>
struct ConvBnActPoolSaved {
  T* h;               // (batch, n, c_out): weight x; 0 in rows past lengths
  int32_t* winner;    // (batch, c_out): row of the maximum, -1 without rows
  double* mean;       // (c_out)
  double* rstd;       // (c_out)
  double* slope_sum;  // (batch, c_out): sum over the rows of the activation's derivative
  double* slope_dot;  // (batch, c_out): sum of derivative times normalised h
};

template <class T>
struct ConvBnActPoolForwardArgs : ConvBnActPoolLayer<T> {
  T* running_mean;  // (c_out) or null; updated when training
  T* running_var;
  double momentum, eps;
  T* out;  // (batch, 2 c_out): maxima, then means; 0 for a cloud without rows
  // Without a backward pass only mean, rstd and, when training, h are needed; the others are null.
  ConvBnActPoolSaved<T> saved;
};

template <class T>
struct ConvBnActPoolBackwardArgs : ConvBnActPoolLayer<T> {
  const T* grad;  // of out
  ConvBnActPoolSaved<T> saved;
  T* grad_x;       // 0 in rows past lengths; null if not wanted
  T* grad_weight;  // null if not wanted
  T* grad_gamma;
  T* grad_beta;
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(conv_bn_act_pool_forward, ConvBnActPoolForwardArgs<float>)
CROSSPOINT_CPU_KERNEL(conv_bn_act_pool_forward, ConvBnActPoolForwardArgs<double>)
CROSSPOINT_CPU_KERNEL(conv_bn_act_pool_backward, ConvBnActPoolBackwardArgs<float>)
CROSSPOINT_CPU_KERNEL(conv_bn_act_pool_backward, ConvBnActPoolBackwardArgs<double>)
