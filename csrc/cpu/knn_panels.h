// Few channels: every query is compared with every point by direct differences.
#pragma once

#include <cstdint>

#include "crosspoint/knn.h"
#include "knn_distance.h"

namespace crosspoint::CROSSPOINT_ISA {

template <class T>
struct PackedCloud {
  const T* panels;
  bool finite;  // points and queries
};

// Searches queries of one packed cloud; one per thread.
template <class T>
class PanelSearch {
 public:
  static constexpr int64_t kQueries = 4;   // at a time
  static constexpr int64_t kChunk = 2048;  // points at a time: the distances stay in L1

  PanelSearch(int64_t k, int64_t channels, int64_t depth, int64_t candidates)
      : k_(k),
        channels_(channels),
        depth_(depth),
        chunk_(round_up(std::clamp<int64_t>(candidates, 1, kChunk), kPanel<T>)),
        nearest_(k, chunk_),
        query_(kQueries * depth),
        rows_(kQueries * chunk_),
        held_value_(candidates > kChunk ? kQueries * k : 0),
        held_index_(candidates > kChunk ? kQueries * k : 0) {}

  // Queries [first, first + count) of a cloud of n points; idx and dist2 point at the first one's row.
  void run(const T* query, int64_t first, int64_t count, const PackedCloud<T>& cloud, int64_t n, Self self,
           int64_t* idx, T* dist2) {
    for (int64_t q = 0; q < count; q += kQueries)
      run_few(query + (first + q) * channels_, first + q, std::min(kQueries, count - q), cloud, n, self,
              idx + q * k_, dist2 == nullptr ? nullptr : dist2 + q * k_);
  }

 private:
  void run_few(const T* query, int64_t first, int64_t count, const PackedCloud<T>& cloud, int64_t n,
               Self self, int64_t* idx, T* dist2) {
    for (int64_t q = 0; q < kQueries; ++q)
      for (int64_t c = 0; c < depth_; ++c)
        query_[q * depth_ + c] = q < count && c < channels_ ? query[q * channels_ + c] : T(0);
    int64_t held[kQueries] = {};
    for (int64_t begin = 0; begin < n || begin == 0; begin += chunk_) {
      const int64_t size = std::min(chunk_, n - begin), padded = round_up(size, kPanel<T>);
      distances(cloud.panels + begin * depth_, padded / kPanel<T>, cloud.finite);
      for (int64_t q = 0; q < count; ++q) {
        T* row = rows_.data() + q * chunk_;
        std::fill(row + size, row + padded, missing<T>);
        const int64_t here = first + q - begin;  // of the query itself
        if (self != Self::other_set && here >= 0 && here < size)
          row[here] = self == Self::first ? T(-1) : missing<T>;
        nearest_.clear();
        if (begin > 0) nearest_.resume(held_value_.data() + q * k_, held_index_.data() + q * k_, held[q]);
        nearest_.offer(row, padded, [&](int32_t p) { return static_cast<int32_t>(begin) + p; });
        if (begin + chunk_ < n)
          held[q] = nearest_.suspend(held_value_.data() + q * k_, held_index_.data() + q * k_);
        else
          nearest_.write(idx + q * k_, dist2 == nullptr ? nullptr : dist2 + q * k_);
      }
    }
  }

  void distances(const T* panels, int64_t count, bool finite) {
    finite ? distances<true>(panels, count) : distances<false>(panels, count);
  }

  template <bool finite>
  void distances(const T* panels, int64_t count) {
    switch (depth_) {
      case 1:
        return panel_distances<T, 1, kQueries, finite>(panels, count, query_.data(), rows_.data(), chunk_);
      case 2:
        return panel_distances<T, 2, kQueries, finite>(panels, count, query_.data(), rows_.data(), chunk_);
      case 3:
        return panel_distances<T, 3, kQueries, finite>(panels, count, query_.data(), rows_.data(), chunk_);
      case 4:
        return panel_distances<T, 4, kQueries, finite>(panels, count, query_.data(), rows_.data(), chunk_);
      case 6:
        return panel_distances<T, 6, kQueries, finite>(panels, count, query_.data(), rows_.data(), chunk_);
      case 8:
        return panel_distances<T, 8, kQueries, finite>(panels, count, query_.data(), rows_.data(), chunk_);
    }
  }

  int64_t k_, channels_, depth_, chunk_;
  Nearest<T> nearest_;
  Buffer<T> query_, rows_, held_value_;
  Buffer<int32_t> held_index_;
};

// The depth that panels are padded to: zeros beyond the channels add nothing to a distance.
inline int64_t panel_depth(int64_t channels) {
  if (channels <= 4) return std::max<int64_t>(channels, 1);
  return round_up(channels, int64_t(2));
}

}  // namespace crosspoint::CROSSPOINT_ISA
