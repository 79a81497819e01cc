// What every binding needs: torch's stable ABI, its thread pool as a Parallel, typed pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "crosspoint/parallel.h"

namespace crosspoint::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Parallel torch_pool() {
  const auto run = [](void*, int, int64_t n, int64_t grain, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return Parallel(run, static_cast<int>(torch::stable::get_num_threads()));
}

// float64 stays; float32 and the half types are computed in float32.
inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// x as contiguous memory of the given dtype (itself where it already is).
inline Tensor dense(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

inline std::optional<Tensor> optional_dense(const std::optional<Tensor>& x, ScalarType dtype) {
  if (!x.has_value()) return std::nullopt;
  return dense(*x, dtype);
}

// To x, what was computed in its dense form, where that is a copy.
inline void copy_back(std::optional<Tensor>& x, const std::optional<Tensor>& dense) {
  if (x.has_value() && dense->data_ptr() != x->data_ptr()) torch::stable::copy_(*x, *dense);
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
const T* optional_data(const std::optional<Tensor>& x) {
  return x.has_value() ? data<T>(*x) : nullptr;
}

// Calls f(T{}) with T = double or float, after compute_dtype.
template <class F>
auto with_compute_type(ScalarType dtype, F&& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

using Lengths = std::optional<Tensor>;

// lengths as contiguous int64, each of them checked to be in [0, most].
inline Lengths checked(const Lengths& lengths, int64_t batch, int64_t most, const char* name) {
  if (!lengths.has_value()) return std::nullopt;
  Tensor values = dense(*lengths, ScalarType::Long);
  check_lengths(name, data<int64_t>(values), batch, most);
  return values;
}

inline const int64_t* pointer(const Lengths& lengths) {
  return lengths.has_value() ? data<int64_t>(*lengths) : nullptr;
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, shape, dtype);
  } catch (const std::exception&) {  // torch's reason does not come through the stable interface
    std::string sizes;
    for (int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    throw std::runtime_error("could not allocate a tensor of shape (" + sizes +
                             "): out of memory, or an earlier call has failed on the device");
  }
}

}  // namespace crosspoint::binding
