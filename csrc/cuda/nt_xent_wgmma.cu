// The passes of nt_xent.cu and nt_xent_backward.cu on Hopper's own instructions (sm_90a), for bfloat16 and float16 of
// up to 256 channels. One warp has the copy engine bring tiles of columns; two warpgroups own 64 rows each, multiply
// (wgmma), and do what contrast_tile.h does with a tile, so that one multiplies while the other does that.
#include <type_traits>

#include "cuda/contrast_plain.h"
#include "cuda/contrast_tile.h"
#include "cuda/wgmma.h"

#if defined(CROSSPOINT_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CROSSPOINT_WGMMA 1
#endif

namespace crosspoint::cuda {
namespace {

constexpr int kRows = 128;  // of a block
constexpr int kConsumers = 2, kBlock = (1 + kConsumers) * kWarpgroup;
constexpr int kPanel = 64;       // channels
constexpr int kDepthBytes = 32;  // of one product
constexpr int kOwnPanel = kRows * kPanelBytes;
// Registers of a thread, 168 at the start: the warpgroup that copies leaves most of its own to the others.
constexpr int kFewRegisters = 40, kManyRegisters = 232;

// How columns are cut: `columns` in a tile, room for `stages` tiles, and for what is known of twice as many, since a
// tile is given back before that is read.
template <int width_, int columns_, int stages_>
struct Cut {
  static constexpr int width = width_, columns = columns_, stages = stages_, slots = 2 * stages;
  static constexpr int panels = width / kPanel, panel = columns * kPanelBytes, tile = panels * panel;

  static size_t shared(bool weights) {
    return shared_bytes<unsigned char>(panels * kOwnPanel) + shared_bytes<unsigned char>(stages * tile) +
           (weights ? 2 : 1) * shared_bytes<float>(slots * columns) + shared_bytes<int32_t>(slots * columns) +
           2 * shared_bytes<uint64_t>(stages);
  }
};

// Tiles of columns, none of which holds columns of two views: those of one part. The first that has a column may begin
// before it.
struct ViewTiles {
  int samples, columns, first_view, per_view, first, last;

  struct Tile {
    int view, sample, count;  // the first sample, and how many
  };

  __device__ ViewTiles(const ContrastColumns& c, const BlockOfRows& block, int columns, int64_t part)
      : samples(static_cast<int>(c.samples)), columns(columns) {
    const bool across = !c.within_views && c.views == 2;
    first_view = across ? 1 - block.view : 0;
    per_view = (samples + columns - 1) / columns;
    const int64_t skipped = across ? 0 : block.begin / columns;
    const int64_t all = int64_t(per_view) * (across ? 1 : c.views) - skipped;
    first = static_cast<int>(skipped + part * all / c.parts);
    last = static_cast<int>(skipped + (part + 1) * all / c.parts);
  }
  __device__ Tile at(int tile) const {
    const int sample = tile % per_view * columns;
    return {first_view + tile / per_view, sample, samples - sample < columns ? samples - sample : columns};
  }
};

template <class C>
struct Stages {
  unsigned char* left;
  unsigned char* ring;
  float* scale;
  float* weight;
  int32_t* label;
  uint64_t *full, *empty;

  __device__ Stages(bool weights) {
    SharedArena arena;
    left = arena.take<unsigned char>(C::panels * kOwnPanel, 1024);
    ring = arena.take<unsigned char>(C::stages * C::tile, 1024);
    scale = arena.take<float>(C::slots * C::columns);
    label = arena.take<int32_t>(C::slots * C::columns);
    weight = weights ? arena.take<float>(C::slots * C::columns) : nullptr;
    full = arena.take<uint64_t>(C::stages);
    empty = arena.take<uint64_t>(C::stages);
  }

