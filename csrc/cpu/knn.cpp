// k nearest neighbours: which search a cloud gets, and how the work is handed out.
#include "crosspoint/knn.h"

#include "knn_filter.h"
#include "knn_panels.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

constexpr int64_t kWorkspaceBytes =
    16 << 20;  // clouds are prepared in groups of about this much, or one at a time

template <class T>
class Clouds {
 public:
  Clouds(const KnnArgs<T>& args, const Parallel& parallel) : a_(args), parallel_(parallel) {}

  // prepare(cloud, workspace) for each cloud, then search(cloud, workspace, scratch, first, count) for blocks
  // of its queries.
  template <class Prepare, class MakeScratch, class Search>
  void run(int64_t workspace_per_cloud, int64_t block, Prepare&& prepare, MakeScratch&& make_scratch,
           Search&& search) {
    const int64_t bytes = std::max<int64_t>(1, workspace_per_cloud * static_cast<int64_t>(sizeof(T)));
    const int64_t group = std::min(a_.batch, std::max<int64_t>(1, kWorkspaceBytes / bytes));
    Buffer<T> workspace(group * workspace_per_cloud);
    const int64_t blocks = (a_.queries + block - 1) / block;
    for (int64_t b0 = 0; b0 < a_.batch; b0 += group) {
      const int64_t here = std::min(group, a_.batch - b0);
      parallel_.ranges(here, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) prepare(b0 + b, b, workspace.data() + b * workspace_per_cloud);
      });
      parallel_.items(here * blocks, make_scratch, [&](int64_t item, auto& scratch) {
        const int64_t b = item / blocks, first = item % blocks * block;
        const int64_t end = std::min(first + block, a_.queries), valid = std::min(end, queries(b0 + b));
        if (first < valid)
          search(b0 + b, b, workspace.data() + b * workspace_per_cloud, scratch, first, valid - first);
        leave_empty(b0 + b, std::max(first, valid), end);
      });
    }
  }

  int64_t queries(int64_t b) const { return a_.lengths_query == nullptr ? a_.queries : a_.lengths_query[b]; }
  int64_t points(int64_t b) const {
    return a_.lengths_points == nullptr ? a_.candidates : a_.lengths_points[b];
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
  clouds.run(
      round_up(a.candidates, kPanel<T>) * depth, 64,
      [&](int64_t b, int64_t, T* workspace) {
        pack_points(a.points + b * a.candidates * a.channels, clouds.points(b), a.channels, depth, workspace);
      },
      [&] { return PanelSearch<T>(a.k, a.channels, depth, a.candidates); },
      [&](int64_t b, int64_t, const T* workspace, PanelSearch<T>& search, int64_t first, int64_t count) {
        search.run(a.query + b * a.queries * a.channels, first, count, workspace, clouds.points(b), a.self,
                   clouds.idx(b, first), clouds.dist2(b, first));
      });
}

template <class T>
void search_filtered(const KnnArgs<T>& a, const Parallel& parallel) {
  Clouds<T> clouds(a, parallel);
  const FilterLayout<T> layout(a.candidates, a.channels);
  Buffer<CentredCloud<T>> centred(a.batch);
  clouds.run(
      layout.total, FilteredSearch<T>::kBlock,
      [&](int64_t b, int64_t, T* workspace) {
        centred[b] =
            centre_cloud(a.points + b * a.candidates * a.channels, clouds.points(b), layout, workspace);
      },
      [&] { return FilteredSearch<T>(a.k, a.channels, a.candidates); },
      [&](int64_t b, int64_t, const T*, FilteredSearch<T>& search, int64_t first, int64_t count) {
        search.run(a.query + b * a.queries * a.channels, first, count, centred[b], clouds.points(b), a.self,
                   clouds.idx(b, first), clouds.dist2(b, first));
      });
}

template <class T>
void search(const KnnArgs<T>& a, const Parallel& parallel) {
  if (a.batch * a.queries == 0) return;
  if (a.channels <= kFewChannels)
    search_panels(a, parallel);
  else
    search_filtered(a, parallel);
}

}  // namespace

void knn(const KnnArgs<float>& args, const Parallel& parallel) { search(args, parallel); }
void knn(const KnnArgs<double>& args, const Parallel& parallel) { search(args, parallel); }

}  // namespace crosspoint::CROSSPOINT_ISA
