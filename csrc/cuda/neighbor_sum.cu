// Sums over neighbours, added up in double and rounded once; the transpose is the same over the graph turned around.
#include "crosspoint/cuda/neighbor_sum.h"

#include "cuda/gather.h"

namespace crosspoint::cuda {
namespace {

template <int V>
struct Total {
  double sums[V] = {};

  template <class T>
  __device__ __forceinline__ void add(const Values<T, V>& more) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += static_cast<double>(more.v[v]);
  }
  template <class T>
  __device__ __forceinline__ void store(T* place) const {
    Values<T, V> rounded;
#pragma unroll
    for (int v = 0; v < V; ++v) rounded.v[v] = static_cast<T>(sums[v]);
    values_at<V>(place) = rounded;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kGatherThreads, 4) sum_neighbours(NeighborSumArgs<T> a) {
  for_each_piece<V>(a.batch * a.nodes, a.channels, [&](int64_t row, int64_t c) {
    const T* cloud = a.x + row / a.nodes * a.n * a.channels + c;
    const int64_t* idx = a.idx + row * a.k;
    Total<V> total;
    gather<V>(
        0, a.k, [&](int64_t s) { return idx[s] < a.n ? idx[s] : -1; },
        [&](int64_t j) { return cloud + j * a.channels; },
        [&](int64_t, const Values<T, V>& x) { total.add(x); });
    total.store(a.out + row * a.channels + c);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kGatherThreads, 4)
    sum_turned(NeighborSumBackwardArgs<T> a, const int32_t* start, const int32_t* edges) {
  for_each_piece<V>(a.batch * a.n, a.channels, [&](int64_t row, int64_t c) {
    const int64_t b = row / a.n, j = row % a.n;
    const T* cloud = a.grad + b * a.nodes * a.channels + c;
    const int32_t *from = start + b * (a.n + 1) + j, *list = edges + b * a.nodes * a.k;
    const auto k = static_cast<uint32_t>(a.k);
    Total<V> total;
    gather<V>(
        from[0], from[1], [&](int64_t e) { return static_cast<int32_t>(static_cast<uint32_t>(list[e]) / k); },
        [&](int32_t i) { return cloud + i * a.channels; },
        [&](int32_t, const Values<T, V>& grad) { total.add(grad); });
    total.store(a.grad_x + row * a.channels + c);
  });
}

template <class T>
cudaError_t forward(const NeighborSumArgs<T>& a, cudaStream_t stream) {
  const auto run = [&](auto kernel, int64_t width) {
    return launch(kernel, grid_of(a.batch * a.nodes * (a.channels / width), kGatherThreads), dim3(kGatherThreads), 0, stream, a);
  };
  constexpr int V = 16 / sizeof(T);
  return launch_by_width<T>(
      a.channels, [&] { return run(sum_neighbours<T, V>, V); }, [&] { return run(sum_neighbours<T, 1>, 1); }, a.x, a.out);
}

template <class T>
cudaError_t backward(const NeighborSumBackwardArgs<T>& a, const int32_t* start, const int32_t* edges, cudaStream_t stream) {
  const auto run = [&](auto kernel, int64_t width) {
    return launch(kernel, grid_of(a.batch * a.n * (a.channels / width), kGatherThreads), dim3(kGatherThreads), 0, stream, a,
                  start, edges);
  };
  constexpr int V = 16 / sizeof(T);
  return launch_by_width<T>(
      a.channels, [&] { return run(sum_turned<T, V>, V); }, [&] { return run(sum_turned<T, 1>, 1); }, a.grad, a.grad_x);
}

}  // namespace

cudaError_t neighbor_sum(const NeighborSumArgs<float>& args, cudaStream_t stream) { return forward(args, stream); }
cudaError_t neighbor_sum(const NeighborSumArgs<double>& args, cudaStream_t stream) { return forward(args, stream); }
cudaError_t neighbor_sum_backward(const NeighborSumBackwardArgs<float>& args, const int32_t* start, const int32_t* edges,
                                  cudaStream_t stream) {
  return backward(args, start, edges, stream);
}
cudaError_t neighbor_sum_backward(const NeighborSumBackwardArgs<double>& args, const int32_t* start, const int32_t* edges,
                                  cudaStream_t stream) {
  return backward(args, start, edges, stream);
}

}  // namespace crosspoint::cuda
