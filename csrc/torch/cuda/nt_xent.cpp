// The leaves of nt_xent on CUDA tensors, as crosspoint/ops/_gpu/nt_xent.py describes them. What they are given is
// contiguous and allocated by the orchestrator.
#include "crosspoint/cuda/nt_xent.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

cuda::Embeddings embeddings_of(const Tensor& z) {
  cuda::Float type = cuda::Float::float32;
  if (z.scalar_type() == ScalarType::BFloat16) type = cuda::Float::bf16;
  if (z.scalar_type() == ScalarType::Half) type = cuda::Float::f16;
  if (z.scalar_type() == ScalarType::Double) type = cuda::Float::float64;
  return {type, z.size(0), z.size(1), z.const_data_ptr()};
}

cuda::ContrastColumns columns_of(const Tensor& rows, const Tensor& scale, const Tensor& temperature,
                                 const OptionalTensor& labels, const OptionalTensor& target, int64_t product,
                                 int64_t first_row, bool within_views) {
  cuda::ContrastColumns columns{};
  columns.product = static_cast<cuda::Product>(product);
  columns.views = rows.size(0);
  columns.samples = rows.size(1);
  columns.width = rows.size(2);
  columns.rows = rows.const_data_ptr();
  columns.scale = scale.const_data_ptr();
  columns.temperature = temperature.const_data_ptr();
  columns.labels = optional_data<int32_t>(labels);
  columns.target = target.has_value() ? target->const_data_ptr() : nullptr;
  columns.within_views = within_views;
  columns.first_row = first_row;
  return columns;
}

template <cuda::RowOrder order>
void normalise(const Tensor& z, int64_t product, Tensor rows, Tensor scale) {
  const OnDeviceOf device(z);
  throw_if_failed(cuda::contrast_normalise(embeddings_of(z), static_cast<cuda::Product>(product), order, rows.size(1),
                                           rows.mutable_data_ptr(), scale.mutable_data_ptr(), device.stream()),
                  "nt_xent: normalise");
}

void positives(const Tensor& left, const Tensor& right, const OptionalTensor& partner, Tensor cosine) {
  const OnDeviceOf device(left);
  throw_if_failed(cuda::contrast_positives(embeddings_of(left), embeddings_of(right), optional_data<int32_t>(partner),
                                           mutable_data<double>(cosine), device.stream()),
                  "nt_xent: positives");
}

template <auto launch>
void row_sums(const Tensor& rows, const Tensor& scale, const Tensor& temperature, const OptionalTensor& labels,
              const OptionalTensor& target, int64_t product, int64_t first_row, bool within_views, Tensor sums) {
  const OnDeviceOf device(rows);
  cuda::ContrastColumns columns =
      columns_of(rows, scale, temperature, labels, target, product, first_row, within_views);
  columns.parts = sums.size(0);
  columns.row_count = sums.size(3);
  throw_if_failed(launch(columns, sums.size(2), sums.mutable_data_ptr(), device.stream()),
                  "nt_xent: row_sums");
}

template <auto launch>
void gradient(const Tensor& rows, const Tensor& scale, const Tensor& temperature, const Tensor& exponents,
              const OptionalTensor& labels, const OptionalTensor& target, int64_t product, int64_t first_row,
              bool within_views, Tensor partial, Tensor moments) {
  const OnDeviceOf device(rows);
  cuda::ContrastColumns columns =
      columns_of(rows, scale, temperature, labels, target, product, first_row, within_views);
  columns.parts = partial.size(1);
  columns.row_count = partial.size(2);
  throw_if_failed(launch(columns, exponents.const_data_ptr(), partial.mutable_data_ptr(), moments.mutable_data_ptr(),
                         device.stream()),
                  "nt_xent: gradient");
}

void finish(const Tensor& partial, const Tensor& z, const Tensor& other, const OptionalTensor& partner,
            const Tensor& pull, const Tensor& factors, int64_t first_row, Tensor dz) {
  const OnDeviceOf device(z);
  const cuda::ContrastFinishArgs args{embeddings_of(z),
                                      embeddings_of(other),
                                      first_row,
                                      partial.size(1),
                                      partial.size(0),
                                      partial.size(2),
                                      partial.const_data_ptr(),
                                      optional_data<int32_t>(partner),
                                      data<double>(pull),
                                      data<double>(factors),
                                      dz.mutable_data_ptr()};
  throw_if_failed(cuda::contrast_finish(args, device.stream()), "nt_xent: finish");
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CUDA, m) {
  using namespace crosspoint::cuda;
  m.impl("_nt_xent_normalise", TORCH_BOX(&crosspoint::binding::normalise<RowOrder::plain>));
  m.impl("_nt_xent_positives", TORCH_BOX(&crosspoint::binding::positives));
  m.impl("_nt_xent_row_sums", TORCH_BOX(&crosspoint::binding::row_sums<contrast_sums>));
  m.impl("_nt_xent_gradient", TORCH_BOX(&crosspoint::binding::gradient<contrast_gradient>));
  m.impl("_nt_xent_finish", TORCH_BOX(&crosspoint::binding::finish));
  m.impl("_nt_xent_wgmma_normalise", TORCH_BOX(&crosspoint::binding::normalise<RowOrder::panels>));
  m.impl("_nt_xent_wgmma_row_sums", TORCH_BOX(&crosspoint::binding::row_sums<contrast_wgmma_sums>));
  m.impl("_nt_xent_wgmma_gradient", TORCH_BOX(&crosspoint::binding::gradient<contrast_wgmma_gradient>));
}
