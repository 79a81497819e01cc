// k nearest neighbours: which search a cloud gets, and how the work is handed out.
#include "crosspoint/knn.h"

#include <new>

#include "knn_filter.h"
#include "knn_panels.h"
#include "knn_tree.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

constexpr int64_t kWorkspaceBytes =
    16 << 20;  // clouds are prepared in groups of about this much, or one at a time

template <class T>
class Clouds {
 public:
  Clouds(const KnnArgs<T>& args, const Parallel& parallel) : a_(args), parallel_(parallel) {}

  // prepare(cloud, parallel, values, indices) for each cloud, with so many values and indices of workspace,
  // returns a Prepared; then search(cloud, prepared, scratch, first, count) for blocks of its queries.
  template <class Prepared, class Prepare, class MakeScratch, class Search>
  void run(int64_t values, int64_t indices, int64_t block, Prepare&& prepare, MakeScratch&& make_scratch,
           Search&& search) {
    const int64_t bytes =
        std::max<int64_t>(1, values * int64_t(sizeof(T)) + indices * int64_t(sizeof(int32_t)));
    const int64_t group = std::min(a_.batch, std::max<int64_t>(1, kWorkspaceBytes / bytes));
    Buffer<T> value_space(group * values);
    Buffer<int32_t> index_space(group * indices);
    Buffer<Prepared> prepared(group);
    const int64_t blocks = (a_.queries + block - 1) / block;
    for (int64_t b0 = 0; b0 < a_.batch; b0 += group) {
      const int64_t here = std::min(group, a_.batch - b0);
      const auto prepare_one = [&](int64_t b, const Parallel& parallel) {
        new (&prepared[b]) Prepared(
            prepare(b0 + b, parallel, value_space.data() + b * values, index_space.data() + b * indices));
      };
      if (here < parallel_.threads()) {
        for (int64_t b = 0; b < here; ++b) prepare_one(b, parallel_);
      } else {
        const Parallel alone(
            [](void*, int, int64_t n, int64_t, Parallel::Body body, void* context) { body(context, 0, n); },
            1);
        parallel_.ranges(here, 1, [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) prepare_one(b, alone);
        });
      }
      parallel_.items(here * blocks, make_scratch, [&](int64_t item, auto& scratch) {
        const int64_t b = item / blocks, first = item % blocks * block;
        const int64_t end = std::min(first + block, a_.queries), valid = std::min(end, queries_of(b0 + b));
        if (first < valid) search(b0 + b, prepared[b], scratch, first, valid - first);
        leave_empty(b0 + b, std::max(first, valid), end);
      });
    }
  }

  int64_t queries_of(int64_t b) const {
    return a_.lengths_query == nullptr ? a_.queries : a_.lengths_query[b];
  }
  int64_t points_of(int64_t b) const {
    return a_.lengths_points == nullptr ? a_.candidates : a_.lengths_points[b];
  }
  const T* query(int64_t b) const { return a_.query + b * a_.queries * a_.channels; }
  const T* points(int64_t b) const { return a_.points + b * a_.candidates * a_.channels; }
  bool all_finite(int64_t b) const {
    return CROSSPOINT_ISA::all_finite(points(b), points_of(b) * a_.channels) &&
           (a_.self != Self::other_set || CROSSPOINT_ISA::all_finite(query(b), queries_of(b) * a_.channels));
  }
  int64_t* idx(int64_t b, int64_t i) const { return a_.idx + (b * a_.queries + i) * a_.k; }
  T* dist2(int64_t b, int64_t i) const {
    return a_.dist2 == nullptr ? nullptr : a_.dist2 + (b * a_.queries + i) * a_.k;
  }

 private:
  void leave_empty(int64_t b, int64_t first, int64_t end) const {
    if (first >= end) return;
    std::fill(idx(b, first), idx(b, end), int64_t(-1));
    if (a_.dist2 != nullptr) std::fill(dist2(b, first), dist2(b, end), infinity<T>);
  }

  const KnnArgs<T>& a_;
  const Parallel& parallel_;
};

