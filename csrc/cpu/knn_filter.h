// Many channels: a matrix product of the centred cloud gives approximate distances with a proven error; the
// points that may be among the k nearest are then compared by direct differences.
//
// With x' = fl(x - c), any c, the product gives s_ij = |y_j'|^2 / 2 - x_i' y_j' and the distance is d_ij = 2
// s_ij + |x_i'|^2. Let u be the unit roundoff, X = |x_i'|, Y = max_j |y_j'|, C channels. Rounding of the
// norm, the product and their difference moves s by at most (C + 3) u (Y^2 / 2 + X Y) <= (C + 3) u (X + Y)^2
// / 2; centring moves each point by at most u X or u Y, hence d by 2 u (X + Y)^2; summing the direct
// differences moves d by at most (C + 2) u (X + Y)^2. Half of the distance that is compared in the end is
// therefore within E = (C + 4) u (X + Y)^2 of s_ij + X^2 / 2, to first order; C + 8 leaves room for the
// higher orders and for rounding in the bounds themselves, and products that underflow are paid for
// separately. If k points have s <= t, the k nearest have s <= t + 2 E.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "crosspoint/knn.h"
#include "knn_distance.h"

namespace crosspoint::CROSSPOINT_ISA {

// One cloud, made ready for `FilteredSearch`.
template <class T>
struct CentredCloud {
  const T* panels;      // the centred points, packed as right operands
  const T* half_norms;  // of the centred points, NaN beyond n
  const T* centre;
  Rows<T> rows;   // the points as they are
  double radius;  // the largest norm
  bool usable;    // all of it finite, with room to spare
};

template <class T>
struct FilterLayout {
  int64_t n, channels, width;
  int64_t panels, half_norms, centre, rows, total;  // offsets into the workspace

  FilterLayout(int64_t n, int64_t channels)
      : n(n), channels(channels), width(round_up(channels, int64_t(lanes<T>))) {
    const int64_t padded = round_up(n, kPanel<T>);
    panels = 0;
    half_norms = panels + padded * channels;
    centre = half_norms + padded;
    rows = centre + width;
    total = round_up(rows + (width == channels ? 0 : n * width), int64_t(16));
  }
};

template <class T>
inline void copy_row(const T* source, int64_t channels, int64_t width, T* out) {
  std::copy_n(source, channels, out);
  std::fill_n(out + channels, width - channels, T(0));
}

template <class T>
inline CentredCloud<T> centre_cloud(const T* points, int64_t n, const FilterLayout<T>& layout, T* workspace) {
  const int64_t channels = layout.channels;
  T* centre = workspace + layout.centre;
  std::fill_n(centre, layout.width, T(0));
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < channels; ++c) centre[c] += points[j * channels + c];
  for (int64_t c = 0; c < channels; ++c) centre[c] /= static_cast<T>(std::max<int64_t>(n, 1));

  T* panel = workspace + layout.panels;
  T* half_norms = workspace + layout.half_norms;
  T largest = 0;
  bool finite = true;
  for (int64_t j = 0; j < n; j += kPanel<T>, panel += channels * kPanel<T>) {
    const int64_t width = std::min(kPanel<T>, n - j);
    pack_panel(Strided<T>{points + j * channels, channels, 1}, width, channels, kPanel<T>, panel);
    Vec<T> norm[2] = {};
    for (int64_t c = 0; c < channels; ++c)
      for (int v = 0; v < 2; ++v) {
        T* at = panel + c * kPanel<T> + v * lanes<T>;
        const Vec<T> x = load(at) - splat(centre[c]);
        store(at, x);
        norm[v] += x * x;
      }
    store(half_norms + j, norm[0] * T(0.5));
    store(half_norms + j + lanes<T>, norm[1] * T(0.5));
    for (int64_t i = 0; i < width; ++i) {
      const T half = half_norms[j + i];
      finite = finite && half < std::numeric_limits<T>::max() / 64;
      largest = half > largest ? half : largest;
    }
    std::fill_n(half_norms + j + width, kPanel<T> - width, missing<T>);
  }
  Rows<T> rows{points, channels};
  if (layout.width != channels) {
    T* copy = workspace + layout.rows;
    for (int64_t j = 0; j < n; ++j)
      copy_row(points + j * channels, channels, layout.width, copy + j * layout.width);
    rows = {copy, layout.width};
  }
  return {workspace + layout.panels,
          half_norms,
          centre,
          rows,
          std::sqrt(2.0 * static_cast<double>(largest)),
          finite};
}

// Searches blocks of queries of one cloud; one per thread.
template <class T>
class FilteredSearch {
 public:
  static constexpr int64_t kBlock = 48;    // queries at a time
  static constexpr int64_t kChunk = 2048;  // points at a time

  FilteredSearch(int64_t k, int64_t channels, int64_t candidates)
      : k_(k),
        channels_(channels),
        width_(round_up(channels, int64_t(lanes<T>))),
        chunk_(round_up(std::clamp<int64_t>(candidates, 1, kChunk), kPanel<T>)),
        chunked_(candidates > kChunk),
        nearest_(k, chunk_),
        left_(kBlock * channels),
        query_(kBlock * width_),
        rows_(kBlock * chunk_),
        position_(chunk_ + lanes<T>),
        exact_(chunk_ + lanes<T>),
        held_value_(chunked_ ? kBlock * k : 0),
        held_index_(chunked_ ? kBlock * k : 0) {
    static_assert(kBlock % Tile<T>::rows == 0);
  }

