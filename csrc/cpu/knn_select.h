// Selection of the k smallest by (value, index), without heaps: a bound from group minima lets few candidates
// through, which are then ranked by counting. Rows of values hold NaN where nothing exists.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
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

// Bit i: whether row[i] <= bound, for the lanes of one vector.
template <class T>
inline uint64_t lanes_up_to(const T* row, T bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(row), _mm512_set1_ps(bound), _CMP_LE_OQ);
  else
    return _mm512_cmp_pd_mask(_mm512_loadu_pd(row), _mm512_set1_pd(bound), _CMP_LE_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(row), _mm256_set1_ps(bound), _CMP_LE_OQ));
  else
    return _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(row), _mm256_set1_pd(bound), _CMP_LE_OQ));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return _mm_movemask_ps(_mm_cmple_ps(_mm_loadu_ps(row), _mm_set1_ps(bound)));
  else
    return _mm_movemask_pd(_mm_cmple_pd(_mm_loadu_pd(row), _mm_set1_pd(bound)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < lanes<T>; ++i) bits |= static_cast<uint64_t>(row[i] <= bound) << i;
  return bits;
#endif
}

inline constexpr int64_t kPositionSlack = 4;  // what positions_up_to may write beyond its result

// Writes the positions p in [0, n) with row[p] <= bound, ascending, and returns how many they are; n is a
// multiple of lanes<T>.
template <class T>
inline int64_t positions_up_to(const T* row, int64_t n, T bound, int32_t* out) {
  constexpr int64_t L = lanes<T>;
  int64_t count = 0;
  for (int64_t p = 0; p < n; p += 64) {
    uint64_t bits = 0;
    if (p + 64 <= n) {
#pragma GCC unroll 32
      for (int64_t i = 0; i < 64; i += L) bits |= lanes_up_to(row + p + i, bound) << i;
    } else {
      for (int64_t i = 0; p + i < n; i += L) bits |= lanes_up_to(row + p + i, bound) << i;
    }
    // Four are written whether they are there or not: a branch on how many there are would be guessed wrong.
    const int found = __builtin_popcountll(bits);
    int32_t* next = out + count;
    count += found;
#pragma GCC unroll 4
    for (int i = 0; i < kPositionSlack; ++i) {
      next[i] = static_cast<int32_t>(p) + __builtin_ctzll(bits | uint64_t(1) << 63);
      bits &= bits - 1;
    }
    for (int i = kPositionSlack; i < found; ++i) {
      next[i] = static_cast<int32_t>(p) + __builtin_ctzll(bits);
      bits &= bits - 1;
    }
  }
  return count;
}

// The k-th smallest of V vectors of values.
template <class T, int V>
inline T kth_smallest_of_groups(const Vec<T> (&minima)[V], int64_t k) {
  constexpr int L = lanes<T>;
  alignas(64) T groups[V * L];
  for (int v = 0; v < V; ++v) store(groups + v * L, minima[v]);
  Vec<T> found = splat(infinity<T>);
  constexpr int step = V < 4 ? V : 4;  // vectors that share a broadcast
  for (int v = 0; v < V; v += step) {
    using Mask = decltype(found < found);
    Mask at_most[step] = {};
    for (int j = 0; j < V * L; ++j)
      for (int i = 0; i < step; ++i) at_most[i] -= splat(groups[j]) <= minima[v + i];
    const Mask enough = Mask{} + static_cast<decltype(Mask{}[0] + 0)>(k);
    for (int i = 0; i < step; ++i) found = at_most[i] >= enough ? least<T>(minima[v + i], found) : found;
  }
  T smallest = found[0];
  for (int lane = 1; lane < L; ++lane) smallest = found[lane] < smallest ? found[lane] : smallest;
  return smallest;
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
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
    if (p + v * L < n) minima[v] = least<T>(load(row + p + v * L), minima[v]);
  return kth_smallest_of_groups<T, V>(minima, k);
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

// The k nearest of one query, fed piece by piece. Pieces that come in ascending order of index make ties
// cheap.
template <class T, bool ascending = true>
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

  // The last of the k nearest so far, by (value, index); index -1 where fewer are held.
  T last_value() const { return value_[k_ - 1]; }
  int32_t last_index() const { return held_ == k_ ? index_[k_ - 1] : -1; }

  // Offers row[0, n), n a multiple of lanes<T>; index(p) is the point of row[p]. No value beyond `cap`
  // matters.
  template <class Index>
  void offer(const T* row, int64_t n, Index&& index, T cap = infinity<T>) {
    T bound = cap;
    if (n > k_ + kSlack || held_ == k_) bound = std::min(bound, bound_of_kth(row, n, k_));
    if (held_ == k_) {
      // In ascending order a tie with the last one held loses, for its index is higher.
      const T last = value_[k_ - 1];
      bound = std::min(bound, ascending ? std::nextafter(last, -infinity<T>) : last);
    }
    const int64_t found = positions_up_to(row, n, bound, position_.data());
    T* values = value_.data() + count_;
    int32_t* indices = index_.data() + count_;
    for (int64_t i = 0; i < found; ++i) {
      values[i] = row[position_[i]];
      indices[i] = index(position_[i]);
    }
    count_ += found;
    if (count_ > k_ + kSlack) settle();
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

  // Sorts what is held and keeps the first k.
  void settle() {
    if (count_ == held_) return;
    if constexpr (ascending) {
      while (count_ > kCounting && tighten()) {
      }
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
    if constexpr (!ascending) order_ties();
  }

  // Puts runs of equal values, which stand as they came, in order of index.
  void order_ties() {
    for (int64_t begin = 0, end; begin < count_; begin = end) {
      for (end = begin + 1; end < count_ && value_[end] == value_[begin];) ++end;
      if (end - begin < 2) continue;
      candidates_.resize(room_);
      for (int64_t i = begin; i < end; ++i) candidates_[i] = {value_[i], index_[i]};
      std::sort(candidates_.data() + begin, candidates_.data() + end,
                [](const Candidate& a, const Candidate& b) { return a.index < b.index; });
      for (int64_t i = begin; i < end; ++i) index_[i] = candidates_[i].index;
    }
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
