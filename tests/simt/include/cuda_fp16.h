// Stands in for CUDA's header of this name.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;

namespace simt {
inline float half_to_float(uint16_t h) {
  const float sign = h & 0x8000u ? -1.0f : 1.0f;
  const int exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25));
}
inline uint16_t float_to_half(float x) {
  if (x != x) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);
  // Units of the last place, rounded to even; subnormal below 2^-14. A carry moves into the exponent by itself.
  const int last = std::max(exponent, -13) - 11;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -last)));
  return static_cast<uint16_t>(sign | (units + (last + 24 > 0 ? (last + 24) * 1024 : 0)));
}
}  // namespace simt

inline __half __float2half_rn(float x) { return {simt::float_to_half(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float __half2float(__half x) { return simt::half_to_float(x.bits); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
