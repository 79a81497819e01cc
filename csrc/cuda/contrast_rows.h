// Embeddings of any floating type, read and written one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "crosspoint/cuda/nt_xent.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {

__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

template <class T>
__device__ __forceinline__ T narrow(double x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(double x) {
  return __float2bfloat16_rn(static_cast<float>(x));
}
template <>
__device__ __forceinline__ __half narrow<__half>(double x) {
  return __float2half_rn(static_cast<float>(x));
}

// Calls f with a value of the type.
template <class F>
cudaError_t with_float(Float type, F&& f) {
  switch (type) {
    case Float::bf16: return f(__nv_bfloat16());
    case Float::f16: return f(__half());
    case Float::float32: return f(float());
    case Float::float64: return f(double());
  }
  return cudaErrorInvalidValue;
}

// The same in every lane.
__device__ __forceinline__ double sum_of_warp(double value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

}  // namespace crosspoint::cuda
