// k nearest neighbours in each cloud of a batch.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

enum class Self {
  other_set,
  first,
  left_out
};  // what a query is to the points: no point of theirs; point 0 of its row; dropped

// For query (b, i), the k points of cloud b that come first by (squared distance, index). Squared differences
// are summed in T; a NaN distance counts as +inf. Entries beyond what exists, and rows beyond lengths_query,
// are -1 (distance +inf).
template <class T>
struct KnnArgs {
  const T* query;   // (batch, queries, channels)
  const T* points;  // (batch, candidates, channels); the same memory as query unless self is other_set
  const int64_t* lengths_query;   // (batch,) or null: all
  const int64_t* lengths_points;  // (batch,) or null: all
  int64_t batch, queries, candidates, channels, k;
  Self self;
  int64_t* idx;  // (batch, queries, k)
  T* dist2;      // (batch, queries, k) or null: not wanted
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(knn, KnnArgs<float>)
CROSSPOINT_CPU_KERNEL(knn, KnnArgs<double>)
