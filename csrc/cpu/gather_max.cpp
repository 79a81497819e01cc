// Maxima over neighbours, lanes over channels; the backward pass goes from the winners to the rows they came from.
#include "crosspoint/gather_max.h"

#include <algorithm>

#include "buffer.h"
#include "winners.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// One node: V vectors of channels, of which `rest` elements exist.
template <int V, class T>
void find_most(const T* cloud, int64_t channels, const int64_t* neighbours, int64_t k, T* out, int32_t* slots,
               int64_t rest) {
  constexpr int64_t L = lanes<T>;
  Vec<T> most[V] = {};
  Mask<T> slot[V];
  for (int v = 0; v < V; ++v) slot[v] = Mask<T>{} - 1;
  bool first = true;
  for (int64_t s = 0; s < k; ++s) {
    if (neighbours[s] < 0) continue;
    const T* row = cloud + neighbours[s] * channels;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> value = load_part(row + v * L, rest - v * L);
      const Mask<T> wins = first ? ~Mask<T>{} : beats<true, T>(value, most[v], Vec<T>{});
      most[v] = wins ? value : most[v];
      slot[v] = wins ? Mask<T>{} + static_cast<int32_t>(s) : slot[v];
    }
    first = false;
  }
  for (int v = 0; v < V; ++v) {
    store_part(out + v * L, most[v], rest - v * L);
    store_slots<T>(slots, 4, v * L, slot[v], rest - v * L);
  }
}

template <class T>
void forward(const GatherMaxArgs<T>& a, const Parallel& parallel) {
  const int64_t channels = a.channels;
  parallel.ranges(a.batch * a.nodes, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* cloud = a.x + i / a.nodes * a.n * channels;
      over_columns<T>(channels, [&](auto vectors, int64_t c) {
        find_most<vectors.value>(cloud + c, channels, a.idx + i * a.k, a.k, a.out + i * channels + c,
                                 a.slot + i * channels + c, channels - c);
      });
    }
  });
}

// A thread owns some channels of a cloud, and walks its nodes in order.
template <class T>
void backward(const GatherMaxBackwardArgs<T>& a, const Parallel& parallel) {
  constexpr int64_t width = 32;
  const int64_t channels = a.channels, blocks = (channels + width - 1) / width;
  const auto make_scratch = [&] { return Buffer<double>(a.n * width); };
  parallel.items(a.batch * blocks, make_scratch, [&](int64_t item, Buffer<double>& sums) {
    const int64_t b = item / blocks, first = item % blocks * width, count = std::min(width, channels - first);
    std::fill(sums.data(), sums.data() + a.n * width, 0.0);
    for (int64_t i = b * a.nodes; i < (b + 1) * a.nodes; ++i) {
      const T* grad = a.grad + i * channels + first;
      const int32_t* slot = a.slot + i * channels + first;
      for (int64_t c = 0; c < count; ++c)
        if (slot[c] >= 0) sums[a.idx[i * a.k + slot[c]] * width + c] += grad[c];
    }
    for (int64_t j = 0; j < a.n; ++j)
      for (int64_t c = 0; c < count; ++c)
        a.grad_x[(b * a.n + j) * channels + first + c] = static_cast<T>(sums[j * width + c]);
  });
}

}  // namespace

void gather_max(const GatherMaxArgs<float>& args, const Parallel& parallel) { forward(args, parallel); }
void gather_max(const GatherMaxArgs<double>& args, const Parallel& parallel) { forward(args, parallel); }
void gather_max_backward(const GatherMaxBackwardArgs<float>& args, const Parallel& parallel) {
  backward(args, parallel);
}
void gather_max_backward(const GatherMaxBackwardArgs<double>& args, const Parallel& parallel) {
  backward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
