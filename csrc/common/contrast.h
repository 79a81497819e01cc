// The loss of a row from its positive and the log-sum of its negatives, kept apart so that a tiny loss
// keeps its digits.
#pragma once

#include <cmath>

namespace crosspoint {

// log(1 + exp(x)), for any x: minus infinity gives 0.
static inline double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

// The weight of a row's positive in the gradient: 1 - softmax at the positive.
static inline double missing_probability(double loss) { return -std::expm1(-loss); }

}  // namespace crosspoint
