// NT-Xent, InfoNCE and the supervised contrastive loss without the matrix of similarities. With s_ij the cosine
// similarity over the temperature, A the log of the sum of exp(s_ip) over the positives p of row i, and B that of
// exp(s_ij) over its negatives j, the loss of row i is
//   softplus(B - A) + (A - mean of s_ip over its positives),
// whose second part is 0 for one positive; the loss of a row without positives is 0.
#pragma once

#include <cstdint>

#include "crosspoint/isa.h"

namespace crosspoint {

// Rows, a range of the samples, against columns, all samples. A process of several holds the columns of all of them
// and forms the losses and the complete gradients of its own rows; alone, every sample is a row.
//
// Two views (z1 and z2): row i of one is the positive of row i of the other.
// One set (z2 null): the rows with the label of row i, but itself, are its positives, all others its negatives.
template <class T>
struct ContrastInput {
  int64_t samples;        // N: columns of each view
  int64_t channels;       // D
  int64_t first_row;      // the rows of each view are [first_row, first_row + rows) of its columns
  int64_t rows;
  const T* z1;            // (N, D), any length: normalised inside
  const T* z2;            // (N, D), or null
  const int64_t* labels;  // (N), from 0 to 2^31 - 1; null with two views
  double temperature;
  bool within_views;      // negatives from both views (NT-Xent), or from the other view only (InfoNCE)
  bool symmetric;         // the loss averages the rows of both views, or only of the first
};

template <class T>
struct NtXentForward : ContrastInput<T> {
  T* loss;        // one element: the mean over the rows that take part (with labels, those that have a positive)
  T* row_losses;  // (views, rows); 0 for a row that takes no part
  T* row_lse;     // (rows), with labels: A + softplus(B - A) - 1 / |temperature|; infinity for a row without positives
};

// Besides the input, the backward needs the row scalars of all N columns.
template <class T>
struct NtXentBackward : ContrastInput<T> {
  double grad;          // of the mean over the rows of all N samples
  const T* row_losses;  // (views, N)
  const T* row_lse;     // (N), with labels
  T* dz1;               // (rows, D)
  T* dz2;               // (rows, D), with two views
  T* dtemperature;      // one element: the share of these rows; the shares of disjoint rows add up to the derivative
};

// Rows against columns of other samples, all of them negatives: what visits a process whose columns are spread over
// several. Sums over columns, so that those of several visits add up.
template <class T>
struct ContrastVisit {
  int64_t rows;
  int64_t columns;
  int64_t channels;
  const T* z;         // (rows, D), any length: normalised inside
  const T* visiting;  // (columns, D), likewise
  double temperature;
};

template <class T>
struct ContrastVisitForward : ContrastVisit<T> {
  double* lse;  // (rows): log of the sum of exp(s_ij) over the columns j
};

// With row_lse and column_lse, the logs of what the softmax of a row and of a column divides by (infinity where it has no
// loss), w_ij = exp(s_ij - row_lse_i) + exp(s_ij - column_lse_j).
template <class T>
struct ContrastVisitBackward : ContrastVisit<T> {
  const double* row_lse;     // (rows)
  const double* column_lse;  // (columns)
  T* sums;                   // (rows, D): of w_ij times the unit row j
  double* moment;            // one element: the sum of w_ij s_ij over rows and columns
};

}  // namespace crosspoint

CROSSPOINT_CPU_KERNEL(nt_xent_forward, NtXentForward<float>)
CROSSPOINT_CPU_KERNEL(nt_xent_forward, NtXentForward<double>)
CROSSPOINT_CPU_KERNEL(nt_xent_backward, NtXentBackward<float>)
CROSSPOINT_CPU_KERNEL(nt_xent_backward, NtXentBackward<double>)
CROSSPOINT_CPU_KERNEL(contrast_visit_forward, ContrastVisitForward<float>)
CROSSPOINT_CPU_KERNEL(contrast_visit_forward, ContrastVisitForward<double>)
CROSSPOINT_CPU_KERNEL(contrast_visit_backward, ContrastVisitBackward<float>)
CROSSPOINT_CPU_KERNEL(contrast_visit_backward, ContrastVisitBackward<double>)
