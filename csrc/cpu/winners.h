// Maxima over neighbours, lanes over channels: which value wins, and the slots of the winners.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vec.h"

namespace crosspoint::CROSSPOINT_ISA {

template <class T>
using Mask = decltype(Vec<T>{} > Vec<T>{});

template <class T>
inline Mask<T> is_nan(Vec<T> v) {
  return v != v;
}

template <class T>
inline Mask<T> is_finite(Vec<T> v) {
  return v - v == Vec<T>{};
}

// Where v beats the m that came before it. Exact: a NaN wins and stays, and where gamma = 0 all values tie
// unless 0 * v is NaN.
template <bool Exact, class T>
inline Mask<T> beats(Vec<T> v, Vec<T> m, [[maybe_unused]] Vec<T> dead) {
  if constexpr (!Exact) return v > m;
  const Mask<T> alive = dead == Vec<T>{};
  return (alive & ((v > m) | (is_nan<T>(v) & ~is_nan<T>(m)))) |
         (~alive & (~is_finite<T>(v) & is_finite<T>(m)));
}

template <class T>
inline void store_slots(void* slots, int slot_bytes, int64_t position, Mask<T> slot, int64_t valid) {
  using Lane = std::remove_reference_t<decltype(slot[0])>;
  if (slot_bytes == 1) {
    typedef uint8_t Bytes __attribute__((vector_size(lanes<T>)));
    const Bytes bytes = __builtin_convertvector(slot, Bytes);
    std::memcpy(static_cast<uint8_t*>(slots) + position, &bytes, std::min<int64_t>(valid, lanes<T>));
  } else {
    Lane line[lanes<T>];
    std::memcpy(line, &slot, sizeof slot);
    int32_t* target = static_cast<int32_t*>(slots) + position;
    for (int64_t l = 0; l < std::min<int64_t>(valid, lanes<T>); ++l)
      target[l] = static_cast<int32_t>(line[l]);
  }
}

template <class T>
inline bool all_finite(const T* p, int64_t size) {
  Vec<T> zero{};
  int64_t i = 0;
  for (; i + lanes<T> <= size; i += lanes<T>) {
    const Vec<T> v = load(p + i);
    zero += v - v;
  }
  T sum = sum_lanes<T>(zero);
  for (; i < size; ++i) sum += p[i] - p[i];
  return sum == T(0);
}

}  // namespace crosspoint::CROSSPOINT_ISA
