// Many channels: tensor cores sort out candidates.
#pragma once

#include "crosspoint/cuda/knn.h"

namespace crosspoint::cuda {

bool filter_supports(const KnnArgs<float>&);
size_t filter_workspace(const KnnArgs<float>&);
cudaError_t search_filter(const KnnArgs<float>&, void* workspace, cudaStream_t);

}  // namespace crosspoint::cuda
