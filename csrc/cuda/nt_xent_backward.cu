// The contrastive losses' backward pass. A block owns rows: it forms their products with a tile of columns, turns them
// into weights, both softmaxes at once, and multiplies these with the same tile. Nobody else writes to its rows.
#include "cuda/contrast_plain.h"
#include "cuda/contrast_rows.h"
#include "cuda/contrast_tile.h"

namespace crosspoint::cuda {
namespace {

// How a block is cut: `rows` by `columns` in a tile, the depth of their products over `deep` groups of warps, channels
// up to `width`, and how many tiles there is room for at a time.
template <int rows_, int columns_, int deep_, int width_, int stages_, int blocks_>
struct Cut {
  static constexpr int rows = rows_, columns = columns_, deep = deep_, width = width_, stages = stages_;
  static constexpr int blocks = blocks_;  // of a multiprocessor, as far as registers go
  // The warps over the scores of a tile.
  static constexpr int down = rows >= 64 ? 4 : rows / 16, across = kWarps / deep / down;
};

template <Product product>
__device__ __forceinline__ void store_pair(const SharedRows& to, int row, int column, float low, float high) {
  if constexpr (product == Product::bf16) {
    *to.at<uint32_t>(row, 2 * column) = pack_bf16(low, high);
  } else if constexpr (product == Product::f16) {
    *to.at<uint32_t>(row, 2 * column) = pack_f16(low, high);
  } else if constexpr (product == Product::tf32) {
    *to.at<uint2>(row, 4 * column) = make_uint2(to_tf32(low), to_tf32(high));
  } else {
    *to.at<float2>(row, 4 * column) = make_float2(low, high);
  }
}

template <Product product, class C>
__global__ void __launch_bounds__(kThreads, C::blocks)
    contrast_row_gradient(ContrastColumns c, int pitch, const float* exponents_of, float* partial, float* moments) {
  constexpr int element = kElement<product>;
  constexpr int down = C::down, across = C::across;
  constexpr int tall = C::rows / (16 * down), wide = C::columns / (16 * across);  // scores of a warp
  // The warps over the rows and channels of the gradient.
  constexpr int out_down = C::rows == 128 ? 2 : 1, out_across = kWarps / out_down;
  constexpr int out_tall = C::rows / (16 * out_down), out_wide = C::width / (16 * out_across);
  const int warp = threadIdx.x / kWarp, place = warp % (down * across), depth = warp / (down * across);
  const int row = place % down * 16 * tall, column = place / down * 16 * wide;
  const int thread_row = row + lane_id() / 4, thread_column = column + lane_id() % 4 * 2;
  const int out_row = warp % out_down * 16 * out_tall, out_column = warp / out_down * 16;
  const BlockOfRows block(c, blockIdx.x, C::rows);
  const auto tiles = block.tiles(C::columns, blockIdx.y, c.parts);
  const int width = static_cast<int>(c.width), row_bytes = width * element, steps = pitch / kStep;
  const unsigned char* all_rows = static_cast<const unsigned char*>(c.rows);
  const float* scale = static_cast<const float*>(c.scale);
  const bool labelled = c.labels != nullptr;
  const Exponents<float> exponents(*static_cast<const float*>(c.temperature));

  SharedArena arena;
  const SharedRows left{arena.take<unsigned char>(C::rows * pitch, kLine), pitch};
  unsigned char* ring = arena.take<unsigned char>(C::stages * C::columns * pitch, kLine);
  const SharedRows weights{arena.take<unsigned char>(C::rows * C::columns * element, kLine), C::columns * element};
  float* column_weight = arena.take<float>(2 * C::columns);  // of this tile and of the next
  float* column_scale = arena.take<float>(2 * C::columns);
  int32_t* column_label = arena.take<int32_t>(2 * C::columns);
  float* moment = arena.take<float>(across * C::rows);  // a sum for each row and warp that meets it
  float* parts = arena.take<float>(C::deep > 1 ? kThreads * 8 : 0);

  const RowWeights<tall> own(c, block, thread_row, exponents, exponents_of);

  float next_weight = 0, next_scale = 0;
  int32_t next_label = 0;
  const auto fetch = [&](int tile) {
    const int at = block.begin + tile * C::columns + threadIdx.x;
    const bool there = threadIdx.x < C::columns && at < block.end;
    next_weight = there ? exponents_of[at] : INFINITY;
    next_scale = there ? scale[at] : 0.f;
    next_label = there && labelled ? c.labels[at] : -1;
  };
  const auto put = [&](int tile) {
    if (threadIdx.x >= C::columns) return;
    const int at = tile % 2 * C::columns + threadIdx.x;
    column_weight[at] = exponents.weight(next_weight);
    column_scale[at] = next_scale;
    column_label[at] = next_label;
  };
  const auto load = [&](int tile) {
    if (tile < tiles.last) {
      const int first = block.begin + tile * C::columns;
      copy_rows({ring + tile % C::stages * C::columns * pitch, pitch}, all_rows + int64_t(first) * row_bytes, row_bytes,
                C::columns, block.end - first, 0, pitch);
    }
    cp_async_commit();
  };
  for (int i = threadIdx.x; i < across * C::rows; i += kThreads) moment[i] = 0.f;
  copy_rows(left, all_rows + int64_t(block.own) * row_bytes, row_bytes, C::rows, block.count, 0, pitch);
  load(tiles.first);
  fetch(tiles.first);
  put(tiles.first);

  float out[out_tall][2 * out_wide][4];
#pragma unroll
  for (int m = 0; m < out_tall; ++m)
#pragma unroll
    for (int n = 0; n < 2 * out_wide; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][n][i] = 0.f;

#pragma unroll 1
  for (int tile = tiles.first; tile < tiles.last; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before is done with
    if constexpr (C::stages > 1) load(tile + 1);
    const SharedRows right{ring + tile % C::stages * C::columns * pitch, pitch};
    fetch(tile + 1);

    Scores<product, tall, wide> scores;
    scores.clear();
    if constexpr (C::deep == 1) {
#pragma unroll 1
      for (int s = 0; s < steps; s += kLine / kStep)
        scores.template add<kLine / kStep>(left, row, 2 * s, right, column, 2 * s);
    } else {
      static_assert(tall == 1 && wide == 1, "eight sums a thread");
#pragma unroll 1
      for (int s = depth * steps / C::deep; s < (depth + 1) * steps / C::deep; ++s)
        scores.template add<1>(left, row, 2 * s, right, column, 2 * s);
#pragma unroll
      for (int v = 0; v < 8; ++v) parts[(warp * 8 + v) * kWarp + lane_id()] = scores.sum[0][v / 4][v % 4];
      __syncthreads();
      if (depth == 0)
        for (int d = 1; d < C::deep; ++d)
#pragma unroll
          for (int v = 0; v < 8; ++v)
            scores.sum[0][v / 4][v % 4] += parts[((place + d * down * across) * 8 + v) * kWarp + lane_id()];
    }
    put(tile + 1);

    if (depth == 0) {
      const int at = tile % 2 * C::columns;
      float met[own.rows] = {};  // sums of w x
      own.weigh(scores.sum, met,
                {column_scale + at, column_weight + at, column_label + at, block.begin + tile * C::columns}, C::columns,
                block, thread_row, thread_column, labelled, exponents, [&](int r, int n, float low, float high) {
                  store_pair<product>(weights, thread_row + 8 * r, thread_column + 8 * n, low, high);
                });
#pragma unroll
      for (int r = 0; r < own.rows; ++r) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) met[r] += __shfl_xor_sync(kAllLanes, met[r], step);
        if (lane_id() % 4 == 0) moment[place / down * C::rows + thread_row + 8 * r] += met[r];
      }
    }
    __syncthreads();

