// The contrastive losses' forward pass: rows as they are multiplied, cosines of positives, and per row the sum of the
// exponentials of its columns, from tiles of products that never leave the registers.
#include "crosspoint/cuda/nt_xent.h"

#include "cuda/contrast_plain.h"
#include "cuda/contrast_rows.h"
#include "cuda/contrast_tile.h"
#include "cuda/panels.h"

namespace crosspoint::cuda {
namespace {

constexpr int kColumns = 128;  // of a tile

// ---- rows, a warp each

template <class T, RowOrder order>
__global__ void __launch_bounds__(kThreads) contrast_rows(const T* z, int64_t count, int64_t channels, Product product,
                                                          int64_t width, void* rows, void* scale) {
  for (int64_t i = blockIdx.x * int64_t(kWarps) + threadIdx.x / kWarp; i < count; i += gridDim.x * int64_t(kWarps)) {
    const T* row = z + i * channels;
    double square = 0;
    for (int64_t c = lane_id(); c < channels; c += kWarp) square += double(widen(row[c])) * double(widen(row[c]));
    const double length = fmax(sqrt(sum_of_warp(square)), shortest);
    int exponent;
    frexp(length, &exponent);
    const double power = square == square && length < INFINITY ? ldexp(1.0, 1 - exponent) : NAN;
    for (int64_t c = lane_id(); c < width; c += kWarp) {
      const double x = c < channels ? double(widen(row[c])) * power : 0.0;
      int64_t at = i * width + c;
      if constexpr (order == RowOrder::panels) at = PanelledRows{count, width}.group(i, c / 8) / 2 + c % 8;
      switch (product) {
        case Product::bf16: static_cast<__nv_bfloat16*>(rows)[at] = narrow<__nv_bfloat16>(x); break;
        case Product::f16: static_cast<__half*>(rows)[at] = narrow<__half>(x); break;
        case Product::tf32: static_cast<uint32_t*>(rows)[at] = to_tf32(static_cast<float>(x)); break;
        case Product::tf32x3: static_cast<float*>(rows)[at] = static_cast<float>(x); break;
        case Product::float64: static_cast<double*>(rows)[at] = x; break;
      }
    }
    if (lane_id() != 0) continue;
    const double factor = 1 / (length * power);
    if (product == Product::float64)
      static_cast<double*>(scale)[i] = factor;
    else
      static_cast<float*>(scale)[i] = static_cast<float>(factor);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) contrast_cosines(const T* left, const T* right, const int32_t* partner,
                                                             int64_t count, int64_t channels, double* cosine) {
  for (int64_t i = blockIdx.x * int64_t(kWarps) + threadIdx.x / kWarp; i < count; i += gridDim.x * int64_t(kWarps)) {
    const int64_t j = partner == nullptr ? i : partner[i];
    double own = 0, other = 0, both = 0;
    for (int64_t c = lane_id(); j >= 0 && c < channels; c += kWarp) {
      const double x = widen(left[i * channels + c]), y = widen(right[j * channels + c]);
      own += x * x;
      other += y * y;
      both += x * y;
    }
    own = fmax(sqrt(sum_of_warp(own)), shortest);
    other = fmax(sqrt(sum_of_warp(other)), shortest);
    both = sum_of_warp(both);
    if (lane_id() == 0) cosine[i] = both / own / other;
  }
}

// ---- sums

// A block for `kRows` rows and a part of the columns. Its rows stay in shared memory; columns pass in pieces of a line.
template <Product product, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    contrast_row_sums(ContrastColumns c, int pitch, int stages, int64_t row_views, float* sums) {
  constexpr int tall = 2, down = kRows / (16 * tall), across = kWarps / down, wide = kColumns / (16 * across);
  const int warp = threadIdx.x / kWarp, row = warp % down * 16 * tall, column = warp / down * 16 * wide;
  const int thread_row = row + lane_id() / 4, thread_column = column + lane_id() % 4 * 2;
  const BlockOfRows block(c, blockIdx.x, kRows);
  const auto tiles = block.tiles(kColumns, blockIdx.y, c.parts);
  const int row_bytes = static_cast<int>(c.width) * kElement<product>, pieces = pitch / kLine;
  const unsigned char* all_rows = static_cast<const unsigned char*>(c.rows);
  const float* scale = static_cast<const float*>(c.scale);
  const bool labelled = c.labels != nullptr;
  const Exponents<float> exponents(*static_cast<const float*>(c.temperature));

  SharedArena arena;
  const SharedRows left{arena.take<unsigned char>(kRows * pitch, kLine), pitch};
  unsigned char* ring = arena.take<unsigned char>(stages * kColumns * kLine, kLine);
  float* column_scale = arena.take<float>(2 * kColumns);  // of this tile and of the next
  int32_t* column_label = arena.take<int32_t>(2 * kColumns);

  RowSums<tall> own(c, block, thread_row, exponents);

  float next_scale = 0;
  int32_t next_label = 0;
  const auto fetch = [&](int tile) {
    const int at = block.begin + tile * kColumns + threadIdx.x;
    const bool there = threadIdx.x < kColumns && at < block.end;
    next_scale = there ? scale[at] : 0.f;
    next_label = there && labelled ? c.labels[at] : -1;
  };
  const auto put = [&](int tile) {
    if (threadIdx.x >= kColumns) return;
    column_scale[tile % 2 * kColumns + threadIdx.x] = next_scale;
    column_label[tile % 2 * kColumns + threadIdx.x] = next_label;
  };

  int load_tile = tiles.first, load_piece = 0, load_stage = 0;
  const auto load = [&] {
    if (load_tile < tiles.last) {
      const int first = block.begin + load_tile * kColumns;
      copy_rows({ring + load_stage * kColumns * kLine, kLine}, all_rows + int64_t(first) * row_bytes, row_bytes,
                kColumns, block.end - first, load_piece * kLine, kLine);
      if (++load_piece == pieces) load_piece = 0, ++load_tile;
      if (++load_stage == stages) load_stage = 0;
    }
    cp_async_commit();
  };
  copy_rows(left, all_rows + int64_t(block.own) * row_bytes, row_bytes, kRows, block.count, 0, pitch);
  for (int s = 0; s + 1 < stages; ++s) load();
  fetch(tiles.first);
  put(tiles.first);

  int stage = 0;
  Scores<product, tall, wide> scores;
#pragma unroll 1
  for (int tile = tiles.first; tile < tiles.last; ++tile) {
    scores.clear();
    fetch(tile + 1);
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      if (stages > 2)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
      __syncthreads();  // the piece is there, and the one before is done with
      load();
      const SharedRows right{ring + stage * kColumns * kLine, kLine};
      scores.template add<kLine / kStep>(left, row, piece * (kLine / kGroup), right, column, 0);
      if (++stage == stages) stage = 0;
    }
    put(tile + 1);

    const int at = tile % 2 * kColumns;
    own.add(scores.sum, {column_scale + at, nullptr, column_label + at, block.begin + tile * kColumns}, kColumns, block,
            thread_row, thread_column, labelled, exponents);
  }
  cp_async_wait<0>();
  __syncthreads();

  // Four lanes hold a row each, in `across` warps.
  float* met = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int r = 0; r < own.rows; ++r) {
    own.state[r].add_lanes();
    if (lane_id() % 4 != 0) continue;
    float* to = met + ((warp / down) * kRows + thread_row + 8 * r) * kStatistics;
    to[0] = own.state[r].bound, to[1] = own.state[r].sum, to[2] = own.state[r].positives;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < block.count; i += kThreads) {
    RowSum whole;
    for (int w = 0; w < across; ++w) {
      const float* from = met + (w * kRows + i) * kStatistics;
      RowSum other;
      other.bound = from[0], other.sum = from[1], other.positives = from[2];
      whole.add(other);
    }
    const int64_t plane = row_views * c.row_count;
    float* to = sums + (blockIdx.y * kStatistics * row_views + block.view) * c.row_count + block.first + i;
    to[0] = whole.bound, to[plane] = whole.sum, to[2 * plane] = whole.positives;
  }
}

template <Product product, int kRows>
cudaError_t launch_sums(const ContrastColumns& c, int64_t row_views, float* sums, cudaStream_t stream) {
  const int pitch = shared_pitch(c, kElement<product>);
  const auto bytes = [&](int stages) {
    return shared_bytes<unsigned char>(kRows * pitch) + shared_bytes<unsigned char>(stages * kColumns * kLine) +
           shared_bytes<float>(2 * kColumns) + shared_bytes<int32_t>(2 * kColumns);
  };
  const int stages = bytes(3) <= kMostShared ? 3 : 2;
  const int64_t blocks = row_views * ((c.row_count + kRows - 1) / kRows);
  return launch(contrast_row_sums<product, kRows>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(c.parts)),
                dim3(kThreads), bytes(stages), stream, c, pitch, stages, row_views, sums);
}

