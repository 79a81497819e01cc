// The loss of a row from its positive and the log-sum of its negatives, kept apart so that a tiny loss
// keeps its digits; and what its exponentials are taken relative to, so that none overflows.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace crosspoint {

// log(1 + exp(x)), for any x: minus infinity gives 0.
CROSSPOINT_HD static inline double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

// The weight of a row's positive in the gradient: 1 - softmax at the positive.
CROSSPOINT_HD static inline double missing_probability(double loss) { return -expm1(-loss); }

inline constexpr double log2_e = 1.4426950408889634;
inline constexpr double shortest = 1e-12;  // least divisor of a row, as in torch.nn.functional.normalize

// Of internal linkage, as the functions: every instruction set of the CPU has its own.
namespace {

// Exponentials are powers of two, taken relative to a bound; `scale` turns a cosine into an exponent. Where
// the whole range of exponents fits into T (temperatures down to 0.0145 in float, 0.0017 in double), one
// bound serves all rows, and one power both the row and the column of an entry. Otherwise each row has its
// own.
template <class T>
struct Exponents {
  static constexpr double top = sizeof(T) == 4 ? 100 : 900;  // room to sum above, and for digits below -top

  CROSSPOINT_HD explicit Exponents(double temperature)
      : scale(log2_e / temperature), shared(fabs(scale) <= top), bound(T(fabs(scale) - top)) {}

  // What makes 2^(x - exponent): with a shared bound the factor of 2^(x - bound), otherwise what is added to x.
  template <class U>
  CROSSPOINT_HD T weight(U exponent) const {
    return shared ? T(exp2(bound - exponent)) : T(-exponent);
  }

  double scale;
  bool shared;
  T bound;
};

}  // namespace

}  // namespace crosspoint
