// What EdgeConv2 does on an NVIDIA GPU between the products of nodes: tiles of 64 edges, computed, used and forgotten.
// Arrays are contiguous, in device memory; launchers enqueue, allocate nothing and never wait. An index outside [0, n)
// is no edge.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "crosspoint/cuda/edge_conv.h"
#include "crosspoint/cuda/product.h"

namespace crosspoint::cuda {

inline constexpr int64_t kTileEdges = 64;

// The first layer on edge (i, j): z1 = gain (U_j + V_i) + shift, a = leaky(z1) - leaky(shift).
template <class T>
struct EdgeTiles {
  Graph graph;
  int64_t c_mid;
  const T* nodes;  // (batch, n, 2 c_mid): U beside V
  const T* gain;   // (c_mid)
  const T* shift;  // (batch, c_mid)
  double negative_slope;
  Product product;  // of float: not f16
};

// The largest h = weight a over the edges of each node, signed by gamma: of equal ones the first, a NaN before all; where
// gamma is 0 all are equal.
template <class T>
struct EdgeTileMaxArgs {
  EdgeTiles<T> tiles;
  int64_t c_out;
  const T* weight;  // (c_out, c_mid)
  const T* gamma;   // (c_out) or null
  T* winner;        // (batch, n, c_out), 0 without edges
  void* slot;       // null if no backward pass follows
  int slot_bytes;   // 1 or 4
  double* sums;     // (2, batch, ceil(n / 64), c_out) or null: of h and of its squares, over the edges of 64 nodes
};
cudaError_t edge_tile_max(const EdgeTileMaxArgs<float>&, cudaStream_t);
cudaError_t edge_tile_max(const EdgeTileMaxArgs<double>&, cudaStream_t);

template <class T>
struct EdgeActivateArgs {
  int64_t batch, n, channels;
  const T* winner;
  const int32_t* degrees;  // (2, batch, n)
  const T* scale;          // (channels)
  const T* shift;          // (batch, channels)
  double negative_slope;
  T* out;  // leaky(scale winner + shift), 0 for nodes without edges; may be winner
};
cudaError_t edge_activate(const EdgeActivateArgs<float>&, cudaStream_t);
cudaError_t edge_activate(const EdgeActivateArgs<double>&, cudaStream_t);

// dz1 = leaky'(z1) ([g where the edge wins | a] rows - q).
template <class T>
struct EdgeTileGradientArgs {
  EdgeTiles<T> tiles;
  int64_t c_out;
  const T* g;        // (batch, n, c_out)
  const void* slot;  // (batch, n, c_out)
  int slot_bytes;
  const T* rows;      // (row_count, c_mid)
  int64_t row_count;  // c_out + c_mid, or c_out: a takes no part
  const T* q;         // (batch, c_mid)
};
// routed (batch, n, 2 c_mid): its second half becomes the sum of dz1 over the edges of each node. sums (3, batch,
// ceil(n / 64), c_mid): of dz1, of dz1 (U + V), of a, over the edges of 64 nodes.
cudaError_t edge_own_gradient(const EdgeTileGradientArgs<float>&, float* routed, double* sums, cudaStream_t);
cudaError_t edge_own_gradient(const EdgeTileGradientArgs<double>&, double* routed, double* sums, cudaStream_t);
// runs (batch, n + ceil(n k / 64), c_mid): dz1 over the edges of tile t that lead to node j goes to row j + t; the tile
// holds the 64 entries from 64 t of ReverseEdges::edges. Other rows are left alone.
cudaError_t edge_neighbour_gradient(const EdgeTileGradientArgs<float>&, const ReverseEdges&, float* runs, cudaStream_t);
cudaError_t edge_neighbour_gradient(const EdgeTileGradientArgs<double>&, const ReverseEdges&, double* runs, cudaStream_t);
// routed's first half becomes the sum of each node's runs.
cudaError_t edge_add_runs(const float* runs, const ReverseEdges&, int64_t c_mid, float* routed, cudaStream_t);
cudaError_t edge_add_runs(const double* runs, const ReverseEdges&, int64_t c_mid, double* routed, cudaStream_t);
// out (batch, parts, row_count, c_mid): sums over the edges of a part of a cloud's nodes of g a^T, where the edge wins,
// and below them of a a^T. Of the arguments it reads neither rows nor q.
cudaError_t edge_products(const EdgeTileGradientArgs<float>&, int64_t parts, float* out, cudaStream_t);
cudaError_t edge_products(const EdgeTileGradientArgs<double>&, int64_t parts, double* out, cudaStream_t);

}  // namespace crosspoint::cuda