  // The block's rows, zeros behind them and in the ring: tiles that are not full leave there what a weight of 0 is
  // multiplied with. The whole block calls.
  __device__ void begin(const ContrastColumns& c, const BlockOfRows& block) const {
    const PanelledRows rows{c.samples, C::width};
    const unsigned char* view = static_cast<const unsigned char*>(c.rows) + block.view * c.samples * C::width * 2;
    const int64_t first = c.first_row + block.first;
    constexpr int groups = C::width / 8;
    for (int i = threadIdx.x; i < kRows * groups; i += kBlock) {
      const int row = i / groups, g = i % groups;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (row < block.count) value = *reinterpret_cast<const uint4*>(view + rows.group(first + row, g));
      *reinterpret_cast<uint4*>(left + g / 8 * kOwnPanel + panel_byte(row, g % 8)) = value;
    }
    if (c.samples % C::columns != 0)
      for (int i = threadIdx.x; i < C::stages * C::tile / 16; i += kBlock)
        reinterpret_cast<uint4*>(ring)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < C::stages) {
      barrier_init(full + threadIdx.x, kWarp + 1);
      barrier_init(empty + threadIdx.x, kConsumers * kWarpgroup / kWarp);
    }
    fence_async();
    __syncthreads();
  }

  // One warp: brings tile after tile as stages become free, and what is known of its columns.
  __device__ void produce(const ContrastColumns& c, const ViewTiles& tiles, const float* exponents_of,
                          const Exponents<float>& exponents) const {
    const PanelledRows rows{c.samples, C::width};
    const float* scale_of = static_cast<const float*>(c.scale);
    for (int t = tiles.first; t < tiles.last; ++t) {
      const int n = t - tiles.first, stage = n % C::stages;
      const ViewTiles::Tile tile = tiles.at(t);
      if (n >= C::stages) barrier_wait(empty + stage, n / C::stages - 1);
      if (lane_id() == 0) {
        const unsigned char* view = static_cast<const unsigned char*>(c.rows) + tile.view * c.samples * C::width * 2;
        barrier_arrive_expecting(full + stage, C::panels * tile.count * kPanelBytes);
        for (int p = 0; p < C::panels; ++p)
          copy_bulk(ring + stage * C::tile + p * C::panel, view + rows.line(tile.sample, p), tile.count * kPanelBytes,
                    full + stage);
      }
      const int slot = n % C::slots * C::columns, column = tile.view * tiles.samples + tile.sample;
      for (int j = lane_id(); j < C::columns; j += kWarp) {
        const bool there = j < tile.count;
        scale[slot + j] = there ? scale_of[column + j] : 0.f;
        label[slot + j] = there && c.labels != nullptr ? c.labels[column + j] : -1;
        if (exponents_of != nullptr) weight[slot + j] = exponents.weight(there ? exponents_of[column + j] : INFINITY);
      }
      barrier_arrive(full + stage);
    }
  }

  // A consumer's warp has read the stage.
  __device__ void release(int stage) const {
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(empty + stage);
  }

  // Products of the 64 rows of a warpgroup with a tile.
  template <Product product>
  __device__ __forceinline__ void multiply(float (&d)[C::columns / 8][4], int group, int stage) const {
    const uint32_t rows = shared_address(left) + group * 64 * kPanelBytes;
    const uint32_t columns = shared_address(ring) + stage * C::tile;
#pragma unroll
    for (int p = 0; p < C::panels; ++p)
#pragma unroll
      for (int k = 0; k < kPanelBytes / kDepthBytes; ++k) {
        const uint64_t a = panel_descriptor(rows + p * kOwnPanel + k * kDepthBytes);
        const uint64_t b = panel_descriptor(columns + p * C::panel + k * kDepthBytes);
        if constexpr (product == Product::bf16)
          wgmma_bf16(d, a, b, p + k > 0);
        else
          wgmma_f16(d, a, b, p + k > 0);
      }
  }

  // out += weights times the same tile: `a` holds 16 of its columns in each of its entries.
  template <Product product>
  __device__ __forceinline__ void multiply_weights(float (&out)[C::width / 8][4],
                                                   const uint32_t (&a)[C::columns / 16][4], int stage) const {
    const uint32_t columns = shared_address(ring) + stage * C::tile;
#pragma unroll
    for (int k = 0; k < C::columns / 16; ++k) {
      const uint64_t b = panel_descriptor(columns + k * 16 * kPanelBytes, C::panel);
      if constexpr (product == Product::bf16)
        wgmma_bf16(out, a[k], b);
      else
        wgmma_f16(out, a[k], b);
    }
  }

