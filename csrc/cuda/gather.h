// What the kernels share that gather rows: a thread owns V neighbouring channels of one row of the result, and
// neighbouring threads own neighbouring channels, so that a warp reads whole rows.
#pragma once

#include <type_traits>

#include "cuda/rows.h"

namespace crosspoint::cuda {

inline constexpr int kGatherThreads = 256;

// Row and first channel of each of this thread's pieces of a result of `rows` rows.
template <int V, class F>
__device__ __forceinline__ void for_each_piece(int64_t rows, int64_t channels, F&& piece) {
  const int64_t groups = channels / V;
  for (int64_t i = blockIdx.x * int64_t(kGatherThreads) + threadIdx.x; i < rows * groups; i += gridDim.x * int64_t(kGatherThreads))
    piece(i / groups, i % groups * V);
}

// Calls visit(entry(s), V values at place(entry(s))) for s in [begin, end), in order, where the entry is not negative.
// Several places are read before the first of them is needed.
template <int V, class Entry, class Place, class Visit>
__device__ __forceinline__ void gather(int64_t begin, int64_t end, Entry&& entry, Place&& place, Visit&& visit) {
  constexpr int ahead = 4;
  for (int64_t first = begin; first < end; first += ahead) {
    decltype(entry(first)) entries[ahead];
    std::decay_t<decltype(values_at<V>(place(entries[0])))> values[ahead] = {};
#pragma unroll
    for (int u = 0; u < ahead; ++u) entries[u] = first + u < end ? entry(first + u) : -1;
#pragma unroll
    for (int u = 0; u < ahead; ++u)
      if (entries[u] >= 0) values[u] = values_at<V>(place(entries[u]));
#pragma unroll
    for (int u = 0; u < ahead; ++u)
      if (entries[u] >= 0) visit(entries[u], values[u]);
  }
}

// Launches wide(), for 16 bytes a thread, where rows of `channels` T at these addresses can be read so, else narrow().
template <class T, class Wide, class Narrow, class... Pointers>
cudaError_t launch_by_width(int64_t channels, Wide&& wide, Narrow&& narrow, const Pointers*... pointers) {
  const uintptr_t bits = (static_cast<uintptr_t>(channels * sizeof(T)) | ... | reinterpret_cast<uintptr_t>(pointers));
  return bits % 16 == 0 ? wide() : narrow();
}

}  // namespace crosspoint::cuda
