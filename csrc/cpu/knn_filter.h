// Many channels: a matrix product of the centred cloud gives approximate distances with a proven error; the
// points that may be among the k nearest are then compared by direct differences.
//
// Let x, y be the points, x", y" what is multiplied: centred and rounded (to bfloat16 where the processor
// multiplies those faster). Each point moves by no more than its own loss, so that |x" - y"| is within e of
// |x - y|, e = loss(x) + max_j loss(y_j). The product gives s = |y"|^2 / 2 - x" y", so |x" - y"|^2 =
// 2 s + |x"|^2, and s is within E of its exact value: with u the unit roundoff, C channels and
// reach = |x"| + max_j |y_j"|, rounding of the norms, the product and their difference costs less than
// (2 C + 12) u reach^2 / 2, to first order; E takes twice as much, and pays for products that underflow.
// A distance that is compared in the end is within a factor 1 + (C + 3) u of |x - y|^2.
// So if k points have s <= t, no |x - y| among the k nearest exceeds root = sqrt(2 (t + E) + |x"|^2) + e, but
// for that factor, and all of them have s <= ((root + e)^2 - |x"|^2) / 2 + E.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/knn_bound.h"
#include "crosspoint/knn.h"
#include "knn_distance.h"

namespace crosspoint::CROSSPOINT_ISA {

// ---- what is multiplied

// Whether products are taken in bfloat16.
template <class T>
inline bool products_in_bfloat16() {
#if defined(__AVX512F__)
  return sizeof(T) == 4 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// One point as it is multiplied: squared norm, and squared norm of what rounding lost.
template <class T>
struct Size {
  T norm2, lost2;
};

// out = row - centre, rounded to T; all of `width`, a whole number of vectors.
template <class T>
inline Size<T> centre_row(const T* row, const T* centre, int64_t width, T* out) {
  Vec<T> norm = {};
  for (int64_t c = 0; c < width; c += lanes<T>) {
    const Vec<T> x = load(row + c) - load(centre + c);
    store(out + c, x);
    norm = add_square<T>(norm, x);
  }
  T total = 0;
  for (int lane = 0; lane < lanes<T>; ++lane) total += norm[lane];
  return {total, 0};
}

#if defined(__AVX512F__)
// The same, rounded to bfloat16: out holds pairs of channels, width / 2 of them.
inline Size<float> centre_row_bfloat16(const float* row, const float* centre, int64_t width, float* out) {
  __m512 norm = _mm512_setzero_ps(), lost = _mm512_setzero_ps();
  for (int64_t c = 0; c < width; c += 16) {
    const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(row + c), _mm512_loadu_ps(centre + c));
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(out) + c),
                        _mm512_cvtepi32_epi16(high));
    const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
    const __m512 rest = _mm512_sub_ps(x, rounded);
    norm = _mm512_fmadd_ps(rounded, rounded, norm);
    lost = _mm512_fmadd_ps(rest, rest, lost);
  }
  return {_mm512_reduce_add_ps(norm), _mm512_reduce_add_ps(lost)};
}

// multiply_panels for pairs of bfloat16.
__attribute__((target("avx512bf16"))) inline void multiply_bfloat16(int64_t pairs, const float* a,
                                                                    const float* b,
                                                                    Vec<float> (&acc)[12][2]) {
  __m512 sum[12][2];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, a += 12, b += 32) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i, sizeof pair);
      const __m512bh broadcast = (__m512bh)_mm512_set1_epi32(pair);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], broadcast, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], broadcast, b1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i)
    for (int v = 0; v < 2; ++v) acc[i][v] = reinterpret_cast<Vec<float>>(sum[i][v]);
}
#endif

// ---- the cloud

// One cloud, made ready for `FilteredSearch`.
template <class T>
struct CentredCloud {
  const T* panels;      // what is multiplied, packed as right operands
  const T* half_norms;  // NaN beyond n
  const T* centre;
  Rows<T> rows;         // the points as they are
  double radius, lost;  // the largest norm, and the largest norm of what rounding lost
  bool usable;          // all of it finite, with room to spare
};

template <class T>
struct FilterLayout {
  bool bfloat16;
  int64_t channels, width, depth;                   // depth: of the packed operands, in values of T
  int64_t panels, half_norms, centre, rows, total;  // offsets into the workspace

  FilterLayout(int64_t n, int64_t channels)
      : bfloat16(products_in_bfloat16<T>()),
        channels(channels),
        width(round_up(channels, int64_t(lanes<T>))),
        depth(bfloat16 ? (channels + 1) / 2 : channels) {
    const int64_t padded = round_up(n, kPanel<T>);
    panels = 0;
    half_norms = panels + padded * depth;
    centre = half_norms + padded;
    rows = centre + width;
    total = round_up(rows + (width == channels ? 0 : n * width), int64_t(16));
  }

