// How far approximate scores may be trusted: the bound of csrc/cpu/knn_filter.h, for every backend that filters.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace crosspoint {

// Of one query x: what is multiplied is x" and y", whose score is s = |y"|^2 / 2 - x" y".
struct FilterBound {
  double norm2;    // |x"|^2
  double moved;    // e: |x" - y"| is within e of |x - y|
  double product;  // E: the computed score is within E of s
  double direct;   // how far, as a factor, a distance by direct differences may be off
  double tiny;     // what underflow may take from one
};

// No score of a point that may be among the k nearest exceeds the result, given that k points have scores up to
// t, and that k distances are at most `limit`.
CROSSPOINT_HD static inline double filter_cut(const FilterBound& bound, double t, double limit) {
  const double near2 = 2 * (t + bound.product) + bound.norm2;
  const double by_score = sqrt(near2 > 0 ? near2 : 0.0) + bound.moved, by_limit = sqrt(limit > 0 ? limit : 0.0);
  const double root = by_score < by_limit ? by_score : by_limit;
  const double reach = sqrt(root * root * bound.direct + bound.tiny) + bound.moved;
  return (reach * reach - bound.norm2) / 2 + bound.product;
}

// Scores up to t that differ by more than the result belong to distances that direct differences put in the same
// order: the cut lies farther from t the larger t is (by the roundings of larger distances, and twice e more).
CROSSPOINT_HD static inline double filter_gap(const FilterBound& bound, double t) {
  return filter_cut(bound, t, INFINITY) - t;
}

// Squared norms of one point as it is split in two bfloat16 values, x" = hi + lo.
struct SplitSize {
  float norm2, lost2, low2, unused;  // of hi + lo; of what rounding lost; of lo
};

// The bound of a query for hi hi' + hi lo' + lo hi' on tensor cores; `most` holds the points' largest of each norm.
CROSSPOINT_HD static inline FilterBound split_bound(const SplitSize& size, const SplitSize& most, int channels) {
  const double unit = 1.0 / (1 << 24), least = 1.17549435e-38, c = channels;
  const double own = sqrt(static_cast<double>(size.norm2)), other = sqrt(static_cast<double>(most.norm2));
  const double reach = own + other;
  // Each product of 16 channels adds up to 17 numbers and drops what is below the last place of the largest: at
  // most 2^-23 of |x| |y| each time, and once more for the sum.
  const double additions = 20.0 * 3 * ((channels + 15) / 16);
  FilterBound bound;
  bound.norm2 = size.norm2;
  bound.moved =
      1.001 * (sqrt(static_cast<double>(size.lost2)) + sqrt(static_cast<double>(most.lost2)) + 2 * unit * reach);
  bound.tiny = (2 * c + 16) * least;
  bound.product = (2 * c + 16) * unit * reach * reach + 1.01 * additions * 2 * unit * own * other +
                  1.01 * sqrt(static_cast<double>(size.low2)) * sqrt(static_cast<double>(most.low2)) +
                  (4 + 2 * reach) * bound.tiny;
  bound.direct = 1 + (2 * c + 16) * unit;
  return bound;
}

}  // namespace crosspoint