  __device__ __forceinline__ TileColumns columns(int n, const ViewTiles::Tile& tile, int samples) const {
    const int slot = n % C::slots * C::columns;
    return {scale + slot, weight == nullptr ? nullptr : weight + slot, label + slot, tile.view * samples + tile.sample};
  }
};

// Columns behind the tile's view are none.
__device__ __forceinline__ BlockOfRows within_view(BlockOfRows block, int view, int samples) {
  block.end = (view + 1) * samples;
  return block;
}

template <Product product, class C>
__global__ void __launch_bounds__(kBlock, 1)
    contrast_wgmma_row_sums(ContrastColumns c, int64_t row_views, float* sums) {
#if CROSSPOINT_WGMMA
  const BlockOfRows block(c, blockIdx.x, kRows);
  const ViewTiles tiles(c, block, C::columns, blockIdx.y);
  const Exponents<float> exponents(*static_cast<const float*>(c.temperature));
  const Stages<C> stages(false);
  stages.begin(c, block);
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  if (group < 0) {
    if (threadIdx.x < kWarp) stages.produce(c, tiles, nullptr, exponents);
    return;
  }

  const int thread_row = (threadIdx.x - kWarpgroup) / kWarp * 16 + lane_id() / 4, thread_column = lane_id() % 4 * 2;
  RowSums<1> own(c, block, thread_row, exponents);
  float products[1][C::columns / 8][4];
#pragma unroll 1
  for (int t = tiles.first; t < tiles.last; ++t) {
    const int n = t - tiles.first, stage = n % C::stages;
    const ViewTiles::Tile tile = tiles.at(t);
    barrier_wait(stages.full + stage, n / C::stages);
    wgmma_fence();
    stages.template multiply<product>(products[0], group, stage);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_done(products[0]);
    stages.release(stage);
    own.add(products, stages.columns(n, tile, tiles.samples), C::columns, within_view(block, tile.view, tiles.samples),
            thread_row, thread_column, c.labels != nullptr, exponents);
  }
  const int64_t plane = row_views * c.row_count;
#pragma unroll
  for (int r = 0; r < own.rows; ++r) {
    own.state[r].add_lanes();
    const int i = thread_row + 8 * r;
    if (lane_id() % 4 != 0 || i >= block.count) continue;
    float* to = sums + (blockIdx.y * kStatistics * row_views + block.view) * c.row_count + block.first + i;
    to[0] = own.state[r].bound, to[plane] = own.state[r].sum, to[2 * plane] = own.state[r].positives;
  }
#else
  __trap();
#endif
}

template <Product product, class C>
__global__ void __launch_bounds__(kBlock, 1)
    contrast_wgmma_row_gradient(ContrastColumns c, const float* exponents_of, float* partial, float* moments) {
#if CROSSPOINT_WGMMA
  const BlockOfRows block(c, blockIdx.x, kRows);
  const ViewTiles tiles(c, block, C::columns, blockIdx.y);
  const Exponents<float> exponents(*static_cast<const float*>(c.temperature));
  const Stages<C> stages(true);
  stages.begin(c, block);
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  if (group < 0) {
    leave_registers<kFewRegisters>();
    if (threadIdx.x < kWarp) stages.produce(c, tiles, exponents_of, exponents);
    return;
  }

  take_registers<kManyRegisters>();
  const int thread_row = (threadIdx.x - kWarpgroup) / kWarp * 16 + lane_id() / 4, thread_column = lane_id() % 4 * 2;
  const RowWeights<1> own(c, block, thread_row, exponents, exponents_of);
  float out[C::width / 8][4], products[1][C::columns / 8][4], met[own.rows] = {};
  uint32_t weights[C::columns / 16][4];  // rounded, as products read them
#pragma unroll
  for (int n = 0; n < C::width / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] = 0.f;
#pragma unroll 1
  for (int t = tiles.first; t < tiles.last; ++t) {
    const int n = t - tiles.first, stage = n % C::stages;
    const ViewTiles::Tile tile = tiles.at(t);
    barrier_wait(stages.full + stage, n / C::stages);
    wgmma_fence();
    stages.template multiply<product>(products[0], group, stage);
    wgmma_commit();
    if (n > 0) {
      wgmma_wait<1>();  // the tile before has been added to the gradient
      stages.release((n - 1) % C::stages);
    }
    wgmma_wait<0>();
    wgmma_done(products[0]);
    own.weigh(products, met, stages.columns(n, tile, tiles.samples), C::columns,
              within_view(block, tile.view, tiles.samples), thread_row, thread_column, c.labels != nullptr, exponents,
              [&](int r, int j, float low, float high) {
                weights[j / 2][j % 2 * 2 + r] = product == Product::bf16 ? pack_bf16(low, high) : pack_f16(low, high);
              });
    wgmma_fence();
    stages.template multiply_weights<product>(out, weights, stage);
    wgmma_commit();
  }
  wgmma_wait<0>();
  wgmma_done(out);

  const int64_t part = block.view * c.parts + blockIdx.y;
  float* rows = partial + (part * c.row_count + block.first) * C::width;
#pragma unroll
  for (int r = 0; r < own.rows; ++r) {
    const int i = thread_row + 8 * r;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) met[r] += __shfl_xor_sync(kAllLanes, met[r], step);
    if (i >= block.count) continue;
    if (lane_id() % 4 == 0) moments[part * c.row_count + block.first + i] = met[r];
#pragma unroll
    for (int n = 0; n < C::width / 8; ++n)
      *reinterpret_cast<float2*>(rows + int64_t(i) * C::width + 8 * n + thread_column) =
          make_float2(out[n][2 * r], out[n][2 * r + 1]);
  }
#else
  __trap();
#endif
}