  Size<T> centre_row(const T* row, const T* middle, T* out) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      if (bfloat16) return centre_row_bfloat16(row, middle, width, out);
#endif
    return CROSSPOINT_ISA::centre_row(row, middle, width, out);
  }

  int64_t row_stride() const { return bfloat16 ? width / 2 : width; }
};

template <class T>
inline void copy_row(const T* source, int64_t channels, int64_t width, T* out) {
  std::copy_n(source, channels, out);
  std::fill_n(out + channels, width - channels, T(0));
}

template <class T>
inline CentredCloud<T> centre_cloud(const T* points, int64_t n, const FilterLayout<T>& layout, T* workspace) {
  const int64_t channels = layout.channels, width = layout.width, depth = layout.depth;
  Rows<T> rows{points, channels};
  if (width != channels) {
    T* copy = workspace + layout.rows;
    for (int64_t j = 0; j < n; ++j) copy_row(points + j * channels, channels, width, copy + j * width);
    rows = {copy, width};
  }
  T* centre = workspace + layout.centre;
  std::fill_n(centre, width, T(0));
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < width; ++c) centre[c] += rows.row(j)[c];
  for (int64_t c = 0; c < width; ++c) centre[c] /= static_cast<T>(std::max<int64_t>(n, 1));

  Buffer<T> centred(kPanel<T> * width);
  T* panel = workspace + layout.panels;
  T* half_norms = workspace + layout.half_norms;
  T largest = 0, lost = 0;
  bool finite = true;
  for (int64_t j = 0; j < n; j += kPanel<T>, panel += depth * kPanel<T>) {
    const int64_t here = std::min(kPanel<T>, n - j);
    for (int64_t i = 0; i < here; ++i) {
      const Size<T> size =
          layout.centre_row(rows.row(j + i), centre, centred.data() + i * layout.row_stride());
      finite = finite && size.norm2 < std::numeric_limits<T>::max() / 64;
      largest = size.norm2 > largest ? size.norm2 : largest;
      lost = size.lost2 > lost ? size.lost2 : lost;
      half_norms[j + i] = size.norm2 / 2;
    }
    std::fill_n(half_norms + j + here, kPanel<T> - here, missing<T>);
    pack_panel(Strided<T>{centred.data(), layout.row_stride(), 1}, here, depth, kPanel<T>, panel);
  }
  return {workspace + layout.panels,
          half_norms,
          centre,
          rows,
          std::sqrt(static_cast<double>(largest)),
          std::sqrt(static_cast<double>(lost)),
          finite};
}

// Searches blocks of queries of one cloud; one per thread.
template <class T>
class FilteredSearch {
 public:
  static constexpr int64_t kBlock = 48;    // queries at a time
  static constexpr int64_t kChunk = 2048;  // points at a time

  FilteredSearch(int64_t k, const FilterLayout<T>& layout, int64_t candidates)
      : k_(k),
        layout_(layout),
        chunk_(round_up(std::clamp<int64_t>(candidates, 1, kChunk), kPanel<T>)),
        nearest_(k, chunk_),
        query_(kBlock * layout.width),
        centred_(kBlock * layout.row_stride()),
        left_(kBlock * layout.depth),
        rows_(kBlock * chunk_),
        position_(chunk_ + lanes<T>),
        exact_(chunk_ + lanes<T>),
        held_value_(candidates > kChunk ? kBlock * k : 0),
        held_index_(candidates > kChunk ? kBlock * k : 0) {
    static_assert(kBlock % Tile<T>::rows == 0);
  }

