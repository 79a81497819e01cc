// EdgeConv: linear map of the edges, batch norm over all of them, LeakyReLU and maximum over each node's
// edges.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

// With weight = [A | B], the edge from node i to its neighbour j carries h = A x_j + (B - A) x_i. Both passes
// work on the channels' signed values: channels of negative gamma are negated throughout, so that every
// maximum is a maximum. Inside, clouds are centred: x - centre; what that takes from h is a constant of
// (cloud, channel), kept in `offset`.

// What the forward pass leaves for the backward pass beside its inputs. The node arrays are (batch, n,
// c_out).
template <class T>
struct EdgeConvSaved {
  int32_t* out_degree;  // (batch, n): valid edges of node i
  int32_t* in_degree;   // (batch, n): edges that lead to node j
  T* centre;            // (batch, c_in)
  double* offset;       // (batch, c_out): added to a signed, centred h it gives the signed h - mean
  double* rstd;         // (c_out), 1 without norm
  T* winner;            // signed, centred h of the winning edge; null if no backward pass follows
  void* slot;           // its slot; null likewise
  int slot_bytes;       // of a slot: 1 (k <= 256) or 4
  T* out_sum;           // sum of h over the edges of node i; null unless training
  T* in_sum;            // sum of h over the edges that lead to node j; null unless training
};

template <class T>
struct EdgeConvForwardArgs {
  int64_t batch, n, k, c_in, c_out;
  const T* x;          // (batch, n, c_in)
  const int64_t* idx;  // (batch, n, k), checked: -1 or a row of the cloud
  const T* weight;     // (c_out, 2 c_in)
  const T* gamma;      // (c_out); null, as beta, without norm
  const T* beta;
  T* running_mean;  // (c_out) or null; updated when training
  T* running_var;
  bool training;  // statistics of this batch; only with norm
  double momentum, eps, negative_slope;
  T* out;  // (batch, n, c_out)
  EdgeConvSaved<T> saved;
};

template <class T>
struct EdgeConvBackwardArgs {
  int64_t batch, n, k, c_in, c_out;
  const T* grad;  // of out
  const T* x;
  const int64_t* idx;
  const T* weight;
  const T* gamma;
  const T* beta;
  bool training;
  double negative_slope;
  EdgeConvSaved<T> saved;
  T* grad_x;       // null if not wanted
  T* grad_weight;  // null if not wanted
  T* grad_gamma;   // null without norm
  T* grad_beta;
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(edge_conv_forward, EdgeConvForwardArgs<float>)
CROSSPOINT_CPU_KERNEL(edge_conv_forward, EdgeConvForwardArgs<double>)
CROSSPOINT_CPU_KERNEL(edge_conv_backward, EdgeConvBackwardArgs<float>)
CROSSPOINT_CPU_KERNEL(edge_conv_backward, EdgeConvBackwardArgs<double>)
