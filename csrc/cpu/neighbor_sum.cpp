// Sums over neighbours: a gather, added up in double.
#include "crosspoint/neighbor_sum.h"

#include <algorithm>

#include "buffer.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

template <class T>
void add_up(const NeighborSumArgs<T>& a, const Parallel& parallel) {
  const int64_t channels = a.channels;
  parallel.ranges(a.batch * a.nodes, 64, [&](int64_t begin, int64_t end) {
    Buffer<double> space(channels);
    double* total = space.data();
    for (int64_t i = begin; i < end; ++i) {
      const T* cloud = a.x + i / a.nodes * a.n * channels;
      std::fill(total, total + channels, 0.0);
      for (int64_t s = 0; s < a.k; ++s) {
        const int64_t j = a.idx[i * a.k + s];
        if (j < 0) continue;
        const T* row = cloud + j * channels;
        for (int64_t c = 0; c < channels; ++c) total[c] += row[c];
      }
      for (int64_t c = 0; c < channels; ++c) a.out[i * channels + c] = static_cast<T>(total[c]);
    }
  });
}

}  // namespace

void neighbor_sum(const NeighborSumArgs<float>& args, const Parallel& parallel) { add_up(args, parallel); }
void neighbor_sum(const NeighborSumArgs<double>& args, const Parallel& parallel) { add_up(args, parallel); }

}  // namespace crosspoint::CROSSPOINT_ISA
