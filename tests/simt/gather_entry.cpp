// csrc/cuda/gather_max.cu and neighbor_sum.cu for ctypes.
#include "crosspoint/cuda/gather_max.h"
#include "crosspoint/cuda/neighbor_sum.h"

using namespace crosspoint;

namespace {

struct Call {
  int64_t is_double, batch, n, nodes, k, channels;
  const void* rows;  // x, or the gradient
  const int64_t* idx;
  const int32_t *start, *edges;  // the graph turned around
  void* out;
  int32_t* slots;
};

template <class F>
cudaError_t with_type(const Call& call, F&& f) {
  return call.is_double != 0 ? f(double{}) : f(float{});
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

cudaError_t neighbor_sum(const Call* c) {
  return with_type(*c, [&](auto zero) {
    using T = decltype(zero);
    return cuda::neighbor_sum(NeighborSumArgs<T>{c->batch, c->n, c->nodes, c->k, c->channels, static_cast<const T*>(c->rows), c->idx,
                                                 static_cast<T*>(c->out)}, nullptr);
  });
}

cudaError_t neighbor_sum_backward(const Call* c) {
  return with_type(*c, [&](auto zero) {
    using T = decltype(zero);
    return cuda::neighbor_sum_backward(NeighborSumBackwardArgs<T>{c->batch, c->n, c->nodes, c->k, c->channels,
                                                                  static_cast<const T*>(c->rows), c->idx, static_cast<T*>(c->out)},
                                       c->start, c->edges, nullptr);
  });
}

cudaError_t gather_max(const Call* c) {
  return with_type(*c, [&](auto zero) {
    using T = decltype(zero);
    return cuda::gather_max(GatherMaxArgs<T>{c->batch, c->n, c->nodes, c->k, c->channels, static_cast<const T*>(c->rows), c->idx,
                                             static_cast<T*>(c->out), c->slots}, nullptr);
  });
}

cudaError_t gather_max_backward(const Call* c) {
  return with_type(*c, [&](auto zero) {
    using T = decltype(zero);
    return cuda::gather_max_backward(GatherMaxBackwardArgs<T>{c->batch, c->n, c->nodes, c->k, c->channels,
                                                              static_cast<const T*>(c->rows), c->idx, c->slots, static_cast<T*>(c->out)},
                                     c->start, c->edges, nullptr);
  });
}
}
