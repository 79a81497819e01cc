// The contrastive losses without tensor cores: for float64, and for rows too wide for the tiles of contrast.h.
#pragma once

#include "crosspoint/cuda/nt_xent.h"

namespace crosspoint::cuda {

inline constexpr int64_t kMostWidth = 1024;  // of a row in those tiles

// Whether columns and parts can be counted as the kernels do.
inline bool contrast_fits(const ContrastColumns& c) {
  return c.views * c.samples < INT32_MAX / 2 && c.parts >= 1 && c.parts <= 65535 && c.width < INT32_MAX / 8;
}

cudaError_t contrast_plain_sums(const ContrastColumns&, int64_t row_views, void* sums, cudaStream_t);
cudaError_t contrast_plain_gradient(const ContrastColumns&, const void* exponents, void* partial, void* moments,
                                    cudaStream_t);

}  // namespace crosspoint::cuda
