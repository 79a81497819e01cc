// The launchers of csrc/cuda/nt_xent*.cu for ctypes, with the arguments of the operators that bind them.
#include "crosspoint/cuda/nt_xent.h"

using namespace crosspoint::cuda;

namespace {

Embeddings embeddings(int64_t type, int64_t count, int64_t channels, const void* values) {
  return {static_cast<Float>(type), count, channels, values};
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int normalise(int64_t type, int64_t count, int64_t channels, const void* z, int64_t product, int64_t order,
              int64_t width, void* rows, void* scale) {
  return contrast_normalise(embeddings(type, count, channels, z), static_cast<Product>(product),
                            static_cast<RowOrder>(order), width, rows, scale, nullptr);
}

int positives(int64_t type, int64_t count, int64_t channels, const void* left, const void* right,
              const int32_t* partner, double* cosine) {
  return contrast_positives(embeddings(type, count, channels, left), embeddings(type, count, channels, right), partner,
                            cosine, nullptr);
}

int row_sums(int64_t product, int64_t views, int64_t samples, int64_t width, const void* rows, const void* scale,
             const void* temperature, const int32_t* labels, const void* target, int64_t within_views,
             int64_t first_row, int64_t row_count, int64_t parts, int64_t row_views, void* sums) {
  return contrast_sums({static_cast<Product>(product), views, samples, width, rows, scale, temperature, labels, target,
                        within_views != 0, first_row, row_count, parts},
                       row_views, sums, nullptr);
}

int gradient(int64_t product, int64_t views, int64_t samples, int64_t width, const void* rows, const void* scale,
             const void* temperature, const int32_t* labels, const void* target, int64_t within_views,
             int64_t first_row, int64_t row_count, int64_t parts, const void* exponents, void* partial,
             void* moments) {
  return contrast_gradient({static_cast<Product>(product), views, samples, width, rows, scale, temperature, labels,
                            target, within_views != 0, first_row, row_count, parts},
                           exponents, partial, moments, nullptr);
}

int wgmma_row_sums(int64_t product, int64_t views, int64_t samples, int64_t width, const void* rows, const void* scale,
                   const void* temperature, const int32_t* labels, const void* target, int64_t within_views,
                   int64_t first_row, int64_t row_count, int64_t parts, int64_t row_views, void* sums) {
  return contrast_wgmma_sums({static_cast<Product>(product), views, samples, width, rows, scale, temperature, labels,
                              target, within_views != 0, first_row, row_count, parts},
                             row_views, sums, nullptr);
}

int wgmma_gradient(int64_t product, int64_t views, int64_t samples, int64_t width, const void* rows, const void* scale,
                   const void* temperature, const int32_t* labels, const void* target, int64_t within_views,
                   int64_t first_row, int64_t row_count, int64_t parts, const void* exponents, void* partial,
                   void* moments) {
  return contrast_wgmma_gradient({static_cast<Product>(product), views, samples, width, rows, scale, temperature,
                                  labels, target, within_views != 0, first_row, row_count, parts},
                                 exponents, partial, moments, nullptr);
}

int finish(int64_t type, int64_t count, int64_t channels, const void* z, const void* other, int64_t first_row,
           int64_t row_count, int64_t parts, int64_t width, const void* partial, const int32_t* partner,
           const double* pull, const double* factors, void* dz) {
  return contrast_finish({embeddings(type, count, channels, z), embeddings(type, count, channels, other), first_row,
                          row_count, parts, width, partial, partner, pull, factors, dz},
                         nullptr);
}
}
