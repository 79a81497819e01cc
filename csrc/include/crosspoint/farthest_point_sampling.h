// Farthest point sampling in each cloud of a batch.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

// Row b of idx begins with `start`; each next entry is the point of cloud b, not in the row yet, that is farthest
// from those in the row; of equal ones the first. Squared differences are summed in T; a NaN distance counts as
// +inf. Entries beyond the points that exist are -1.
template <class T>
struct FarthestPointSamplingArgs {
  const T* points;         // (batch, n, channels)
  const int64_t* lengths;  // (batch,) or null: all; `start` must be below each that is not 0
  int64_t batch, n, channels, m, start;
  int64_t* idx;  // (batch, m)
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(farthest_point_sampling, FarthestPointSamplingArgs<float>)
CROSSPOINT_CPU_KERNEL(farthest_point_sampling, FarthestPointSamplingArgs<double>)
