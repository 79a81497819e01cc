// What EdgeConv does on an NVIDIA GPU between its matrix products. Arrays are contiguous, in device memory; launchers
// enqueue, allocate nothing and never wait. An index outside [0, n) is no edge.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace crosspoint::cuda {

struct Graph {
  const int64_t* idx;  // (batch, n, k)
  int64_t batch, n, k;
};

// A graph turned around: see reverse_graph.h.
struct ReverseEdges {
  const int32_t* start;  // (batch, n + 1)
  const int32_t* edges;  // (batch, n * k)
  int64_t batch, n, k;
};

// degrees (2, batch, n), zeros before: edges of node i, edges that lead to node j.
cudaError_t edge_conv_degrees(const Graph&, int32_t* degrees, cudaStream_t);

template <class T>
struct EdgeConvCentreArgs {
  int64_t batch, n, channels;
  const T* x;              // (batch, n, channels)
  const int32_t* degrees;  // (2, batch, n)
  T* centre;               // (batch, channels)
};
// About the mean of the nodes that have edges, rounded to a grid of a quarter to half of their spread: few bits, so
// that x - centre stays exact on a lattice and ties stay ties.
cudaError_t edge_conv_centre(const EdgeConvCentreArgs<float>&, cudaStream_t);
cudaError_t edge_conv_centre(const EdgeConvCentreArgs<double>&, cudaStream_t);
// out = x - centre; 0 in rows that no edge touches, so that padding (NaN included) reaches nothing.
cudaError_t edge_conv_subtract(const EdgeConvCentreArgs<float>&, float* out, cudaStream_t);
cudaError_t edge_conv_subtract(const EdgeConvCentreArgs<double>&, double* out, cudaStream_t);

template <class T>
struct EdgeConvSumArgs {
  Graph graph;
  int64_t channels;
  const T* x;  // (batch, n, channels)
  T* out;      // of each node, the sum over its neighbours
};
cudaError_t edge_conv_neighbor_sum(const EdgeConvSumArgs<float>&, cudaStream_t);
cudaError_t edge_conv_neighbor_sum(const EdgeConvSumArgs<double>&, cudaStream_t);

template <class T>
struct EdgeConvMomentsArgs {
  int64_t batch, n, channels, parts;  // each of `parts` sums as many of a cloud's nodes
  const T* x;
  const T* sums;           // over each node's neighbours
  const int32_t* degrees;  // (2, batch, n)
  T* gram;                 // (batch, parts, 3, channels, channels): sums over edges of x_j x_j^T, x_j x_i^T, x_i x_i^T
  double* first;           // (batch, parts, 2, channels): of x_j, of x_i
};
cudaError_t edge_conv_moments(const EdgeConvMomentsArgs<float>&, cudaStream_t);
cudaError_t edge_conv_moments(const EdgeConvMomentsArgs<double>&, cudaStream_t);

// With z = scale h + shift, h the largest U_j + V_i over the edges of node i, out = leaky(z); 0 without edges. Of equal
// ones the first wins, a NaN before all; where gamma is 0 all are equal.
template <class T>
struct EdgeConvMaxArgs {
  Graph graph;
  int64_t channels;
  const T* nodes;  // (batch, n, 2 channels): U beside V
  const T* gamma;  // (channels) or null
  const T* scale;  // (channels)
  const T* shift;  // (batch, channels)
  double negative_slope;
  T* out;          // (batch, n, channels)
  T* winner;       // h; null if no backward pass follows
  void* slot;      // null likewise
  int slot_bytes;  // 1 or 4
};
cudaError_t edge_conv_max(const EdgeConvMaxArgs<float>&, cudaStream_t);
cudaError_t edge_conv_max(const EdgeConvMaxArgs<double>&, cudaStream_t);

template <class T>
struct EdgeConvGradientArgs {
  int64_t batch, n, channels, parts;
  const T* grad;
  const T* winner;
  const int32_t* degrees;
  const T* scale;
  const T* shift;
  double negative_slope;
  T* routed;       // (batch, n, stride): its last channels become g = grad leaky'(z), 0 for nodes without edges
  int64_t stride;  // channels or more
  double* sums;  // (2, batch, parts, channels): of g, of g winner
};
cudaError_t edge_conv_winner_gradient(const EdgeConvGradientArgs<float>&, cudaStream_t);
cudaError_t edge_conv_winner_gradient(const EdgeConvGradientArgs<double>&, cudaStream_t);

template <class T>
struct EdgeConvRouteArgs {
  ReverseEdges graph;
  int64_t channels;
  const void* slot;  // (batch, n, channels)
  int slot_bytes;
  T* routed;  // its first half becomes the sum of g over the edges to each node that win
};
cudaError_t edge_conv_route(const EdgeConvRouteArgs<float>&, cudaStream_t);
cudaError_t edge_conv_route(const EdgeConvRouteArgs<double>&, cudaStream_t);

template <class T>
struct EdgeConvDenseArgs {
  ReverseEdges graph;
  int64_t channels;
  const T* x;
  const T* sums;
  const int32_t* degrees;
  const T* constant;  // (batch, 2 channels)
  T* dense;           // (batch, n, 4 channels): in_degree x, sum of x_i over the edges to the node, sums, out_degree x
  T* grad_x;          // (batch, n, channels): loses in_degree and out_degree times the two halves of constant
};
cudaError_t edge_conv_dense_gradient(const EdgeConvDenseArgs<float>&, cudaStream_t);
cudaError_t edge_conv_dense_gradient(const EdgeConvDenseArgs<double>&, cudaStream_t);

}  // namespace crosspoint::cuda
