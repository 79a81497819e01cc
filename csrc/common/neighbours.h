// The order of neighbours, the same on every backend: by distance, then by index; NaN counts as +inf, missing
// ones come last.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/host_device.h"

namespace crosspoint {

// What stands for a point that is not there (padding, or the query itself where it is left out): every
// comparison drops it.
template <class T>
inline constexpr T missing = std::numeric_limits<T>::quiet_NaN();

template <class T>
CROSSPOINT_HD static inline bool precedes(T distance_a, int32_t index_a, T distance_b, int32_t index_b) {
  return distance_a < distance_b || (distance_a == distance_b && index_a < index_b);
}

// A squared distance (no NaN) and an index, as one value that `<` orders as `precedes` does. Distances are not
// negative, but for first(), which precedes every neighbour as last() follows every one.
template <class T>
struct NeighbourKey;

template <>
struct NeighbourKey<float> {
  int64_t bits;

  CROSSPOINT_HD static inline NeighbourKey first() { return {-1}; }
  CROSSPOINT_HD static inline NeighbourKey last() { return {INT64_MAX}; }
  CROSSPOINT_HD static inline NeighbourKey of(float distance, int32_t index) {
    uint32_t high;
    memcpy(&high, &distance, sizeof high);
    return {static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(index))};
  }
  CROSSPOINT_HD inline float distance() const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(bits) >> 32);
    float value;
    memcpy(&value, &high, sizeof value);
    return value;
  }
  CROSSPOINT_HD inline int32_t index() const { return static_cast<int32_t>(bits); }
  CROSSPOINT_HD inline bool operator<(NeighbourKey other) const { return bits < other.bits; }

  // The same for a number of any sign in place of the distance.
  CROSSPOINT_HD static inline NeighbourKey of_score(float score, int32_t index) {
    NeighbourKey key = of(score, index);
    if (key.bits < 0) key.bits ^= INT64_C(0x7fffffff) << 32;
    return key;
  }
  CROSSPOINT_HD inline float score() const {
    return NeighbourKey{bits < 0 ? bits ^ INT64_C(0x7fffffff) << 32 : bits}.distance();
  }
};

template <>
struct NeighbourKey<double> {
  double value;
  int64_t place;  // as wide as the value: no padding, which would be copied unwritten

  CROSSPOINT_HD static inline NeighbourKey first() { return {-1.0, -1}; }
  CROSSPOINT_HD static inline NeighbourKey last() {
    return {static_cast<double>(INFINITY), INT32_MAX};
  }
  CROSSPOINT_HD static inline NeighbourKey of(double distance, int32_t index) { return {distance, index}; }
  CROSSPOINT_HD inline double distance() const { return value; }
  CROSSPOINT_HD inline int32_t index() const { return static_cast<int32_t>(place); }
  CROSSPOINT_HD inline bool operator<(NeighbourKey other) const {
    return value < other.value || (value == other.value && place < other.place);
  }
};

}  // namespace crosspoint
