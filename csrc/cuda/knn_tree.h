// Up to 3 coordinates and many points: points in the order of a curve, in leaves of a warp's width under a
// hierarchy of boxes.
#pragma once

#include "crosspoint/cuda/knn.h"

namespace crosspoint::cuda {

bool tree_supports(const KnnArgs<float>&);
size_t tree_workspace(const KnnArgs<float>&);
cudaError_t search_tree(const KnnArgs<float>&, void* workspace, cudaStream_t);

}  // namespace crosspoint::cuda