dim3 grid_of_rows(const ContrastColumns& c, int64_t views) {
  return dim3(static_cast<unsigned>(views * ((c.row_count + kRows - 1) / kRows)), static_cast<unsigned>(c.parts));
}

template <Product product, class C>
cudaError_t launch_sums(const ContrastColumns& c, int64_t row_views, float* sums, cudaStream_t stream) {
  return launch(contrast_wgmma_row_sums<product, C>, grid_of_rows(c, row_views), dim3(kBlock), C::shared(false), stream,
                c, row_views, sums);
}

template <Product product, class C>
cudaError_t launch_gradient(const ContrastColumns& c, const float* exponents, float* partial, float* moments,
                            cudaStream_t stream) {
  return launch(contrast_wgmma_row_gradient<product, C>, grid_of_rows(c, c.views), dim3(kBlock), C::shared(true),
                stream, c, exponents, partial, moments);
}

template <class F>
cudaError_t with_product(Product product, F&& f) {
  switch (product) {
    case Product::bf16: return f(std::integral_constant<Product, Product::bf16>());
    case Product::f16: return f(std::integral_constant<Product, Product::f16>());
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t contrast_wgmma_sums(const ContrastColumns& c, int64_t row_views, void* sums, cudaStream_t stream) {
  if (!contrast_fits(c)) return cudaErrorInvalidValue;
  return with_product(c.product, [&](auto product) {
    float* to = static_cast<float*>(sums);
    switch (c.width) {
      case 64: return launch_sums<product.value, Cut<64, 128, 4>>(c, row_views, to, stream);
      case 128: return launch_sums<product.value, Cut<128, 128, 4>>(c, row_views, to, stream);
      case 256: return launch_sums<product.value, Cut<256, 128, 2>>(c, row_views, to, stream);
      default: return cudaErrorInvalidValue;
    }
  });
}

cudaError_t contrast_wgmma_gradient(const ContrastColumns& c, const void* exponents, void* partial, void* moments,
                                    cudaStream_t stream) {
  if (!contrast_fits(c)) return cudaErrorInvalidValue;
  return with_product(c.product, [&](auto product) {
    const float* from = static_cast<const float*>(exponents);
    float *to = static_cast<float*>(partial), *met = static_cast<float*>(moments);
    switch (c.width) {
      case 64: return launch_gradient<product.value, Cut<64, 64, 4>>(c, from, to, met, stream);
      case 128: return launch_gradient<product.value, Cut<128, 64, 4>>(c, from, to, met, stream);
      case 256: return launch_gradient<product.value, Cut<256, 64, 4>>(c, from, to, met, stream);
      default: return cudaErrorInvalidValue;
    }
  });
}

}  // namespace crosspoint::cuda
