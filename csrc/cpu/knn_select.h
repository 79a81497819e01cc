// Selection of the k smallest by (value, index), without heaps: a bound from group minima lets few candidates
// through, which are then ranked by counting. Rows of values hold NaN where nothing exists.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/neighbours.h"
#include "gemm.h"
#include "vec.h"

namespace crosspoint::CROSSPOINT_ISA {

template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();

template <class T>
inline int64_t round_up(int64_t n, T multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Elementwise minimum; where value is NaN the result is other.
template <class T>
inline Vec<T> least(Vec<T> value, Vec<T> other) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Vec<T>>(
        _mm512_min_ps(reinterpret_cast<__m512>(value), reinterpret_cast<__m512>(other)));
  else
    return reinterpret_cast<Vec<T>>(
        _mm512_min_pd(reinterpret_cast<__m512d>(value), reinterpret_cast<__m512d>(other)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Vec<T>>(
        _mm256_min_ps(reinterpret_cast<__m256>(value), reinterpret_cast<__m256>(other)));
  else
    return reinterpret_cast<Vec<T>>(
        _mm256_min_pd(reinterpret_cast<__m256d>(value), reinterpret_cast<__m256d>(other)));
#else
  return value < other ? value : other;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For every mask of 8 bits, the positions of its set bits, as bytes.
struct BitPositions {
  uint64_t bytes[256];
};

constexpr BitPositions bit_positions() {
  BitPositions table{};
  for (int mask = 0; mask < 256; ++mask) {
    int count = 0;
    for (int bit = 0; bit < 8; ++bit)
      if (mask >> bit & 1) table.bytes[mask] |= static_cast<uint64_t>(bit) << 8 * count++;
  }
  return table;
}

static constexpr BitPositions kBitPositions = bit_positions();
#endif

// Writes the positions p in [0, n) with row[p] <= bound, ascending; n is a multiple of lanes<T> and `out` has
// room for that many more than the result, which is their number.
template <class T>
inline int64_t positions_up_to(const T* row, int64_t n, T bound, int32_t* out) {
  int64_t count = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 limit = _mm512_set1_ps(bound);
    __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i step = _mm512_set1_epi32(16);
    for (int64_t p = 0; p < n; p += 16) {
      const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_loadu_ps(row + p), limit, _CMP_LE_OQ);
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(kept, position));
      count += __builtin_popcount(kept);
      position = _mm512_add_epi32(position, step);
    }
  } else {
    const __m512d limit = _mm512_set1_pd(bound);
    __m256i position = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i step = _mm256_set1_epi32(8);
    for (int64_t p = 0; p < n; p += 8) {
      const __mmask8 kept = _mm512_cmp_pd_mask(_mm512_loadu_pd(row + p), limit, _CMP_LE_OQ);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + count),
                          _mm256_maskz_compress_epi32(kept, position));
      count += __builtin_popcount(kept);
      position = _mm256_add_epi32(position, step);
    }
  }
#elif defined(__AVX2__)
  for (int64_t p = 0; p < n; p += lanes<T>) {
    int kept;
    if constexpr (sizeof(T) == 4)
      kept = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(row + p), _mm256_set1_ps(bound), _CMP_LE_OQ));
    else
      kept = _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(row + p), _mm256_set1_pd(bound), _CMP_LE_OQ));
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(kBitPositions.bytes[kept]));
    const int32_t base = static_cast<int32_t>(p);
    if constexpr (sizeof(T) == 4)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + count),
                          _mm256_add_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(base)));
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + count),
                       _mm_add_epi32(_mm_cvtepu8_epi32(bytes), _mm_set1_epi32(base)));
    count += __builtin_popcount(static_cast<unsigned>(kept));
  }
#else
  for (int64_t p = 0; p < n; ++p) {
    out[count] = static_cast<int32_t>(p);
    count += row[p] <= bound;
  }
#endif
  return count;
}