unsigned blocks_of_warps(int64_t rows) { return grid_of(rows * kWarp, kThreads).x; }

}  // namespace

cudaError_t contrast_normalise(const Embeddings& z, Product product, RowOrder order, int64_t width, void* rows,
                               void* scale, cudaStream_t stream) {
  return with_float(z.type, [&](auto zero) {
    using T = decltype(zero);
    const auto with = [&](auto kernel) {
      return launch(kernel, dim3(blocks_of_warps(z.count)), dim3(kThreads), 0, stream,
                    static_cast<const T*>(z.values), z.count, z.channels, product, width, rows, scale);
    };
    if (order == RowOrder::plain) return with(contrast_rows<T, RowOrder::plain>);
    if constexpr (sizeof(T) <= sizeof(float)) return with(contrast_rows<T, RowOrder::panels>);
    return cudaErrorInvalidValue;
  });
}

cudaError_t contrast_positives(const Embeddings& left, const Embeddings& right, const int32_t* partner, double* cosine,
                               cudaStream_t stream) {
  return with_float(left.type, [&](auto zero) {
    using T = decltype(zero);
    return launch(contrast_cosines<T>, dim3(blocks_of_warps(left.count)), dim3(kThreads), 0, stream,
                  static_cast<const T*>(left.values), static_cast<const T*>(right.values), partner, left.count,
                  left.channels, cosine);
  });
}

cudaError_t contrast_sums(const ContrastColumns& c, int64_t row_views, void* sums, cudaStream_t stream) {
  if (!contrast_fits(c)) return cudaErrorInvalidValue;
  if (c.product == Product::float64 || c.width > kMostWidth) return contrast_plain_sums(c, row_views, sums, stream);
  float* to = static_cast<float*>(sums);
  switch (c.product) {
    case Product::bf16:
      return c.width <= 512 ? launch_sums<Product::bf16, 128>(c, row_views, to, stream)
                            : launch_sums<Product::bf16, 64>(c, row_views, to, stream);
    case Product::f16:
      return c.width <= 512 ? launch_sums<Product::f16, 128>(c, row_views, to, stream)
                            : launch_sums<Product::f16, 64>(c, row_views, to, stream);
    case Product::tf32:
      return c.width <= 256 ? launch_sums<Product::tf32, 128>(c, row_views, to, stream)
                            : launch_sums<Product::tf32, 32>(c, row_views, to, stream);
    default:
      return c.width <= 512 ? launch_sums<Product::tf32x3, 64>(c, row_views, to, stream)
                            : launch_sums<Product::tf32x3, 32>(c, row_views, to, stream);
  }
}

}  // namespace crosspoint::cuda
