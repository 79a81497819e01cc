// Powers of two of a vector.
#pragma once

#include <cstdint>

#include "vec.h"

namespace crosspoint::CROSSPOINT_ISA {

template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
  static constexpr int mantissa = 23;
  static constexpr float bias = 127;
  // 2^f for |f| <= 1/2, least relative error (2e-9).
  static constexpr float polynomial[] = {1.0f,           0.6931472057f,  0.2402264689f,  0.05550328777f,
                                         0.009618488956f, 0.001339993118f, 0.0001534581216f};
};

template <>
struct Exp2<double> {
  typedef uint64_t Bits __attribute__((vector_size(vector_bytes)));
  static constexpr int mantissa = 52;
  static constexpr double bias = 1023;
  // 2^f for |f| <= 1/2, least relative error (3e-18).
  static constexpr double polynomial[] = {
      1.0,                    0.69314718055994533,    0.24022650695910156,    0.055504108664819922,
      0.0096181291075883352,  0.0013333558146789922,  0.00015403530462514432, 1.5252733489988526e-5,
      1.3215433089676399e-6,  1.0178198021671931e-7,  7.0741056135081428e-9,  4.4352827069572772e-10};
};

// 2^x for x up to the exponent bias: 0 where that would be subnormal or less, NaN for NaN.
template <class T>
inline Vec<T> exp2(Vec<T> x) {
  using E = Exp2<T>;
  // Adding 1.5 * 2^mantissa rounds to an integer, which then stands in the low bits of the sum.
  constexpr T magic = T(1.5) * T(int64_t(1) << E::mantissa) + E::bias;
  x = max(splat(-E::bias), x);
  const Vec<T> rounded = x + splat(magic);
  const Vec<T> f = x - (rounded - splat(magic));
  constexpr int degree = sizeof(E::polynomial) / sizeof(T) - 1;
  Vec<T> power = splat(E::polynomial[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) power = power * f + splat(E::polynomial[k]);
  return power * (Vec<T>)((typename E::Bits)rounded << E::mantissa);
}

}  // namespace crosspoint::CROSSPOINT_ISA