  // Queries [first, first + count) of a cloud of n points; idx and dist2 point at the first one's row.
  void run(const T* query, int64_t first, int64_t count, const CentredCloud<T>& cloud, int64_t n, Self self,
           int64_t* idx, T* dist2) {
    take_queries(query + first * channels_, count, cloud);
    int64_t held[kBlock] = {};
    for (int64_t begin = 0; begin < n || begin == 0; begin += chunk_) {
      const int64_t size = std::min(chunk_, n - begin);
      if (cloud.usable) approximate(cloud, begin, round_up(size, kPanel<T>), count);
      for (int64_t q = 0; q < count; ++q) {
        nearest_.clear();
        if (begin > 0) nearest_.resume(held_value_.data() + q * k_, held_index_.data() + q * k_, held[q]);
        offer_candidates(cloud, q, begin, size, self == Self::other_set ? -1 : first + q, self);
        if (begin + chunk_ < n)
          held[q] = nearest_.suspend(held_value_.data() + q * k_, held_index_.data() + q * k_);
        else
          nearest_.write(idx + q * k_, dist2 == nullptr ? nullptr : dist2 + q * k_);
      }
    }
  }

 private:
  void take_queries(const T* query, int64_t count, const CentredCloud<T>& cloud) {
    constexpr int64_t R = Tile<T>::rows;
    for (int64_t q = 0; q < count; ++q)
      copy_row(query + q * channels_, channels_, width_, query_.data() + q * width_);
    for (int64_t q = 0; q < round_up(count, R); ++q) {
      T* packed = left_.data() + q / R * R * channels_ + q % R;
      double norm = 0;
      for (int64_t c = 0; c < channels_; ++c) {
        const T x = q < count ? query_[q * width_ + c] - cloud.centre[c] : T(0);
        packed[c * R] = x;
        norm += static_cast<double>(x) * static_cast<double>(x);
      }
      if (q >= count) continue;
      const double reach = std::sqrt(norm) + cloud.radius;
      const double unit = std::numeric_limits<T>::epsilon() / 2;
      norm_[q] = norm;
      error_[q] = static_cast<double>(channels_ + 8) *
                  (1.01 * unit * reach * reach + 4.0 * static_cast<double>(std::numeric_limits<T>::min()));
    }
  }

  // rows_[q][j] = s of query q and point begin + j
  void approximate(const CentredCloud<T>& cloud, int64_t begin, int64_t size, int64_t count) {
    constexpr int64_t R = Tile<T>::rows, L = lanes<T>;
    for (int64_t j = 0; j < size; j += kPanel<T>) {
      const T* right = cloud.panels + (begin + j) * channels_;
      const Vec<T> norm0 = load(cloud.half_norms + begin + j), norm1 = load(cloud.half_norms + begin + j + L);
      for (int64_t q = 0; q < count; q += R) {
        Vec<T> acc[R][2] = {};
        multiply_panels(channels_, left_.data() + q * channels_, right, acc);
        T* out = rows_.data() + q * chunk_ + j;
        for (int64_t r = 0; r < R; ++r, out += chunk_) {
          store(out, norm0 - acc[r][0]);
          store(out + L, norm1 - acc[r][1]);
        }
      }
    }
  }

  void offer_candidates(const CentredCloud<T>& cloud, int64_t q, int64_t begin, int64_t size, int64_t own,
                        Self self) {
    T* row = rows_.data() + q * chunk_;
    const int64_t here = own - begin;  // of the query itself
    const bool own_here = own >= 0 && here >= 0 && here < size;
    int64_t found = 0;
    // A query that is not finite, or too large, is compared with everything.
    if (cloud.usable && error_[q] < static_cast<double>(std::numeric_limits<T>::max()) / 64) {
      if (own_here) row[here] = self == Self::first ? -infinity<T> : missing<T>;
      const int64_t padded = round_up(size, kPanel<T>);
      const double limit = nearest_.limit();
      double cut = static_cast<double>(bound_of_kth(row, padded, k_)) + 2 * error_[q];
      cut = std::min(cut, (limit - norm_[q]) / 2 + error_[q]);
      found = positions_up_to(row, padded, static_cast<T>(cut), position_.data());
    } else {
      for (int64_t j = 0; j < size; ++j)
        if (!(own_here && j == here && self == Self::left_out)) position_[found++] = static_cast<int32_t>(j);
    }
    for (int64_t i = 0; i < found; ++i) position_[i] += static_cast<int32_t>(begin);
    row_distances(query_.data() + q * width_, cloud.rows, position_.data(), found, exact_.data());
    if (own_here && self == Self::first)
      for (int64_t i = 0; i < found; ++i)
        if (position_[i] == own) exact_[i] = T(-1);
    const int64_t padded = round_up(found, int64_t(lanes<T>));
    std::fill(exact_.data() + found, exact_.data() + padded, missing<T>);
    nearest_.offer(exact_.data(), padded, position_.data());
  }

  int64_t k_, channels_, width_, chunk_;
  bool chunked_;
  Nearest<T> nearest_;
  Buffer<T> left_, query_, rows_;
  Buffer<int32_t> position_;
  Buffer<T> exact_, held_value_;
  Buffer<int32_t> held_index_;
  double norm_[kBlock], error_[kBlock];
};

}  // namespace crosspoint::CROSSPOINT_ISA