// The k-th smallest of `groups` values (a multiple of lanes<T>).
template <class T>
inline T kth_smallest_of_groups(const T* minima, int64_t groups, int64_t k) {
  T found = infinity<T>;
  for (int64_t v = 0; v < groups; v += lanes<T>) {
    const Vec<T> x = load(minima + v);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      const __m512 values = reinterpret_cast<__m512>(x);
      __m512i at_most = _mm512_setzero_si512();
      const __m512i one = _mm512_set1_epi32(1);
      for (int64_t j = 0; j < groups; ++j)
        at_most = _mm512_mask_add_epi32(
            at_most, _mm512_cmp_ps_mask(_mm512_set1_ps(minima[j]), values, _CMP_LE_OQ), at_most, one);
      const __mmask16 enough =
          _mm512_cmp_epi32_mask(at_most, _mm512_set1_epi32(static_cast<int>(k)), _MM_CMPINT_NLT);
      found = std::min(found, _mm512_mask_reduce_min_ps(enough, values));
      continue;
    }
#endif
    decltype(x < x) at_most = {};
    for (int64_t j = 0; j < groups; ++j) at_most -= splat(minima[j]) <= x;
    for (int lane = 0; lane < lanes<T>; ++lane)
      if (at_most[lane] >= k && x[lane] < found) found = x[lane];
  }
  return found;
}

// At least k of row[0, n) are <= the result, which is +inf where that cannot be told. n is a multiple of
// lanes<T>.
template <class T, int V>
inline T bound_from_minima(const T* row, int64_t n, int64_t k) {
  constexpr int L = lanes<T>;
  Vec<T> minima[V];
  for (int v = 0; v < V; ++v) minima[v] = splat(infinity<T>);
  int64_t p = 0;
  for (; p + V * L <= n; p += V * L)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) minima[v] = least<T>(load(row + p + v * L), minima[v]);
  for (int v = 0; p < n; p += L, ++v) minima[v] = least<T>(load(row + p), minima[v]);
  alignas(64) T groups[V * L];
  for (int v = 0; v < V; ++v) store(groups + v * L, minima[v]);
  return kth_smallest_of_groups(groups, V * L, k);
}

// The same by halving the range of floating-point numbers until at most k + k / 4 values are left, or one
// number.
template <class T>
inline T bound_by_bisection(const T* row, int64_t n, int64_t k) {
  using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const auto key = [](T value) {
    Key bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? static_cast<Key>(bits ^ std::numeric_limits<Key>::max()) : bits;
  };
  const auto number = [](Key order) {
    const Key bits = order < 0 ? static_cast<Key>(order ^ std::numeric_limits<Key>::max()) : order;
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const auto up_to = [&](T bound) {
    decltype(Vec<T>{} < Vec<T>{}) at_most = {};
    for (int64_t p = 0; p < n; p += lanes<T>) at_most -= load(row + p) <= splat(bound);
    int64_t total = 0;
    for (int lane = 0; lane < lanes<T>; ++lane) total += at_most[lane];
    return total;
  };
  Key low = key(-infinity<T>) - 1,
      high = key(infinity<T>);  // fewer than k up to low; at least k up to high, or high is +inf
  while (high - 1 > low) {
    const Key middle = (low & high) + ((low ^ high) >> 1);
    const int64_t count = up_to(number(middle));
    (count < k ? low : high) = middle;
    if (count >= k && count <= k + k / 4) break;
  }
  return number(high);
}

// An upper bound of the k-th smallest of the row; about 1.5 k values are below it in rows in random order.
template <class T>
inline T bound_of_kth(const T* row, int64_t n, int64_t k) {
  constexpr int unit = 32 / lanes<T>;  // vectors that make 32 groups
  if (k <= 22) return bound_from_minima<T, unit>(row, n, k);
  if (k <= 44) return bound_from_minima<T, 2 * unit>(row, n, k);
  if (k <= 88) return bound_from_minima<T, 4 * unit>(row, n, k);
  return bound_by_bisection(row, n, k);
}

// rank[i] = how many of value[0, n) precede value[i], equal values in the order that they stand in. Both have
// room for n rounded up to lanes<T>.
template <class T>
inline void rank_by_counting(const T* value, int64_t n, int32_t* rank) {
  constexpr int L = lanes<T>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i one = _mm512_set1_epi32(1);
    for (int64_t w = 0; w < n; w += 16) {
      const __m512 x = _mm512_loadu_ps(value + w);
      __m512i count = _mm512_setzero_si512();
      int64_t j = 0;
      for (; j < w; ++j)
        count = _mm512_mask_add_epi32(count, _mm512_cmp_ps_mask(_mm512_set1_ps(value[j]), x, _CMP_LE_OQ),
                                      count, one);
      const int64_t end = std::min(n, w + 16);
      for (unsigned later = 0xfffe; j < end; ++j, later <<= 1) {
        const __m512 other = _mm512_set1_ps(value[j]);
        const __mmask16 before = _mm512_cmp_ps_mask(other, x, _CMP_LT_OQ) |
                                 _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(later), other, x, _CMP_LE_OQ);
        count = _mm512_mask_add_epi32(count, before, count, one);
      }
      for (; j < n; ++j)
        count = _mm512_mask_add_epi32(count, _mm512_cmp_ps_mask(_mm512_set1_ps(value[j]), x, _CMP_LT_OQ),
                                      count, one);
      _mm512_storeu_si512(rank + w, count);
    }
    return;
  }
