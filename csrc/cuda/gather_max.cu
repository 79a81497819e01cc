// Maxima over neighbours; backward, each row collects from the nodes that it won, over the graph turned around.
#include "crosspoint/cuda/gather_max.h"

#include "cuda/gather.h"

namespace crosspoint::cuda {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kGatherThreads, 4) find_most(GatherMaxArgs<T> a) {
  for_each_piece<V>(a.batch * a.nodes, a.channels, [&](int64_t row, int64_t c) {
    const T* cloud = a.x + row / a.nodes * a.n * a.channels + c;
    const int64_t* idx = a.idx + row * a.k;
    Values<T, V> most = {};
    Values<int32_t, V> slot;
#pragma unroll
    for (int v = 0; v < V; ++v) slot.v[v] = -1;
    gather<V>(
        0, a.k, [&](int64_t s) { return idx[s] >= 0 && idx[s] < a.n ? static_cast<int32_t>(s) : -1; },
        [&](int32_t s) { return cloud + idx[s] * a.channels; },
        [&](int32_t s, const Values<T, V>& x) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const T value = x.v[v], best = most.v[v];
            const bool wins = slot.v[v] < 0 || value > best || (value != value && best == best);
            most.v[v] = wins ? value : best;
            slot.v[v] = wins ? s : slot.v[v];
          }
        });
    values_at<V>(a.out + row * a.channels + c) = most;
    values_at<V>(a.slot + row * a.channels + c) = slot;
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kGatherThreads, 4)
    sum_winners(GatherMaxBackwardArgs<T> a, const int32_t* start, const int32_t* edges) {
  for_each_piece<V>(a.batch * a.n, a.channels, [&](int64_t row, int64_t c) {
    const int64_t b = row / a.n, j = row % a.n, first = b * a.nodes * a.channels + c;
    const int32_t *from = start + b * (a.n + 1) + j, *list = edges + b * a.nodes * a.k;
    const auto k = static_cast<uint32_t>(a.k);
    double total[V] = {};
    gather<V>(
        from[0], from[1], [&](int64_t e) { return list[e]; },
        [&](int32_t edge) { return a.slot + first + static_cast<uint32_t>(edge) / k * a.channels; },
        [&](int32_t edge, const Values<int32_t, V>& slot) {
          const uint32_t i = static_cast<uint32_t>(edge) / k, s = static_cast<uint32_t>(edge) - i * k;
#pragma unroll
          for (int v = 0; v < V; ++v)  // of k neighbours one has won: most gradients are not read
            if (slot.v[v] == static_cast<int32_t>(s)) total[v] += static_cast<double>(a.grad[first + i * a.channels + v]);
        });
    Values<T, V> rounded;
#pragma unroll
    for (int v = 0; v < V; ++v) rounded.v[v] = static_cast<T>(total[v]);
    values_at<V>(a.grad_x + row * a.channels + c) = rounded;
  });
}

template <class T>
cudaError_t forward(const GatherMaxArgs<T>& a, cudaStream_t stream) {
  const auto run = [&](auto kernel, int64_t width) {
    return launch(kernel, grid_of(a.batch * a.nodes * (a.channels / width), kGatherThreads), dim3(kGatherThreads), 0, stream, a);
  };
  constexpr int V = 16 / sizeof(T);
  return launch_by_width<T>(
      a.channels, [&] { return run(find_most<T, V>, V); }, [&] { return run(find_most<T, 1>, 1); }, a.x, a.out, a.slot);
}

template <class T>
cudaError_t backward(const GatherMaxBackwardArgs<T>& a, const int32_t* start, const int32_t* edges, cudaStream_t stream) {
  const auto run = [&](auto kernel, int64_t width) {
    return launch(kernel, grid_of(a.batch * a.n * (a.channels / width), kGatherThreads), dim3(kGatherThreads), 0, stream, a,
                  start, edges);
  };
  constexpr int V = 16 / sizeof(T);
  return launch_by_width<T>(
      a.channels, [&] { return run(sum_winners<T, V>, V); }, [&] { return run(sum_winners<T, 1>, 1); }, a.grad, a.slot,
      a.grad_x);
}

}  // namespace

cudaError_t gather_max(const GatherMaxArgs<float>& args, cudaStream_t stream) { return forward(args, stream); }
cudaError_t gather_max(const GatherMaxArgs<double>& args, cudaStream_t stream) { return forward(args, stream); }
cudaError_t gather_max_backward(const GatherMaxBackwardArgs<float>& args, const int32_t* start, const int32_t* edges,
                                cudaStream_t stream) {
  return backward(args, start, edges, stream);
}
cudaError_t gather_max_backward(const GatherMaxBackwardArgs<double>& args, const int32_t* start, const int32_t* edges,
                                cudaStream_t stream) {
  return backward(args, start, edges, stream);
}

}  // namespace crosspoint::cuda
