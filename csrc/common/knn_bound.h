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

}  // namespace crosspoint
