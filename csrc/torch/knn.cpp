// The operators knn_graph and knn on the CPU.
#include "crosspoint/knn.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

std::tuple<Tensor, Tensor> search(const Tensor& query, const Tensor& points, int64_t k,
                                  const Lengths& lengths_query, const Lengths& lengths_points, Self self,
                                  bool distances) {
  const ScalarType dtype = compute_dtype(points);
  const Tensor x = dense(query, dtype), y = self == Self::other_set ? dense(points, dtype) : x;
  const int64_t batch = x.size(0), queries = x.size(1), candidates = y.size(1), channels = x.size(2);
  check_cloud_size(candidates);
  Tensor idx = new_tensor(x, {batch, queries, k}, ScalarType::Long);
  Tensor dist2 = new_tensor(x, {batch, queries, distances ? k : 0}, dtype);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    knn(KnnArgs<T>{data<T>(x), data<T>(y), pointer(lengths_query), pointer(lengths_points), batch, queries,
                   candidates, channels, k, self, mutable_data<int64_t>(idx),
                   distances ? mutable_data<T>(dist2) : nullptr},
        torch_pool());
  });
  return {idx, dist2};
}

Tensor knn_graph(const Tensor& x, int64_t k, const Lengths& lengths, bool include_self) {
  const Lengths valid = checked(lengths, x.size(0), x.size(1), "lengths");
  return std::get<0>(
      search(x, x, k, valid, valid, include_self ? Self::first : Self::left_out, /*distances=*/false));
}

std::tuple<Tensor, Tensor> knn_two_sets(const Tensor& query, const Tensor& points, int64_t k,
                                        const Lengths& lengths_query, const Lengths& lengths_points) {
  auto [idx, dist2] =
      search(query, points, k, checked(lengths_query, query.size(0), query.size(1), "lengths_query"),
             checked(lengths_points, points.size(0), points.size(1), "lengths_points"), Self::other_set,
             /*distances=*/true);
  return {dist2, idx};
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CPU, m) {
  m.impl("knn_graph", TORCH_BOX(&crosspoint::binding::knn_graph));
  m.impl("knn", TORCH_BOX(&crosspoint::binding::knn_two_sets));
}
