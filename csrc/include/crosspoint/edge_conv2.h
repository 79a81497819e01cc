// EdgeConv with two layers: twice a linear map, batch norm over all edges and LeakyReLU on every edge, then the
// maximum over each node's edges.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

// Layer 1 as in EdgeConv: h1 = A x_j + (B - A) x_i. Layer 2: h2 = weight2 a1, of a1 = leaky(norm(h1)). Layer 2 is
// worked on in signed values, so that every maximum is a maximum. Both are centred: x less the cloud's centre, and a1
// less its pivot, what the centre's edge to itself would give; that takes constants of (cloud, channel) from h1 and h2,
// kept in offset1 and offset2.
template <class T>
struct EdgeConv2Layer {
  const T* weight;  // (c_mid, 2 c_in), (c_out, c_mid)
  const T* gamma;   // null, as beta and those of the other layer, without norm
  const T* beta;
  T* running_mean;  // null, or updated when training
  T* running_var;
};

// What the forward pass leaves for the backward pass beside its inputs.
template <class T>
struct EdgeConv2Saved {
  int32_t* out_degree;  // (batch, n): valid edges of node i
  int32_t* in_degree;   // (batch, n): edges that lead to node j
  T* centre;            // (batch, c_in)
  double* offset1;      // (batch, c_mid): added to a centred h1 it gives h1 - mean
  double* rstd1;        // (c_mid), 1 without norm
  double* offset2;      // (batch, c_out): added to a signed, centred h2 it gives the signed h2 - mean
  double* rstd2;        // (c_out)
  T* winner;            // (batch, n, c_out): signed, centred h2 of the winning edge; null if no backward pass follows
  void* slot;           // its slot; null likewise
  int slot_bytes;       // of a slot: 1 (k <= 256) or 4
};

template <class T>
struct EdgeConv2ForwardArgs {
  int64_t batch, n, k, c_in, c_mid, c_out;
  const T* x;          // (batch, n, c_in)
  const int64_t* idx;  // (batch, n, k), checked: -1 or a row of the cloud
  EdgeConv2Layer<T> first, second;
  bool training;     // statistics of this batch; only with norm
  bool first_known;  // when training: the first norm's are in its running_mean and running_var all the same
  double momentum, eps, negative_slope;
  T* out;  // (batch, n, c_out)
  EdgeConv2Saved<T> saved;
};

template <class T>
struct EdgeConv2BackwardArgs {
  int64_t batch, n, k, c_in, c_mid, c_out;
  const T* grad;  // of out
  const T* x;
  const int64_t* idx;
  EdgeConv2Layer<T> first, second;
  bool training, first_known;
  double negative_slope;
  EdgeConv2Saved<T> saved;
  // What the second norm's statistics take from the signed gradient of every edge, scale2 (mean_term + slope_term h2),
  // where they are not of this batch alone; null: of this batch.
  const double* mean_term;   // (batch, c_out)
  const double* slope_term;  // (c_out)
  T* grad_x;        // null if not wanted
  T* grad_weight1;  // those of the norms are null without norm
  T* grad_gamma1;
  T* grad_beta1;
  T* grad_weight2;
  T* grad_gamma2;
  T* grad_beta2;
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(edge_conv2_forward, EdgeConv2ForwardArgs<float>)
CROSSPOINT_CPU_KERNEL(edge_conv2_forward, EdgeConv2ForwardArgs<double>)
CROSSPOINT_CPU_KERNEL(edge_conv2_backward, EdgeConv2BackwardArgs<float>)
CROSSPOINT_CPU_KERNEL(edge_conv2_backward, EdgeConv2BackwardArgs<double>)