    constexpr int kDeep = kStep / element;  // columns of one product
    if constexpr (element == 2) {
#pragma unroll
      for (int s = 0; s < C::columns / kDeep; ++s) {
        Fragment<product, 4> a[out_tall];
#pragma unroll
        for (int m = 0; m < out_tall; ++m) load_left(a[m], weights, out_row + 16 * m, 2 * s);
#pragma unroll
        for (int n = 0; n < out_wide; ++n) {
          const int channel = out_column + n * 16 * out_across;
          if (channel >= width) continue;
          Fragment<product, 2> b[2];
          load_turned(b, right, s * kDeep, channel);
#pragma unroll
          for (int m = 0; m < out_tall; ++m) {
            multiply(out[m][2 * n], out[m][2 * n], a[m], b[0]);
            multiply(out[m][2 * n + 1], out[m][2 * n + 1], a[m], b[1]);
          }
        }
      }
    } else {
      // As in Scores::add, a tile's sum is begun anew, for what tensor cores add to is cut.
#pragma unroll
      for (int n = 0; n < out_wide; ++n) {
        const int channel = out_column + n * 16 * out_across;
        if (channel >= width) continue;
        float sum[out_tall][2][4] = {}, small[out_tall][2][4] = {};
#pragma unroll
        for (int s = 0; s < C::columns / kDeep; ++s) {
          Fragment<product, 2> b[2];
          load_turned(b, right, s * kDeep, channel);
#pragma unroll
          for (int m = 0; m < out_tall; ++m) {
            Fragment<product, 4> a;
            load_left(a, weights, out_row + 16 * m, 2 * s);
            multiply(sum[m][0], small[m][0], a, b[0]);
            multiply(sum[m][1], small[m][1], a, b[1]);
          }
        }
#pragma unroll
        for (int m = 0; m < out_tall; ++m)
#pragma unroll
          for (int i = 0; i < 8; ++i) out[m][2 * n + i / 4][i % 4] += sum[m][i / 4][i % 4] + small[m][i / 4][i % 4];
      }
    }
    if constexpr (C::stages == 1) {
      __syncthreads();
      load(tile + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  const int64_t part = block.view * c.parts + blockIdx.y;
  for (int i = threadIdx.x; i < block.count; i += kThreads) {
    float sum = 0;
    for (int w = 0; w < across; ++w) sum += moment[w * C::rows + i];
    moments[part * c.row_count + block.first + i] = sum;
  }
  float* rows = partial + (part * c.row_count + block.first) * c.width;
#pragma unroll
  for (int m = 0; m < out_tall; ++m)
#pragma unroll
    for (int n = 0; n < out_wide; ++n)
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const int i = out_row + 16 * m + h / 2 * 8 + lane_id() / 4;
        const int channel = out_column + n * 16 * out_across + h % 2 * 8 + lane_id() % 4 * 2;
        const float* x = out[m][2 * n + h % 2];
        if (i < block.count && channel < width)
          *reinterpret_cast<float2*>(rows + int64_t(i) * c.width + channel) =
              make_float2(x[h / 2 * 2], x[h / 2 * 2 + 1]);
      }
}

template <Product product, class C>
cudaError_t launch_gradient(const ContrastColumns& c, const float* exponents, float* partial, float* moments,
                            cudaStream_t stream) {
  constexpr int element = kElement<product>;
  const int pitch = shared_pitch(c, element);
  const size_t bytes = shared_bytes<unsigned char>((C::rows + C::stages * C::columns) * pitch) +
                       shared_bytes<unsigned char>(C::rows * C::columns * element) +
                       3 * shared_bytes<float>(2 * C::columns) + shared_bytes<float>(C::across * C::rows) +
                       shared_bytes<float>(C::deep > 1 ? kThreads * 8 : 0);
  static_assert((C::rows + C::stages * C::columns) * C::width * element + C::rows * C::columns * element +
                        24 * C::columns + 4 * C::across * C::rows + (C::deep > 1 ? kThreads * 32 : 0) <=
                    kMostShared,
                "more shared memory than a block may have");
  const int64_t blocks = c.views * ((c.row_count + C::rows - 1) / C::rows);
  return launch(contrast_row_gradient<product, C>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(c.parts)), dim3(kThreads), bytes, stream, c,
                pitch, exponents, partial, moments);
}

template <Product product>
cudaError_t launch_gradient(const ContrastColumns& c, const float* exponents, float* partial, float* moments,
                            cudaStream_t stream) {
  const auto with = [&](auto cut) {
    return launch_gradient<product, decltype(cut)>(c, exponents, partial, moments, stream);
  };
  if constexpr (kElement<product> == 2) {
    if (c.width <= 128) return with(Cut<64, 64, 1, 128, 2, 2>());
    if (c.width <= 256) return with(Cut<128, 64, 1, 256, 2, 1>());
    return with(Cut<32, 16, 4, 1024, 2, 1>());
  } else {
    if (c.width <= 256) return with(Cut<64, 32, 1, 256, 2, 1>());
    return with(Cut<16, 16, 8, 1024, 1, 1>());
  }
}

// ---- the end: a warp for each row

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 3) contrast_end(ContrastFinishArgs args) {
  const T *z = static_cast<const T*>(args.z.values), *other = static_cast<const T*>(args.other.values);
  const P* partial = static_cast<const P*>(args.partial);
  const int64_t channels = args.z.channels, plane = args.row_count * args.width;
  for (int64_t r = blockIdx.x * int64_t(kWarps) + threadIdx.x / kWarp; r < args.row_count;
       r += gridDim.x * int64_t(kWarps)) {
    const int64_t i = args.first_row + r, j = args.partner == nullptr ? i : args.partner[i];
    const T *own = z + i * channels, *toward = other + (j >= 0 ? j : 0) * channels;
    const P* rows = partial + r * args.width;
    const auto push = [&](int64_t c) {
      double sum = 0;
      for (int64_t part = 0; part < args.parts; ++part) sum += rows[part * plane + c];
      return sum;
    };
    double own_square = 0, other_square = 0, own_push = 0, own_other = 0;
    for (int64_t c = lane_id(); c < channels; c += kWarp) {
      const double x = widen(own[c]), y = j >= 0 ? double(widen(toward[c])) : 0.0;
      own_square += x * x;
      other_square += y * y;
      own_other += x * y;
      own_push += x * push(c);
    }
    const double length = sqrt(sum_of_warp(own_square)), divisor = fmax(length, shortest);
    const double pull = j >= 0 ? args.pull[i] / fmax(sqrt(sum_of_warp(other_square)), shortest) : 0.0;
    const double along = (args.factors[0] * sum_of_warp(own_push) - pull * sum_of_warp(own_other)) / divisor;
    // A row that is divided by a constant has a gradient that is not projected.
    const double projection = length < shortest ? 0.0 : along / divisor, factor = args.factors[1] / divisor;
    for (int64_t c = lane_id(); c < channels; c += kWarp) {
      const double x = widen(own[c]), y = j >= 0 ? double(widen(toward[c])) : 0.0;
      static_cast<T*>(args.dz)[r * channels + c] =
          narrow<T>((args.factors[0] * push(c) - pull * y - projection * x) * factor);
    }
  }
}

}  // namespace

