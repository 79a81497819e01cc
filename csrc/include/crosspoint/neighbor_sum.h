// Sums over neighbours: out_i = sum of x_j over the neighbours j of i.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

// Sums are formed in double, slot after slot, and rounded once; a node without neighbours gets 0.
template <class T>
struct NeighborSumArgs {
  int64_t batch, n, nodes, k, channels;
  const T* x;          // (batch, n, channels)
  const int64_t* idx;  // (batch, nodes, k), checked: -1 or a row of the cloud
  T* out;              // (batch, nodes, channels)
};

// The transpose of that: grad_x_j = sum of grad_i over the nodes i that have j among their neighbours.
template <class T>
struct NeighborSumBackwardArgs {
  int64_t batch, n, nodes, k, channels;
  const T* grad;       // (batch, nodes, channels)
  const int64_t* idx;  // (batch, nodes, k)
  T* grad_x;           // (batch, n, channels)
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(neighbor_sum, NeighborSumArgs<float>)
CROSSPOINT_CPU_KERNEL(neighbor_sum, NeighborSumArgs<double>)
CROSSPOINT_CPU_KERNEL(neighbor_sum_backward, NeighborSumBackwardArgs<float>)
CROSSPOINT_CPU_KERNEL(neighbor_sum_backward, NeighborSumBackwardArgs<double>)