#endif
  using Mask = decltype(Vec<T>{} < Vec<T>{});
  Mask lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  for (int64_t w = 0; w < n; w += L) {
    const Vec<T> x = load(value + w);
    Mask count = {};
    int64_t j = 0;
    for (; j < w; ++j) count -= splat(value[j]) <= x;
    const int64_t end = std::min<int64_t>(n, w + L);
    for (; j < end; ++j) {
      const Vec<T> other = splat(value[j]);
      const Mask own = Mask{} + static_cast<decltype(lane[0] + 0)>(j - w);
      count -= (other < x) | ((other == x) & (lane > own));
    }
    for (; j < n; ++j) count -= splat(value[j]) < x;
    for (int i = 0; i < L; ++i) rank[w + i] = static_cast<int32_t>(count[i]);
  }
}

// The k nearest of one query, fed piece by piece.
template <class T>
class Nearest {
 public:
  // No piece is longer than `longest` values.
  Nearest(int64_t k, int64_t longest)
      : k_(k),
        room_(k + kSlack + round_up(longest, int64_t(lanes<T>)) + lanes<T>),
        position_(room_),
        index_(room_),
        value_(room_),
        spare_index_(room_),
        spare_value_(room_) {}

  void clear() {
    count_ = 0;
    held_ = 0;
  }

  // Takes up a search where `suspend` left it.
  void resume(const T* value, const int32_t* index, int64_t held) {
    std::copy_n(value, held, value_.data());
    std::copy_n(index, held, index_.data());
    count_ = held_ = held;
  }

  // Writes the nearest so far, at most k, and returns how many they are.
  int64_t suspend(T* value, int32_t* index) {
    settle();
    std::copy_n(value_.data(), held_, value);
    std::copy_n(index_.data(), held_, index);
    return held_;
  }

  // A value that none of the k nearest exceeds.
  T limit() const { return held_ == k_ ? value_[k_ - 1] : infinity<T>; }

  // Offers the values of the points base + p. Pieces come in ascending order of index; n is a multiple of
  // lanes<T>.
  void offer(const T* row, int64_t n, int64_t base) {
    const int64_t found = gather_candidates(row, n);
    for (int64_t i = 0; i < found; ++i) index_[count_ + i] = static_cast<int32_t>(base + position_[i]);
    grow(found);
  }

  // Offers the values of the points index[p], ascending.
  void offer(const T* row, int64_t n, const int32_t* index) {
    const int64_t found = gather_candidates(row, n);
    for (int64_t i = 0; i < found; ++i) index_[count_ + i] = index[position_[i]];
    grow(found);
  }

