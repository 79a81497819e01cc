// The algebra of a linear layer with batch norm on edges, which lies between its sums over nodes and its products:
// matrices of a few channels, in double. Arrays are contiguous, in device memory; launchers enqueue, allocate nothing and
// never wait. docs/derivations/edge_conv.md has the formulas.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace crosspoint::cuda {

// h = [A | D] [x_j, x_i] for centred x, D = B - A; or h = A a, where edges carry a of their own. Rows times the sign of
// gamma where `signs`. `split` below is [A | D], or A, and `width` how many columns that has.
template <class T>
struct EdgeLayer {
  int64_t batch, in_channels, width, out_channels;
  const T* weight;  // (out, width): [A | B], width = 2 in; or A, width = in
  const T* gamma;   // (out) or null: no norm
  int64_t signs;    // 0 or 1
};

template <class T>
struct EdgeSumPartsArgs {
  int64_t batch, parts, channels;
  const T* gram;        // (batch, parts, 3, channels, channels): of x_j x_j^T, x_j x_i^T, x_i x_i^T
  const double* first;  // (batch, parts, 2, channels): of x_j, of x_i
  double* moments;      // (2 channels + batch, 2 channels): of e e^T over all edges, e = [x_j, x_i]; of e over each cloud's
};
cudaError_t edge_sum_parts(const EdgeSumPartsArgs<float>&, cudaStream_t);
cudaError_t edge_sum_parts(const EdgeSumPartsArgs<double>&, cudaStream_t);

// What a norm is given beside statistics, and what it leaves.
template <class T>
struct EdgeNorm {
  const double* edges;  // (batch)
  const void* centre;   // (batch, in), T, or double
  int64_t centre_double;
  const T* beta;       // (out) or null
  void* running_mean;  // (out) float, or double, or null
  void* running_var;
  int64_t running_double;
  double momentum, eps;
  double* offset;  // (batch, out): turns h less that of the centre into h - mean
  double* rstd;    // (out)
  T* scale;        // (out): z = scale (h less that of the centre) + shift; |gamma| rstd where `signs`
  T* shift;        // (batch, out)
};

// Statistics: of these edges where `moments` are given, which then update the running ones; else the running ones; else
// there is no norm.
template <class T>
struct EdgeNormArgs {
  EdgeLayer<T> layer;
  const double* moments;  // or null
  EdgeNorm<T> norm;
  T* halves;  // (2 out, in): A above D
};
cudaError_t edge_norm(const EdgeNormArgs<float>&, cudaStream_t);
cudaError_t edge_norm(const EdgeNormArgs<double>&, cudaStream_t);

// The same for a layer A a whose h has been computed, edge by edge.
template <class T>
struct EdgeSumsNormArgs {
  EdgeLayer<T> layer;
  int64_t parts;
  const double* partial;  // (2, batch, parts, out) or null: of h less that of the centre, and of its squares
  EdgeNorm<T> norm;
};
cudaError_t edge_sums_norm(const EdgeSumsNormArgs<float>&, cudaStream_t);
cudaError_t edge_sums_norm(const EdgeSumsNormArgs<double>&, cudaStream_t);

// scale and shift of a norm that is known.
template <class T>
struct EdgeAffineArgs {
  int64_t batch, channels;
  const T* gamma;
  const T* beta;
  int64_t signs;
  const double* rstd;
  const double* offset;
  T* scale;
  T* shift;
};
cudaError_t edge_affine(const EdgeAffineArgs<float>&, cudaStream_t);
cudaError_t edge_affine(const EdgeAffineArgs<double>&, cudaStream_t);

// leaky(shift), of a norm that is known, before it is rounded.
template <class T>
struct EdgePivotArgs {
  int64_t batch, channels;
  const T* gamma;
  const T* beta;
  const double* rstd;
  const double* offset;
  double negative_slope;
  double* pivot;  // (batch, channels)
};
cudaError_t edge_pivot(const EdgePivotArgs<float>&, cudaStream_t);
cudaError_t edge_pivot(const EdgePivotArgs<double>&, cudaStream_t);

// Of dz, the gradient of z: its sums, those of the affine parameters, and what the batch's statistics take from every
// edge, scale (mean_term + slope_term h).
template <class T>
struct EdgeNormGradientArgs {
  int64_t batch, parts, channels;
  const double* partial;  // (2, batch, parts, channels): of dz, of dz (U_j + V_i)
  const T* gamma;
  int64_t signs;
  const double* offset;
  const double* rstd;
  const double* edges;
  T* grad_gamma;       // (channels)
  T* grad_beta;        // (channels)
  double* sum;         // (batch, channels): of dz
  double* mean_term;   // (batch, channels)
  double* slope_term;  // (channels)
};
cudaError_t edge_norm_gradient(const EdgeNormGradientArgs<float>&, cudaStream_t);
cudaError_t edge_norm_gradient(const EdgeNormGradientArgs<double>&, cudaStream_t);

// The matrices by which the gradient of x is multiplied out.
template <class T>
struct EdgeInputTermsArgs {
  EdgeLayer<T> layer;
  const double* rstd;
  const double* mean_term;  // or null: no statistics of this batch, and no constant and square
  const double* slope_term;
  T* halves;    // scale split; its halves above one another, (2 out, in), or (out, in)
  T* constant;  // (batch, width): mean_term scale split, what each edge takes
  T* square;    // -split^T (slope_term scale) split; its halves above one another, (4 in, in), or (in, in)
};
cudaError_t edge_input_terms(const EdgeInputTermsArgs<float>&, cudaStream_t);
cudaError_t edge_input_terms(const EdgeInputTermsArgs<double>&, cudaStream_t);

template <class T>
struct EdgeWeightGradientArgs {
  EdgeLayer<T> layer;
  const T* sparse;  // (2 out, in): dz^T x, at the edges' ends above that at their beginnings; or (out, in): dz^T a
  const double* rstd;
  const void* centre;
  int64_t centre_double;
  const double* edges;
  const double* mean_term;  // or null
  const double* slope_term;
  const double* moments;  // (width + batch, width): of e e^T over all edges, e what split takes; of e over each cloud's
  double* sum;            // (batch, out): of dz; becomes that of the gradient of h over scale
  T* grad;                // (out, width): of the weight
};
cudaError_t edge_weight_gradient(const EdgeWeightGradientArgs<float>&, cudaStream_t);
cudaError_t edge_weight_gradient(const EdgeWeightGradientArgs<double>&, cudaStream_t);

}  // namespace crosspoint::cuda
