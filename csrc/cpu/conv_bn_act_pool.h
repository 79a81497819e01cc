// What the two passes of conv_bn_act_pool share: how rows are cut into work, and the norm of one value.
#pragma once

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "crosspoint/conv_bn_act_pool.h"
#include "gemm.h"

namespace crosspoint::CROSSPOINT_ISA {

// Rows of one cloud, none of them padding. The cut does not depend on the number of threads, so neither do results.
struct Chunk {
  static constexpr int64_t most_rows = 256;
  int64_t cloud, first, rows;
};

template <class T>
int64_t length_of(const ConvBnActPoolLayer<T>& layer, int64_t cloud) {
  return layer.lengths == nullptr ? layer.n : layer.lengths[cloud];
}

template <class T>
std::vector<Chunk> chunks_of(const ConvBnActPoolLayer<T>& layer) {
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < layer.batch; ++b)
    for (int64_t first = 0; first < length_of(layer, b); first += Chunk::most_rows)
      chunks.push_back({b, first, std::min(Chunk::most_rows, length_of(layer, b) - first)});
  return chunks;
}

template <class T>
int64_t rows_of(const ConvBnActPoolLayer<T>& layer) {
  int64_t rows = 0;
  for (int64_t b = 0; b < layer.batch; ++b) rows += length_of(layer, b);
  return rows;
}

// The norm of every channel: z = scale (h - mean) + shift. The mean in two parts, so that far offsets lose nothing.
template <class T>
struct Norm {
  Norm(const ConvBnActPoolLayer<T>& layer, const double* mean, const double* rstd)
      : scale(layer.c_out), shift(layer.c_out), high(layer.c_out), low(layer.c_out) {
    for (int64_t c = 0; c < layer.c_out; ++c) {
      scale[c] = T(layer.gamma[c] * rstd[c]);
      shift[c] = layer.beta[c];
      high[c] = T(mean[c]);
      low[c] = T(mean[c] - double(high[c]));
    }
  }

  T centred(T h, int64_t c) const { return (h - high[c]) - low[c]; }
  T operator()(T h, int64_t c) const { return scale[c] * centred(h, c) + shift[c]; }

  Buffer<T> scale, shift, high, low;
};

}  // namespace crosspoint::CROSSPOINT_ISA
