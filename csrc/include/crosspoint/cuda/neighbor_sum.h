// Sums over neighbours on an NVIDIA GPU: the arguments of crosspoint/neighbor_sum.h with pointers to device memory.
// Entries of idx outside [0, n) are no edges.
#pragma once

#include <cuda_runtime_api.h>

#include "crosspoint/neighbor_sum.h"

namespace crosspoint::cuda {

cudaError_t neighbor_sum(const NeighborSumArgs<float>&, cudaStream_t);
cudaError_t neighbor_sum(const NeighborSumArgs<double>&, cudaStream_t);

// The transpose, over the graph that reverse_graph has turned around: its start and edges.
cudaError_t neighbor_sum_backward(const NeighborSumBackwardArgs<float>&, const int32_t* start, const int32_t* edges, cudaStream_t);
cudaError_t neighbor_sum_backward(const NeighborSumBackwardArgs<double>&, const int32_t* start, const int32_t* edges, cudaStream_t);

}  // namespace crosspoint::cuda