  // Queries [first, first + count) of a cloud of n points; idx and dist2 point at the first one's row.
  void run(const T* query, int64_t first, int64_t count, const CentredCloud<T>& cloud, int64_t n, Self self,
           int64_t* idx, T* dist2) {
    take_queries(query + first * layout_.channels, count, cloud);
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
  struct Bound : FilterBound {
    bool usable;
  };

  void take_queries(const T* query, int64_t count, const CentredCloud<T>& cloud) {
    constexpr int64_t R = Tile<T>::rows;
    const double unit = std::numeric_limits<T>::epsilon() / 2;
    const double channels = static_cast<double>(layout_.channels);
    for (int64_t q = 0; q < count; ++q) {
      T* row = query_.data() + q * layout_.width;
      copy_row(query + q * layout_.channels, layout_.channels, layout_.width, row);
      const Size<T> size = layout_.centre_row(row, cloud.centre, centred_.data() + q * layout_.row_stride());
      const double norm2 = size.norm2, reach = std::sqrt(norm2) + cloud.radius;
      Bound& bound = bound_[q];
      bound.usable = cloud.usable && norm2 < static_cast<double>(std::numeric_limits<T>::max()) / 64;
      bound.norm2 = norm2;
      bound.moved = 1.001 * (std::sqrt(static_cast<double>(size.lost2)) + cloud.lost + 2 * unit * reach);
      bound.tiny = (2 * channels + 16) * static_cast<double>(std::numeric_limits<T>::min());
      bound.product = (2 * channels + 16) * unit * reach * reach + 4 * bound.tiny;
      bound.direct = 1 + (2 * channels + 16) * unit;
    }
    for (int64_t q = 0; q < count; q += R)
      pack_panel(Strided<T>{centred_.data() + q * layout_.row_stride(), layout_.row_stride(), 1},
                 std::min(R, count - q), layout_.depth, R, left_.data() + q * layout_.depth);
  }

  // rows_[q][j] = s of query q and point begin + j
  void approximate(const CentredCloud<T>& cloud, int64_t begin, int64_t size, int64_t count) {
    constexpr int64_t R = Tile<T>::rows;
    for (int64_t j = 0; j < size; j += kPanel<T>) {
      const T* right = cloud.panels + (begin + j) * layout_.depth;
      for (int64_t q = 0; q < count; q += R)
        approximate_tile(left_.data() + q * layout_.depth, right, cloud.half_norms + begin + j,
                         rows_.data() + q * chunk_ + j);
    }
  }

  // Not inlined: in a larger function the sums would not stay in registers.
  __attribute__((noinline)) void approximate_tile(const T* left, const T* right, const T* half_norms,
                                                  T* out) const {
    constexpr int64_t R = Tile<T>::rows, L = lanes<T>;
    Vec<T> acc[R][Tile<T>::vectors];
    multiply(left, right, acc);
    const Vec<T> norm0 = load(half_norms), norm1 = load(half_norms + L);
#pragma GCC unroll 12
    for (int64_t r = 0; r < R; ++r) {
      store(out + r * chunk_, norm0 - acc[r][0]);
      store(out + r * chunk_ + L, norm1 - acc[r][1]);
    }
  }

  void multiply(const T* left, const T* right, Vec<T> (&acc)[Tile<T>::rows][Tile<T>::vectors]) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      if (layout_.bfloat16) return multiply_bfloat16(layout_.depth, left, right, acc);
#endif
    clear<T>(acc);
    multiply_panels(layout_.depth, left, right, acc);
  }

  // No s of a point that may be among the k nearest exceeds the result, given that k points have s <= t, and
  // that k distances are at most `limit`.
  T cut(const Bound& bound, T t, T limit) const {
    const double s = filter_cut(bound, t, limit);
    return s < static_cast<double>(std::numeric_limits<T>::max()) ? static_cast<T>(s) : infinity<T>;
  }

  void offer_candidates(const CentredCloud<T>& cloud, int64_t q, int64_t begin, int64_t size, int64_t own,
                        Self self) {
    T* row = rows_.data() + q * chunk_;
    const int64_t here = own - begin;  // of the query itself
    const bool own_here = own >= 0 && here >= 0 && here < size;
    int64_t found = 0;
    // A query that is not finite, or too large, is compared with everything.
    if (bound_[q].usable) {
      if (own_here) row[here] = self == Self::first ? -infinity<T> : missing<T>;
      const int64_t padded = round_up(size, kPanel<T>);
      const T bound = cut(bound_[q], bound_of_kth(row, padded, k_), nearest_.limit());
      found = positions_up_to(row, padded, bound, position_.data());
    } else {
      for (int64_t j = 0; j < size; ++j)
        if (!(own_here && j == here && self == Self::left_out)) position_[found++] = static_cast<int32_t>(j);
    }
    for (int64_t i = 0; i < found; ++i) position_[i] += static_cast<int32_t>(begin);
    row_distances(query_.data() + q * layout_.width, cloud.rows, position_.data(), found, exact_.data());
    if (own_here && self == Self::first)
      for (int64_t i = 0; i < found; ++i)
        if (position_[i] == own) exact_[i] = T(-1);
    const int64_t padded = round_up(found, int64_t(lanes<T>));
    std::fill(exact_.data() + found, exact_.data() + padded, missing<T>);
    nearest_.offer(exact_.data(), padded, [&](int32_t p) { return position_[p]; });
  }

  int64_t k_;
  FilterLayout<T> layout_;
  int64_t chunk_;
  Nearest<T> nearest_;
  Buffer<T> query_, centred_, left_, rows_;
  Buffer<int32_t> position_;
  Buffer<T> exact_, held_value_;
  Buffer<int32_t> held_index_;
  Bound bound_[kBlock];
};

}  // namespace crosspoint::CROSSPOINT_ISA
