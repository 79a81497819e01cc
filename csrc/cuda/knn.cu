// k nearest neighbours: which search runs.
#include "crosspoint/cuda/knn.h"

#include "cuda/knn_cloud.h"
#include "cuda/knn_filter.h"
#include "cuda/knn_general.h"
#include "cuda/knn_paths.h"
#include "cuda/knn_tree.h"

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

int64_t cloud_stride(const KnnArgs<float>& a) { return (a.candidates + kCloudPad - 1) / kCloudPad * kCloudPad; }
int64_t cloud_depth(const KnnArgs<float>& a) { return a.channels <= 3 ? 3 : 8; }

bool cloud_supports(const KnnArgs<float>& a) {
  return a.channels >= 1 && a.channels <= kFewChannels && a.k <= kMostListed && a.candidates <= kMostCloudBytes &&
         cloud_depth(a) * cloud_stride(a) * int64_t(sizeof(float)) <= kMostCloudBytes;
}

template <int C, bool kept>
cudaError_t launch_cloud(const KnnArgs<float>& a, cudaStream_t stream) {
  const int64_t per_cloud = (a.queries + kCloudBlockQueries - 1) / kCloudBlockQueries, blocks = a.batch * per_cloud;
  const int stride = static_cast<int>(cloud_stride(a)), room = a.k < 44 ? 128 : kListRoom;
  return launch(knn_cloud<C, kept>, grid_of(blocks), dim3(kCloudWarps * kWarp),
                cloud_shared<C>(stride, kept ? kKeptQueries : kStreamedQueries, room), stream, Search<float>{a},
                stride, room, per_cloud, blocks);
}

cudaError_t search_cloud(const KnnArgs<float>& a, cudaStream_t stream) {
  if (cloud_depth(a) == 3)
    return a.candidates <= kChunk ? launch_cloud<3, true>(a, stream) : launch_cloud<3, false>(a, stream);
  return a.candidates <= kChunk ? launch_cloud<8, true>(a, stream) : launch_cloud<8, false>(a, stream);
}

KnnPath chosen(const KnnArgs<float>& a, KnnPath path) {
  if (path != KnnPath::automatic) return path;
  const bool large = a.candidates > kTreeLeast ||
                     (a.candidates >= kTreeLeastOfMany && a.batch * a.queries >= kManyQueries);
  if (large && tree_supports(a)) return KnnPath::tree;
  if (a.channels > kFewChannels && filter_supports(a)) return KnnPath::filter;
  return cloud_supports(a) ? KnnPath::cloud : KnnPath::general;
}

}  // namespace

bool knn_supports(const KnnArgs<double>&, KnnPath path) {
  return path == KnnPath::automatic || path == KnnPath::general;
}

bool knn_supports(const KnnArgs<float>& a, KnnPath path) {
  switch (path) {
    case KnnPath::automatic:
    case KnnPath::general: return true;
    case KnnPath::cloud: return cloud_supports(a);
    case KnnPath::tree: return tree_supports(a);
    case KnnPath::filter: return filter_supports(a);
    default: return false;
  }
}

size_t knn_workspace(const KnnArgs<float>& a, KnnPath path) {
  switch (chosen(a, path)) {
    case KnnPath::tree: return tree_workspace(a);
    case KnnPath::filter: return filter_workspace(a);
    default: return 0;
  }
}
size_t knn_workspace(const KnnArgs<double>&, KnnPath) { return 0; }

cudaError_t knn(const KnnArgs<float>& a, void* workspace, cudaStream_t stream, KnnPath path) {
  path = chosen(a, path);
  if (!knn_supports(a, path)) return cudaErrorInvalidValue;
  if (a.batch * a.queries * a.k == 0) return cudaSuccess;
  switch (path) {
    case KnnPath::cloud: return search_cloud(a, stream);
    case KnnPath::tree: return search_tree(a, workspace, stream);
    case KnnPath::filter: return search_filter(a, workspace, stream);
    default: return search_general(a, stream);
  }
}

cudaError_t knn(const KnnArgs<double>& a, void*, cudaStream_t stream, KnnPath path) {
  if (!knn_supports(a, path)) return cudaErrorInvalidValue;
  if (a.batch * a.queries * a.k == 0) return cudaSuccess;
  return search_general(a, stream);
}

}  // namespace crosspoint::cuda
