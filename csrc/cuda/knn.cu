// k nearest neighbours: which search runs.
#include "crosspoint/cuda/knn.h"

#include "cuda/knn_general.h"

namespace crosspoint::cuda {
namespace {

// Blocks take more than one piece of work where a grid cannot be that large.
dim3 grid_of(int64_t blocks) {
  constexpr int64_t most = 1 << 30;
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

template <class T>
cudaError_t search_general(const KnnArgs<T>& a, cudaStream_t stream) {
  const int64_t per_cloud = (a.queries + kGeneralQueries - 1) / kGeneralQueries, blocks = a.batch * per_cloud;
  return launch(knn_general<T>, grid_of(blocks), dim3(kGeneralWarps * kWarp), general_shared<T>(), stream,
                Search<T>{a}, per_cloud, blocks);
}

template <class T>
KnnPath chosen(const KnnArgs<T>& a, KnnPath path) {
  if (path != KnnPath::automatic) return path;
  return KnnPath::general;
}

template <class T>
cudaError_t run(const KnnArgs<T>& a, void* workspace, cudaStream_t stream, KnnPath path) {
  path = chosen(a, path);
  if (!knn_supports(a, path)) return cudaErrorInvalidValue;
  if (a.batch * a.queries * a.k == 0) return cudaSuccess;
  return search_general(a, stream);
}

}  // namespace

bool knn_supports(const KnnArgs<double>&, KnnPath path) {
  return path == KnnPath::automatic || path == KnnPath::general;
}

bool knn_supports(const KnnArgs<float>& a, KnnPath path) {
  switch (path) {
    case KnnPath::automatic:
    case KnnPath::general: return true;
    default: return false;
  }
}

size_t knn_workspace(const KnnArgs<float>& a, KnnPath path) { return 0; }
size_t knn_workspace(const KnnArgs<double>&, KnnPath) { return 0; }

cudaError_t knn(const KnnArgs<float>& a, void* workspace, cudaStream_t stream, KnnPath path) {
  return run(a, workspace, stream, path);
}
cudaError_t knn(const KnnArgs<double>& a, void* workspace, cudaStream_t stream, KnnPath path) {
  return run(a, workspace, stream, path);
}

}  // namespace crosspoint::cuda
