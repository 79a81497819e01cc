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

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(neighbor_sum, NeighborSumArgs<float>)
CROSSPOINT_CPU_KERNEL(neighbor_sum, NeighborSumArgs<double>)
