// Checks of values that bindings make before a kernel runs. Not for kernels: these functions are of no variant.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "crosspoint/parallel.h"

namespace crosspoint {

// Each of lengths (batch,) must be in [0, most].
inline void check_lengths(const char* name, const int64_t* lengths, int64_t batch, int64_t most) {
  for (int64_t b = 0; b < batch; ++b)
    if (lengths[b] < 0 || lengths[b] > most)
      throw std::out_of_range(std::string(name) + "[" + std::to_string(b) + "] is " + std::to_string(lengths[b]) +
                              ": expected a number of points between 0 and " + std::to_string(most));
}

inline void check_cloud_size(int64_t n) {
  if (n > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("a cloud of " + std::to_string(n) + " points: at most 2^31 - 1 are supported");
}

// Throws for the first entry of idx (batch, nodes, k) that is neither -1 nor in [0, n).
inline void check_graph(const char* op, const int64_t* idx, int64_t batch, int64_t nodes, int64_t n, int64_t k,
                        const Parallel& parallel) {
  constexpr int64_t chunk = 4096;
  const int64_t size = batch * nodes * k, chunks = (size + chunk - 1) / chunk;
  std::atomic<int64_t> first{chunks};
  parallel.ranges(chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      uint64_t wrong = 0;  // its sign: of idx + 1 or of n - 1 - idx
      for (int64_t i = c * chunk; i < std::min(size, (c + 1) * chunk); ++i)
        wrong |= (static_cast<uint64_t>(idx[i]) + 1) | (static_cast<uint64_t>(n - 1) - static_cast<uint64_t>(idx[i]));
      if (static_cast<int64_t>(wrong) >= 0) continue;
      int64_t seen = first.load();
      while (c < seen && !first.compare_exchange_weak(seen, c)) {
      }
      return;
    }
  });
  if (first == chunks) return;
  int64_t i = first * chunk;
  while (idx[i] >= -1 && idx[i] < n) ++i;
  throw std::out_of_range(std::string(op) + ": idx[" + std::to_string(i / (nodes * k)) + ", " +
                          std::to_string(i / k % nodes) + ", " + std::to_string(i % k) + "] is " +
                          std::to_string(idx[i]) + ", but it must be -1 (no edge) or in [0, " + std::to_string(n) +
                          "), a row of x");
}

}  // namespace crosspoint
