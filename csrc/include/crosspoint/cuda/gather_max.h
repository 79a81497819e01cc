// Maxima over neighbours on an NVIDIA GPU: the arguments of crosspoint/gather_max.h with pointers to device memory.
// Entries of idx outside [0, n) are no edges.
#pragma once

#include <cuda_runtime_api.h>

#include "crosspoint/gather_max.h"

namespace crosspoint::cuda {

cudaError_t gather_max(const GatherMaxArgs<float>&, cudaStream_t);
cudaError_t gather_max(const GatherMaxArgs<double>&, cudaStream_t);

// Row by row, over the graph that reverse_graph has turned around: its start and edges.
cudaError_t gather_max_backward(const GatherMaxBackwardArgs<float>&, const int32_t* start, const int32_t* edges, cudaStream_t);
cudaError_t gather_max_backward(const GatherMaxBackwardArgs<double>&, const int32_t* start, const int32_t* edges, cudaStream_t);

}  // namespace crosspoint::cuda
