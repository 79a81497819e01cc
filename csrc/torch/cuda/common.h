// What every CUDA binding needs besides ../common.h: the device, its current stream, workspace, errors.
#pragma once

#include <cuda_runtime_api.h>

#if !defined(USE_CUDA)
#define USE_CUDA  // torch declares its stable CUDA functions only then
#endif
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../common.h"

namespace crosspoint::binding {

// Makes a tensor's device the current one, as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(index_, &stream) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("torch has no current CUDA stream on device " + std::to_string(index_));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Bytes on the device of `like`, from torch's allocator; to be kept until the kernels that use them are enqueued.
inline Tensor workspace(const Tensor& like, size_t bytes) {
  return new_tensor(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

inline void throw_if_failed(cudaError_t status, const char* op) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

// Whether CROSSPOINT_CHECK=1 asks to look at values on the device, which waits for it.
inline bool values_are_checked() {
  const char* setting = std::getenv("CROSSPOINT_CHECK");
  return setting != nullptr && std::string(setting) == "1";
}

inline Tensor on_cpu(const Tensor& x) {
  return torch::stable::to(x, std::nullopt, std::nullopt,
                           torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// lengths as contiguous int64; the kernels clamp what is out of [0, most].
inline Lengths prepared(const Lengths& lengths, int64_t most, const char* name) {
  if (!lengths.has_value()) return std::nullopt;
  Tensor values = dense(*lengths, ScalarType::Long);
  if (values_are_checked()) {
    const Tensor host = on_cpu(values);
    check_lengths(name, data<int64_t>(host), host.size(0), most);
  }
  return values;
}

}  // namespace crosspoint::binding
