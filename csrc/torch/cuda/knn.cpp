// The operators knn_graph and knn on CUDA tensors.
#include "crosspoint/cuda/knn.h"

#include "common.h"
#include "common/checks.h"

namespace crosspoint::binding {
namespace {

// CROSSPOINT_KNN_PATH forces a search, to measure it.
cuda::KnnPath path_asked_for() {
  const char* setting = std::getenv("CROSSPOINT_KNN_PATH");
  const std::string name = setting == nullptr ? "" : setting;
  if (name.empty() || name == "automatic") return cuda::KnnPath::automatic;
  if (name == "general") return cuda::KnnPath::general;
  if (name == "cloud") return cuda::KnnPath::cloud;
  if (name == "tree") return cuda::KnnPath::tree;
  if (name == "filter") return cuda::KnnPath::filter;
  throw std::invalid_argument("CROSSPOINT_KNN_PATH must be general, cloud, tree or filter, got " + name);
}

std::tuple<Tensor, Tensor> search(const char* op, const Tensor& query, const Tensor& points, int64_t k,
                                  const Lengths& lengths_query, const Lengths& lengths_points, Self self,
                                  bool distances) {
  const OnDeviceOf device(query);
  const ScalarType dtype = compute_dtype(points);
  const Tensor x = dense(query, dtype), y = self == Self::other_set ? dense(points, dtype) : x;
  const int64_t batch = x.size(0), queries = x.size(1), candidates = y.size(1), channels = x.size(2);
  check_cloud_size(candidates);
  Tensor idx = new_tensor(x, {batch, queries, k}, ScalarType::Long);
  Tensor dist2 = new_tensor(x, {batch, queries, distances ? k : 0}, dtype);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const KnnArgs<T> args{data<T>(x), data<T>(y), pointer(lengths_query), pointer(lengths_points), batch, queries,
                          candidates, channels, k, self, mutable_data<int64_t>(idx),
                          distances ? mutable_data<T>(dist2) : nullptr};
    const cuda::KnnPath path = path_asked_for();
    if (!cuda::knn_supports(args, path))
      throw std::invalid_argument(std::string(op) + ": the search that CROSSPOINT_KNN_PATH asks for cannot run this call");
    Tensor space = workspace(x, cuda::knn_workspace(args, path));
    throw_if_failed(cuda::knn(args, space.mutable_data_ptr(), device.stream(), path), op);
  });
  return {idx, dist2};
}

Tensor knn_graph(const Tensor& x, int64_t k, const Lengths& lengths, bool include_self) {
  const Lengths valid = prepared(lengths, x.size(1), "lengths");
  return std::get<0>(search("knn_graph", x, x, k, valid, valid, include_self ? Self::first : Self::left_out,
                            /*distances=*/false));
}

std::tuple<Tensor, Tensor> knn_two_sets(const Tensor& query, const Tensor& points, int64_t k,
                                        const Lengths& lengths_query, const Lengths& lengths_points) {
  auto [idx, dist2] = search("knn", query, points, k, prepared(lengths_query, query.size(1), "lengths_query"),
                             prepared(lengths_points, points.size(1), "lengths_points"), Self::other_set,
                             /*distances=*/true);
  return {dist2, idx};
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CUDA, m) {
  m.impl("knn_graph", TORCH_BOX(&crosspoint::binding::knn_graph));
  m.impl("knn", TORCH_BOX(&crosspoint::binding::knn_two_sets));
}
