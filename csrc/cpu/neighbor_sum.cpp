// Sums over neighbours, added up in double; the backward pass is the same over the graph turned around.
#include "crosspoint/neighbor_sum.h"

#include <algorithm>

#include "buffer.h"
#include "graph.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// out = the sum of the rows of `cloud` that list[0], ..., list[count - 1] name, without -1.
template <class T, class Index>
void sum_rows(const T* cloud, int64_t channels, const Index* list, int64_t count, double* total, T* out) {
  std::fill(total, total + channels, 0.0);
  for (int64_t s = 0; s < count; ++s) {
    if (list[s] < 0) continue;
    const T* row = cloud + list[s] * channels;
    for (int64_t c = 0; c < channels; ++c) total[c] += row[c];
  }
  for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<T>(total[c]);
}

template <class T>
void forward(const NeighborSumArgs<T>& a, const Parallel& parallel) {
  const int64_t channels = a.channels;
  parallel.ranges(a.batch * a.nodes, 64, [&](int64_t begin, int64_t end) {
    Buffer<double> total(channels);
    for (int64_t i = begin; i < end; ++i)
      sum_rows(a.x + i / a.nodes * a.n * channels, channels, a.idx + i * a.k, a.k, total.data(),
               a.out + i * channels);
  });
}

template <class T>
void backward(const NeighborSumBackwardArgs<T>& a, const Parallel& parallel) {
  const int64_t n = a.n, channels = a.channels;
  ReverseGraph reverse;
  reverse.start.resize(a.batch * (n + 1));
  reverse.from.resize(a.batch * a.nodes * a.k);
  parallel.ranges(a.batch, 1, [&](int64_t begin, int64_t end) {
    Buffer<int32_t> in_degree(n);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* idx = a.idx + b * a.nodes * a.k;
      std::fill(in_degree.data(), in_degree.data() + n, 0);
      for (int64_t e = 0; e < a.nodes * a.k; ++e)
        if (idx[e] >= 0) ++in_degree[idx[e]];
      reverse_cloud(a.nodes, n, a.k, idx, in_degree.data(), reverse.start.data() + b * (n + 1),
                    reverse.from.data() + b * a.nodes * a.k);
    }
  });
  parallel.ranges(a.batch * n, 64, [&](int64_t begin, int64_t end) {
    Buffer<double> total(channels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / n;
      const int64_t* start = reverse.start.data() + b * (n + 1) + row % n;
      sum_rows(a.grad + b * a.nodes * channels, channels,
               reverse.from.data() + b * a.nodes * a.k + start[0], start[1] - start[0], total.data(),
               a.grad_x + row * channels);
    }
  });
}

}  // namespace

void neighbor_sum(const NeighborSumArgs<float>& args, const Parallel& parallel) { forward(args, parallel); }
void neighbor_sum(const NeighborSumArgs<double>& args, const Parallel& parallel) { forward(args, parallel); }
void neighbor_sum_backward(const NeighborSumBackwardArgs<float>& args, const Parallel& parallel) {
  backward(args, parallel);
}
void neighbor_sum_backward(const NeighborSumBackwardArgs<double>& args, const Parallel& parallel) {
  backward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
