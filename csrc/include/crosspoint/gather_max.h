// Maxima over neighbours: out_ic = the largest x_jc over the neighbours j of i, and the slot that holds it.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

// Of equal values the lowest slot wins; a NaN wins over every number. A node without neighbours gets 0, slot -1.
template <class T>
struct GatherMaxArgs {
  int64_t batch, n, nodes, k, channels;
  const T* x;          // (batch, n, channels)
  const int64_t* idx;  // (batch, nodes, k), checked: -1 or a row of the cloud
  T* out;              // (batch, nodes, channels)
  int32_t* slot;       // (batch, nodes, channels)
};

// Sums are formed in double and rounded once.
template <class T>
struct GatherMaxBackwardArgs {
  int64_t batch, n, nodes, k, channels;
  const T* grad;        // (batch, nodes, channels)
  const int64_t* idx;
  const int32_t* slot;  // what the forward pass gave
  T* grad_x;            // (batch, n, channels)
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(gather_max, GatherMaxArgs<float>)
CROSSPOINT_CPU_KERNEL(gather_max, GatherMaxArgs<double>)
CROSSPOINT_CPU_KERNEL(gather_max_backward, GatherMaxBackwardArgs<float>)
CROSSPOINT_CPU_KERNEL(gather_max_backward, GatherMaxBackwardArgs<double>)