cudaError_t contrast_gradient(const ContrastColumns& c, const void* exponents, void* partial, void* moments,
                              cudaStream_t stream) {
  if (!contrast_fits(c)) return cudaErrorInvalidValue;
  if (c.product == Product::float64 || c.width > kMostWidth)
    return contrast_plain_gradient(c, exponents, partial, moments, stream);
  const float* from = static_cast<const float*>(exponents);
  float *to = static_cast<float*>(partial), *met = static_cast<float*>(moments);
  switch (c.product) {
    case Product::bf16: return launch_gradient<Product::bf16>(c, from, to, met, stream);
    case Product::f16: return launch_gradient<Product::f16>(c, from, to, met, stream);
    case Product::tf32: return launch_gradient<Product::tf32>(c, from, to, met, stream);
    default: return launch_gradient<Product::tf32x3>(c, from, to, met, stream);
  }
}

cudaError_t contrast_finish(const ContrastFinishArgs& args, cudaStream_t stream) {
  return with_float(args.z.type, [&](auto zero) {
    using T = decltype(zero);
    using P = decltype(widen(zero));
    return launch(contrast_end<T, P>, grid_of(args.row_count * kWarp, kThreads), dim3(kThreads), 0, stream, args);
  });
}

}  // namespace crosspoint::cuda
