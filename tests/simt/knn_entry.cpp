// csrc/cuda/knn.cu for ctypes.
#include "crosspoint/cuda/knn.h"

using namespace crosspoint;

namespace {

struct Call {
  int64_t is_double;
  const void *query, *points;
  const int64_t *lengths_query, *lengths_points;
  int64_t batch, queries, candidates, channels, k, self;
  int64_t* idx;
  void* dist2;
  void* workspace;
  int64_t path;
};

template <class F>
auto with_arguments(const Call& call, F&& f) {
  const auto as = [&](auto zero) {
    using T = decltype(zero);
    return KnnArgs<T>{static_cast<const T*>(call.query), static_cast<const T*>(call.points), call.lengths_query, call.lengths_points,
                      call.batch, call.queries, call.candidates, call.channels, call.k, static_cast<Self>(call.self), call.idx,
                      static_cast<T*>(call.dist2)};
  };
  return call.is_double != 0 ? f(as(double{})) : f(as(float{}));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// -1 where the path cannot run the search, else the bytes of its workspace.
int64_t knn_workspace_bytes(const Call* call) {
  const auto path = static_cast<cuda::KnnPath>(call->path);
  return with_arguments(*call, [&](const auto& args) -> int64_t {
    return cuda::knn_supports(args, path) ? static_cast<int64_t>(cuda::knn_workspace(args, path)) : -1;
  });
}

cudaError_t knn(const Call* call) {
  return with_arguments(*call, [&](const auto& args) {
    return cuda::knn(args, call->workspace, nullptr, static_cast<cuda::KnnPath>(call->path));
  });
}
}