  // Writes the k nearest, and -1 and +inf beyond what was offered.
  void write(int64_t* idx, T* dist2) {
    settle();
    for (int64_t i = 0; i < held_; ++i) idx[i] = index_[i];
    for (int64_t i = held_; i < k_; ++i) idx[i] = -1;
    if (dist2 == nullptr) return;
    for (int64_t i = 0; i < held_; ++i) dist2[i] = value_[i];
    for (int64_t i = held_; i < k_; ++i) dist2[i] = infinity<T>;
  }

 private:
  static constexpr int64_t kSlack = 64;      // candidates beyond k that are held before they are sorted
  static constexpr int64_t kCounting = 192;  // up to here counting beats sorting

  struct Candidate {
    T value;
    int32_t index;
  };

  // Appends the values that may be among the k nearest; their positions in the row are left in position_.
  int64_t gather_candidates(const T* row, int64_t n) {
    T bound = infinity<T>;
    if (n > k_ + kSlack || held_ == k_) bound = bound_of_kth(row, n, k_);
    // What is held has lower indices, so that a tie with its last one loses.
    if (held_ == k_) bound = std::min(bound, std::nextafter(value_[k_ - 1], -infinity<T>));
    const int64_t found = positions_up_to(row, n, bound, position_.data());
    T* out = value_.data() + count_;
    for (int64_t i = 0; i < found; ++i) out[i] = row[position_[i]];
    return found;
  }

  void grow(int64_t found) {
    count_ += found;
    if (count_ > k_ + kSlack) settle();
  }

  // Sorts what is held and keeps the first k.
  void settle() {
    if (count_ == held_) return;
    while (count_ > kCounting && tighten()) {
    }
    if (count_ > kCounting)
      sort_candidates();
    else
      rank_candidates();
    count_ = held_ = std::min(count_, k_);
  }

  void rank_candidates() {
    int32_t* rank = position_.data();
    rank_by_counting(value_.data(), count_, rank);
    for (int64_t i = 0; i < count_; ++i) {
      spare_value_[rank[i]] = value_[i];
      spare_index_[rank[i]] = index_[i];
    }
    std::swap(value_, spare_value_);
    std::swap(index_, spare_index_);
  }

  // Drops candidates that cannot be among the k first; false where that got rid of too few to be worth
  // another round.
  bool tighten() {
    const int64_t padded = round_up(count_, int64_t(lanes<T>));
    for (int64_t i = count_; i < padded; ++i) value_[i] = missing<T>;
    T bound = bound_of_kth(value_.data(), padded, k_);
    if (!(bound < infinity<T>)) return false;
    int64_t below = 0;
    for (int64_t i = 0; i < count_; ++i) below += value_[i] < bound;
    // Fewer than k below it: it is the k-th value itself, and of those that equal it the first ones count.
    int64_t ties = below < k_ ? k_ - below : 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const bool tied = value_[i] == bound && ties > 0;
      ties -= tied;
      const bool keep = tied || value_[i] < bound;
      value_[kept] = value_[i];
      index_[kept] = index_[i];
      kept += keep;
    }
    const bool worth = kept <= count_ - count_ / 4;
    count_ = kept;
    return worth;
  }

  void sort_candidates() {
    candidates_.resize(room_);
    Candidate* first = candidates_.data();
    for (int64_t i = 0; i < count_; ++i) first[i] = {value_[i], index_[i]};
    const auto order = [](const Candidate& a, const Candidate& b) {
      return precedes(a.value, a.index, b.value, b.index);
    };
    const int64_t kept = std::min(count_, k_);
    if (kept < count_) std::nth_element(first, first + kept, first + count_, order);
    std::sort(first, first + kept, order);
    for (int64_t i = 0; i < kept; ++i) {
      value_[i] = first[i].value;
      index_[i] = first[i].index;
    }
  }

  int64_t k_;
  int64_t room_;
  int64_t count_ = 0;  // candidates; the first held_ of them are sorted
  int64_t held_ = 0;
  Buffer<int32_t> position_, index_;
  Buffer<T> value_;
  Buffer<int32_t> spare_index_;
  Buffer<T> spare_value_;
  Buffer<Candidate> candidates_;
};

}  // namespace crosspoint::CROSSPOINT_ISA
