// The contrastive losses on an NVIDIA GPU: crosspoint/ops/_gpu/nt_xent.py says what each launcher fills, and does the
// algebra between them. Arrays are contiguous, in device memory; launchers enqueue, allocate nothing and never wait.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "crosspoint/cuda/product.h"

namespace crosspoint::cuda {

enum class Float : int { bf16, f16, float32, float64 };

// Embeddings as they were given: (N, channels).
struct Embeddings {
  Float type;
  int64_t count, channels;
  const void* values;
};

// V views of N rows as `contrast_normalise` leaves them: rows (V, N, width), bfloat16, float16, float or double, and
// the factors to unit length, (V, N), float or, for float64, double. `temperature` (one), `exponents` and `target` have
// the type of `scale`.
struct ContrastColumns {
  Product product;
  int64_t views, samples, width;
  const void* rows;
  const void* scale;
  const void* temperature;
  const int32_t* labels;  // (N), or null: with one view, the columns of all rows are then those behind the rows
  const void* target;     // (N), with labels
  bool within_views;
  int64_t first_row;  // the rows of a view are [first_row, first_row + row_count) of its columns
  int64_t row_count;
  int64_t parts;  // of the columns, for each of which there is a result
};

// How `contrast_normalise` leaves rows: one behind the other, or as contrast_wgmma_* read them.
enum class RowOrder : int { plain, panels };

// rows (N, width) in the type of the product, and scale (N).
cudaError_t contrast_normalise(const Embeddings& z, Product, RowOrder, int64_t width, void* rows, void* scale,
                               cudaStream_t);

// cosine (left.count): of left i and right partner[i], or right i where partner is null.
cudaError_t contrast_positives(const Embeddings& left, const Embeddings& right, const int32_t* partner, double* cosine,
                               cudaStream_t);

// sums (parts, 3, row_views, row_count), in the type of scale.
cudaError_t contrast_sums(const ContrastColumns&, int64_t row_views, void* sums, cudaStream_t);

// partial (V, parts, row_count, width) and moments (V, parts, row_count), in the type of scale.
cudaError_t contrast_gradient(const ContrastColumns&, const void* exponents, void* partial, void* moments,
                              cudaStream_t);

// The same for bf16 and f16 of width 64, 128 or 256, rows in panels, on compute capability 9.0 (code for sm_90a).
cudaError_t contrast_wgmma_sums(const ContrastColumns&, int64_t row_views, void* sums, cudaStream_t);
cudaError_t contrast_wgmma_gradient(const ContrastColumns&, const void* exponents, void* partial, void* moments,
                                    cudaStream_t);

struct ContrastFinishArgs {
  Embeddings z, other;
  int64_t first_row, row_count, parts, width;
  const void* partial;     // (parts, row_count, width), float, or double for float64 embeddings
  const int32_t* partner;  // (N), or null
  const double* pull;      // (N)
  const double* factors;   // (2)
  void* dz;                // (row_count, channels), in the type of z
};
cudaError_t contrast_finish(const ContrastFinishArgs&, cudaStream_t);

}  // namespace crosspoint::cuda