template <class T>
void search_panels(const KnnArgs<T>& a, const Parallel& parallel) {
  Clouds<T> clouds(a, parallel);
  const int64_t depth = panel_depth(a.channels);
  clouds.template run<PackedCloud<T>>(
      round_up(a.candidates, kPanel<T>) * depth, 0, 64,
      [&](int64_t b, const Parallel&, T* values, int32_t*) {
        pack_points(clouds.points(b), clouds.points_of(b), a.channels, depth, values);
        return PackedCloud<T>{values, clouds.all_finite(b)};
      },
      [&] { return PanelSearch<T>(a.k, a.channels, depth, a.candidates); },
      [&](int64_t b, const PackedCloud<T>& cloud, PanelSearch<T>& search, int64_t first, int64_t count) {
        search.run(clouds.query(b), first, count, cloud, clouds.points_of(b), a.self, clouds.idx(b, first),
                   clouds.dist2(b, first));
      });
}

template <class T>
void search_tree(const KnnArgs<T>& a, const Parallel& parallel) {
  Clouds<T> clouds(a, parallel);
  const int64_t depth = panel_depth(a.channels);
  const bool other_set = a.self == Self::other_set;
  const TreeLayout layout(a.candidates, a.queries, other_set);
  struct Scratch {
    TreeSearch<T> tree;
    PanelSearch<T> panels;  // for clouds that are not finite
  };
  clouds.template run<TreeCloud<T>>(
      layout.values, layout.indices, kLeaf,
      [&](int64_t b, const Parallel& own, T* values, int32_t* indices) {
        const T* query = other_set ? clouds.query(b) : nullptr;
        const TreeCloud<T> cloud = plant_tree(clouds.points(b), clouds.points_of(b), query,
                                              clouds.queries_of(b), a.channels, own, values, indices);
        if (!cloud.usable) pack_points(clouds.points(b), clouds.points_of(b), a.channels, depth, values);
        return cloud;
      },
      [&] {
        return Scratch{TreeSearch<T>(a.k, a.channels, a.candidates),
                       PanelSearch<T>(a.k, a.channels, depth, a.candidates)};
      },
      [&](int64_t b, const TreeCloud<T>& cloud, Scratch& scratch, int64_t first, int64_t count) {
        if (cloud.usable)
          scratch.tree.run(clouds.query(b), cloud, first, count, a.self, clouds.idx(b, 0),
                           clouds.dist2(b, 0));
        else
          scratch.panels.run(clouds.query(b), first, count, PackedCloud<T>{cloud.values, false},
                             clouds.points_of(b), a.self, clouds.idx(b, first), clouds.dist2(b, first));
      });
}

template <class T>
void search_filtered(const KnnArgs<T>& a, const Parallel& parallel) {
  Clouds<T> clouds(a, parallel);
  const FilterLayout<T> layout(a.candidates, a.channels);
  clouds.template run<CentredCloud<T>>(
      layout.total, 0, FilteredSearch<T>::kBlock,
      [&](int64_t b, const Parallel&, T* values, int32_t*) {
        return centre_cloud(clouds.points(b), clouds.points_of(b), layout, values);
      },
      [&] { return FilteredSearch<T>(a.k, layout, a.candidates); },
      [&](int64_t b, const CentredCloud<T>& cloud, FilteredSearch<T>& search, int64_t first, int64_t count) {
        search.run(clouds.query(b), first, count, cloud, clouds.points_of(b), a.self, clouds.idx(b, first),
                   clouds.dist2(b, first));
      });
}

template <class T>
void search(const KnnArgs<T>& a, const Parallel& parallel) {
  if (a.batch * a.queries == 0) return;
  if (a.channels > kFewChannels)
    search_filtered(a, parallel);
  else if (a.channels <= kAxes && a.k <= kTreeMostNeighbours &&
           a.candidates >= std::max(kTreeLeast, kTreeLeastPerNeighbour * a.k))
    search_tree(a, parallel);
  else
    search_panels(a, parallel);
}

}  // namespace

void knn(const KnnArgs<float>& args, const Parallel& parallel) { search(args, parallel); }
void knn(const KnnArgs<double>& args, const Parallel& parallel) { search(args, parallel); }

}  // namespace crosspoint::CROSSPOINT_ISA
