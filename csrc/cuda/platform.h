// What every .cu file needs besides CUDA itself: launching, and shared memory. The two things that another
// compiler cannot read, `<<<>>>` and `extern __shared__`, stand here alone, so the same sources run on the host
// in tests/simt (which defines CROSSPOINT_SIMT and its own cuda_runtime.h).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace crosspoint::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct identity {
  using type = T;
};

// Bytes that a piece of `count` T takes of a SharedArena: pieces start at multiples of `align`.
template <class T>
__host__ __device__ constexpr size_t shared_bytes(size_t count, size_t align = 16) {
  return (count * sizeof(T) + align - 1) / align * align;
}

// A grid of at most 2^20 blocks, whose threads go on by strides of the grid where there are more items.
inline dim3 grid_of(int64_t items, int threads) {
  constexpr int64_t most = 1 << 20;
  const int64_t blocks = (items + threads - 1) / threads;
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

#if defined(CROSSPOINT_SIMT)

#define CROSSPOINT_SHARED(name, ...)        \
  static const char name##_simt_key_ = 0; \
  auto& name = simt::shared_variable<typename crosspoint::cuda::identity<__VA_ARGS__>::type>(&name##_simt_key_, #name)

using SharedArena = simt::SharedArena;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  return simt::launch(grid, block, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

#else

// A variable in the block's shared memory: CROSSPOINT_SHARED(tile, float[32][33]);
#define CROSSPOINT_SHARED(name, ...) __shared__ typename crosspoint::cuda::identity<__VA_ARGS__>::type name

// The launch's dynamic shared memory, handed out piece by piece: one arena in a kernel, every thread takes the
// same pieces in the same order, and the launch asks for the sum of their shared_bytes.
class SharedArena {
 public:
  template <class T>
  __device__ __forceinline__ T* take(size_t count, size_t align = 16) {
    extern __shared__ __align__(1024) unsigned char crosspoint_dynamic_shared[];
    used_ = (used_ + align - 1) / align * align;
    T* piece = reinterpret_cast<T*>(crosspoint_dynamic_shared + used_);
    used_ += shared_bytes<T>(count);
    return piece;
  }

 private:
  size_t used_ = 0;
};

// Launches the kernel unless the grid is empty; the error is cudaGetLastError's.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

#endif

}  // namespace crosspoint::cuda
