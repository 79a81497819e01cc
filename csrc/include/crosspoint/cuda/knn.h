// k nearest neighbours on an NVIDIA GPU: the arguments of crosspoint/knn.h with pointers to device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "crosspoint/knn.h"

namespace crosspoint::cuda {

// How a search is done; all of them give the same neighbours.
enum class KnnPath {
  automatic,
  general,  // any channels, points and k: tiles of direct differences
  cloud,    // up to 8 channels, the cloud in shared memory, k up to 128
  tree,     // up to 3 channels, many points, k up to 128: boxes around points in the order of a curve
  filter    // k up to 128: tensor cores sort out candidates
};

// Whether `path` can run the search.
bool knn_supports(const KnnArgs<float>&, KnnPath path);
bool knn_supports(const KnnArgs<double>&, KnnPath path);

// Bytes of device memory that `knn` needs besides its arguments, at an address that is a multiple of 256.
size_t knn_workspace(const KnnArgs<float>&, KnnPath path = KnnPath::automatic);
size_t knn_workspace(const KnnArgs<double>&, KnnPath path = KnnPath::automatic);

// Enqueues the search; nothing is allocated and the host does not wait. Lengths out of range are clamped.
// A path that cannot run it gives cudaErrorInvalidValue.
cudaError_t knn(const KnnArgs<float>&, void* workspace, cudaStream_t, KnnPath path = KnnPath::automatic);
cudaError_t knn(const KnnArgs<double>&, void* workspace, cudaStream_t, KnnPath path = KnnPath::automatic);

}  // namespace crosspoint::cuda
