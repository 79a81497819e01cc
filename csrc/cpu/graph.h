// Degrees of a cloud's graph, and the graph turned around.
#pragma once

#include <cstdint>

#include "buffer.h"

namespace crosspoint::CROSSPOINT_ISA {

// The graph of every cloud turned around: the nodes whose edges lead to node j are from[start[j]] ...
// from[start[j + 1] - 1], ascending.
struct ReverseGraph {
  Buffer<int64_t> start;  // (batch, n + 1)
  Buffer<int32_t> from;   // (batch, nodes k)
};

inline void reverse_cloud(int64_t nodes, int64_t n, int64_t k, const int64_t* idx, const int32_t* in_degree,
                          int64_t* start, int32_t* from) {
  start[0] = 0;
  for (int64_t j = 0; j < n; ++j) start[j + 1] = start[j] + in_degree[j];
  // start[j] walks through j's range while that is filled, and so ends where the next one begins.
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t s = 0; s < k; ++s)
      if (const int64_t j = idx[i * k + s]; j >= 0) from[start[j]++] = static_cast<int32_t>(i);
  for (int64_t j = n; j > 0; --j) start[j] = start[j - 1];
  start[0] = 0;
}

// Degrees of one cloud; returns its number of edges.
inline int64_t count_degrees(int64_t n, int64_t k, const int64_t* idx, int32_t* out_degree,
                             int32_t* in_degree) {
  for (int64_t j = 0; j < n; ++j) in_degree[j] = 0;
  int64_t edges = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t degree = 0;
    for (int64_t s = 0; s < k; ++s)
      if (const int64_t j = idx[i * k + s]; j >= 0) {
        ++in_degree[j];
        ++degree;
      }
    out_degree[i] = degree;
    edges += degree;
  }
  return edges;
}

}  // namespace crosspoint::CROSSPOINT_ISA
