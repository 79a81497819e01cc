// The extension crosspoint._host: NumPy faces of the CPU kernels, and what was built. crosspoint/numpy.py checks shapes
// and dtypes before it calls; values are checked here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "common/checks.h"
#include "crosspoint/farthest_point_sampling.h"
#include "crosspoint/isa.h"
#include "crosspoint/knn.h"
#include "crosspoint/neighbor_sum.h"
#include "crosspoint/threads.h"

namespace py = pybind11;

namespace crosspoint {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Lengths = std::optional<Array<int64_t>>;

const int64_t* pointer(const Lengths& lengths) { return lengths.has_value() ? lengths->data() : nullptr; }

void check(const char* name, const Lengths& lengths, int64_t most) {
  if (lengths.has_value()) check_lengths(name, lengths->data(), lengths->size(), most);
}

template <class T>
void search(const Array<T>& query, const Array<T>& points, int64_t k, const Lengths& lengths_query,
            const Lengths& lengths_points, Self self, int count, Array<int64_t>& idx, T* dist2) {
  check_cloud_size(points.shape(1));
  const KnnArgs<T> args{query.data(),          points.data(),   pointer(lengths_query), pointer(lengths_points),
                        query.shape(0),        query.shape(1),  points.shape(1),        query.shape(2),
                        k,                     self,            idx.mutable_data(),     dist2};
  py::gil_scoped_release release;
  knn(args, threads(count));
}

template <class T>
Array<int64_t> knn_graph(const Array<T>& x, int64_t k, const Lengths& lengths, bool include_self, int count) {
  check("lengths", lengths, x.shape(1));
  Array<int64_t> idx({int64_t(x.shape(0)), int64_t(x.shape(1)), k});
  search<T>(x, x, k, lengths, lengths, include_self ? Self::first : Self::left_out, count, idx, nullptr);
  return idx;
}

template <class T>
py::tuple knn_two_sets(const Array<T>& query, const Array<T>& points, int64_t k, const Lengths& lengths_query,
                       const Lengths& lengths_points, int count) {
  check("lengths_query", lengths_query, query.shape(1));
  check("lengths_points", lengths_points, points.shape(1));
  const int64_t shape[] = {query.shape(0), query.shape(1), k};
  Array<int64_t> idx(shape);
  Array<T> dist2(shape);
  search<T>(query, points, k, lengths_query, lengths_points, Self::other_set, count, idx, dist2.mutable_data());
  return py::make_tuple(dist2, idx);
}

template <class T>
Array<int64_t> sample(const Array<T>& x, int64_t m, const Lengths& lengths, int64_t start, int count) {
  const int64_t batch = x.shape(0), n = x.shape(1);
  check("lengths", lengths, n);
  check_cloud_size(n);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t valid = lengths.has_value() ? lengths->data()[b] : n;
    if (valid > 0 && (start < 0 || start >= valid))
      throw std::out_of_range("farthest_point_sampling: start is " + std::to_string(start) + ", but cloud " +
                              std::to_string(b) + " has points 0 to " + std::to_string(valid - 1));
  }
  Array<int64_t> idx({batch, m});
  const FarthestPointSamplingArgs<T> args{x.data(), pointer(lengths), batch, n, x.shape(2), m, start,
                                          idx.mutable_data()};
  py::gil_scoped_release release;
  farthest_point_sampling(args, threads(count));
  return idx;
}

template <class T>
Array<T> sum(const Array<T>& x, const Array<int64_t>& idx, int count) {
  Array<T> out({x.shape(0), idx.shape(1), x.shape(2)});
  const NeighborSumArgs<T> args{x.shape(0), x.shape(1), idx.shape(1), idx.shape(2), x.shape(2),
                                x.data(),   idx.data(), out.mutable_data()};
  py::gil_scoped_release release;
  const Parallel parallel = threads(count);
  check_graph("neighbor_sum", args.idx, args.batch, args.nodes, args.n, args.k, parallel);
  neighbor_sum(args, parallel);
  return out;
}

py::tuple cpu_features() {
  py::list features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define CROSSPOINT_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features.append(name)
  CROSSPOINT_FEATURE("sse4.2");
  CROSSPOINT_FEATURE("avx");
  CROSSPOINT_FEATURE("fma");
  CROSSPOINT_FEATURE("avx2");
  CROSSPOINT_FEATURE("avx512f");
  CROSSPOINT_FEATURE("avx512bw");
  CROSSPOINT_FEATURE("avx512dq");
  CROSSPOINT_FEATURE("avx512vl");
  CROSSPOINT_FEATURE("avx512bf16");
#undef CROSSPOINT_FEATURE
#elif defined(__aarch64__)
  features.append("neon");
#endif
  return py::tuple(features);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = CROSSPOINT_FLAGS;
#if defined(__x86_64__)
  info["variants"] = py::make_tuple("baseline", "avx2", "avx512");
#else
  info["variants"] = py::make_tuple("baseline");
#endif
  info["variant"] = isa_name(isa());
  info["cpu_features"] = cpu_features();
  return info;
}

template <class T>
void define_ops(py::module_& m) {
  m.def("knn_graph", &knn_graph<T>, py::arg("x").noconvert(), py::arg("k"), py::arg("lengths"),
        py::arg("include_self"), py::arg("threads"));
  m.def("knn", &knn_two_sets<T>, py::arg("query").noconvert(), py::arg("points").noconvert(), py::arg("k"),
        py::arg("lengths_query"), py::arg("lengths_points"), py::arg("threads"));
  m.def("farthest_point_sampling", &sample<T>, py::arg("x").noconvert(), py::arg("m"), py::arg("lengths"),
        py::arg("start"), py::arg("threads"));
  m.def("neighbor_sum", &sum<T>, py::arg("x").noconvert(), py::arg("idx").noconvert(), py::arg("threads"));
}

}  // namespace
}  // namespace crosspoint

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU kernels on NumPy arrays; use crosspoint.numpy.";
  m.def("build_info", &crosspoint::build_info);
  crosspoint::define_ops<float>(m);
  crosspoint::define_ops<double>(m);
}
