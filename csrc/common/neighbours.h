// The order of neighbours, the same on every backend: by distance, then by index; NaN counts as +inf, missing
// ones come last.
#pragma once

#include <cstdint>
#include <limits>

namespace crosspoint {

// What stands for a point that is not there (padding, or the query itself where it is left out): every
// comparison drops it.
template <class T>
inline constexpr T missing = std::numeric_limits<T>::quiet_NaN();

template <class T>
static inline bool precedes(T distance_a, int32_t index_a, T distance_b, int32_t index_b) {
  return distance_a < distance_b || (distance_a == distance_b && index_a < index_b);
}

}  // namespace crosspoint
