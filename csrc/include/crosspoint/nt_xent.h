// NT-Xent and InfoNCE without the matrix of similarities. Loss of row i with positive p:
// softplus(log(sum of exp(s_ij) over its negatives) - s_ip), s = cosine similarity / temperature.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

// Two views of the same N samples; row i of one is the positive of row i of the other.
template <class T>
struct ContrastInput {
  int64_t samples;   // N
  int64_t channels;  // D
  const T* z1;       // (N, D), any length: rows are normalised inside
  const T* z2;       // (N, D)
  double temperature;
  bool within_views;  // negatives from both views (NT-Xent), or from the other view only (InfoNCE)
  bool symmetric;     // the loss averages the rows of both views, or only of the first
};

template <class T>
struct NtXentForward : ContrastInput<T> {
  T* loss;        // one element
  T* row_losses;  // (2, N): all that the backward needs besides the input; 0 for a view that takes no part
};

template <class T>
struct NtXentBackward : ContrastInput<T> {
  double grad;          // of the loss
  const T* row_losses;  // (2, N)
  T* dz1;               // (N, D)
  T* dz2;               // (N, D)
  T* dtemperature;      // one element
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(nt_xent_forward, NtXentForward<float>)
CROSSPOINT_CPU_KERNEL(nt_xent_forward, NtXentForward<double>)
CROSSPOINT_CPU_KERNEL(nt_xent_backward, NtXentBackward<float>)
CROSSPOINT_CPU_KERNEL(nt_xent_backward, NtXentBackward<double>)
