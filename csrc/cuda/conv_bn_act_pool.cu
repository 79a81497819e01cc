// conv_bn_act_pool: sums over points, and three matrix products whose operands are made, and results used, on the way.
#include "crosspoint/cuda/conv_bn_act_pool.h"

#include <cmath>

#include "cuda/mma.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowWarps = kThreads / kWarp;

// ---- values in memory

using Half = uint16_t;  // a bfloat16

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(Half x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }

__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(double x, double* out) { *out = x; }
__device__ __forceinline__ void narrow(float x, Half* out) { *out = static_cast<Half>(pack_bf16(x, 0.0f) & 0xffffu); }

// Whether a value, at `row`, goes before the largest so far: a NaN before all, then the larger, then the first row.
template <class T>
__device__ __forceinline__ bool goes_before(T value, int row, T other, int other_row) {
  if (row < 0) return false;
  if (other_row < 0) return true;
  const bool nan = value != value, other_nan = other != other;
  if (nan != other_nan) return nan;
  return value > other || ((nan || value == other) && row < other_row);
}

// ---- products of a block: (rows, depth) by (depth, columns), in steps of kWords words of shared memory

constexpr int kWords = 16, kStride = kWords + 4;  // rows of 20 words: the loads of a fragment meet no bank twice

template <Product product>
struct Kind {
  using T = float;
  using Word = uint32_t;
  using Weight = float;
  static constexpr int packed = 1, row_warps = 4, row_fragments = 2;

  // A word of shared memory, and the sum of what it holds.
  __device__ static Word word(float x, float) {
    return __float_as_uint(product == Product::tf32 ? __uint_as_float(to_tf32(x)) : x);
  }
  __device__ static float total(Word word) { return __uint_as_float(word); }
};
template <>
struct Kind<Product::bf16> {
  using T = float;
  using Word = uint32_t;
  using Weight = Half;
  static constexpr int packed = 2, row_warps = 4, row_fragments = 2;

  __device__ static Word word(float low, float high) { return pack_bf16(low, high); }
  __device__ static float total(Word word) {
    return widened(static_cast<Half>(word & 0xffffu)) + widened(static_cast<Half>(word >> 16));
  }
};
template <>
struct Kind<Product::float64> {
  using T = double;
  using Word = double;
  using Weight = double;
  static constexpr int packed = 1, row_warps = 2, row_fragments = 1;

  __device__ static Word word(double x, double) { return x; }
  __device__ static double total(Word word) { return word; }
};

// A warp has row_fragments x kColumnFragments fragments of 16 x 8: 32 columns, a word of the mask.
constexpr int kColumnWarps = 2, kColumnFragments = 4, kColumns = kColumnWarps * kColumnFragments * 8;

template <Product product>
struct Block {
  using K = Kind<product>;
  using T = typename K::T;
  using Word = typename K::Word;
  static constexpr int fragments = K::row_fragments, rows = K::row_warps * fragments * 16;
  static constexpr int threads = K::row_warps * kColumnWarps * kWarp, depth = kWords * K::packed;
  static constexpr int blocks = 256 / threads;  // of a multiprocessor, that registers leave room for

  struct Shared {
    Word left[2][rows][kStride];
    Word right[2][kColumns][kStride];
  };
  struct Sum {
    T v[fragments][kColumnFragments][4];
  };

  // The place in the tile of element i of a fragment.
  __device__ static int row_of(int fragment, int i) {
    return (threadIdx.x / kWarp % K::row_warps * fragments + fragment) * 16 + lane_id() / 4 + i / 2 * 8;
  }
  __device__ static int column_of(int fragment, int i) {
    return threadIdx.x / kWarp / K::row_warps * kWarp + fragment * 8 + lane_id() % 4 * 2 + i % 2;
  }

  // Calls f(row in the tile, column in the tile, value) for every element that this thread holds.
  template <class F>
  __device__ __forceinline__ static void each(const Sum& sum, F&& f) {
#pragma unroll
    for (int m = 0; m < fragments; ++m)
#pragma unroll
      for (int n = 0; n < kColumnFragments; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(row_of(m, i), column_of(n, i), sum.v[m][n][i]);
  }

  // Word e of an operand's step: consecutive threads go along what is consecutive in memory.
  template <bool along_depth, int lines>
  __device__ static void place_of(int e, int& line, int& word) {
    line = along_depth ? e / kWords : e % lines;
    word = along_depth ? e % kWords : e / lines;
  }

  template <int lines, class Operand, int count>
  __device__ static void fetch(const Operand& operand, Word (&words)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      int line, word;
      place_of<Operand::along_depth, lines>(i * threads + threadIdx.x, line, word);
      const T low = operand(line, word * K::packed);
      words[i] = K::word(low, K::packed == 2 ? operand(line, word * K::packed + 1) : T(0));
    }
  }
  template <int lines, class Operand, int count>
  __device__ static void put(Word (&to)[lines][kStride], const Word (&words)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      int line, word;
      place_of<Operand::along_depth, lines>(i * threads + threadIdx.x, line, word);
      to[line][word] = words[i];
    }
  }

  // sum += left right over steps [first, last); an operand's seek(step) precedes its values operand(line, depth).
  // visit(words of right, by line) sees every step.
  template <class Left, class Right, class Visit>
  __device__ static void multiply(Shared& shared, Left left, Right right, int64_t first, int64_t last, Sum& sum,
                                  Visit&& visit) {
    Word l[rows * kWords / threads], r[kColumns * kWords / threads];
    if (first >= last) return;
    left.seek(first);
    right.seek(first);
    fetch<rows>(left, l);
    fetch<kColumns>(right, r);
    __syncthreads();  // whoever used the space before is done
    int at = 0;
    for (int64_t step = first; step < last; ++step, at ^= 1) {
      put<rows, Left>(shared.left[at], l);
      put<kColumns, Right>(shared.right[at], r);
      if (step + 1 < last) {
        left.seek(step + 1);
        right.seek(step + 1);
        fetch<rows>(left, l);
        fetch<kColumns>(right, r);
      }
      __syncthreads();
      visit(shared.right[at]);
      add(shared.left[at], shared.right[at], sum);
    }
  }
  template <class Left, class Right>
  __device__ static void multiply(Shared& shared, Left left, Right right, int64_t first, int64_t last, Sum& sum) {
    multiply(shared, left, right, first, last, sum, [](const Word (&)[kColumns][kStride]) {});
  }

  __device__ static void add(const Word (&left)[rows][kStride], const Word (&right)[kColumns][kStride], Sum& sum) {
    const int row = row_of(0, 0), column = threadIdx.x / kWarp / K::row_warps * kWarp + lane_id() / 4, t = lane_id() % 4;
    if constexpr (product == Product::float64) {
      for (int k = 0; k < kWords; ++k)
#pragma unroll
        for (int m = 0; m < fragments; ++m)
#pragma unroll
          for (int n = 0; n < kColumnFragments; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum.v[m][n][i] += left[row_of(m, i)][k] * right[column_of(n, i)][k];
    } else {
#pragma unroll
      for (int k = 0; k < kWords; k += 8) {
        uint32_t a[fragments][4], b[kColumnFragments][2];
#pragma unroll
        for (int m = 0; m < fragments; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = left[row + m * 16 + i % 2 * 8][k + t + i / 2 * 4];
#pragma unroll
        for (int n = 0; n < kColumnFragments; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) b[n][i] = right[column + n * 8][k + t + i * 4];
        if constexpr (product == Product::tf32x3) {
          // x = high + low to 2^-22; low * low is below that.
          uint32_t a_low[fragments][4], b_low[kColumnFragments][2];
#pragma unroll
          for (int m = 0; m < fragments; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) split(a[m][i], a_low[m][i]);
#pragma unroll
          for (int n = 0; n < kColumnFragments; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) split(b[n][i], b_low[n][i]);
#pragma unroll
          for (int m = 0; m < fragments; ++m)
#pragma unroll
            for (int n = 0; n < kColumnFragments; ++n) {
              mma_tf32(sum.v[m][n], a_low[m], b[n]);
              mma_tf32(sum.v[m][n], a[m], b_low[n]);
            }
        }
#pragma unroll
        for (int m = 0; m < fragments; ++m)
#pragma unroll
          for (int n = 0; n < kColumnFragments; ++n) {
            if constexpr (product == Product::bf16) {
              mma_bf16(sum.v[m][n], a[m], b[n]);
            } else {
              mma_tf32(sum.v[m][n], a[m], b[n]);
            }
          }
      }
    }
  }

  __device__ static void split(uint32_t& x, uint32_t& low) {
    split_tf32(__uint_as_float(x), x, low);
    if (__uint_as_float(low) != __uint_as_float(low)) low = 0u;  // infinities are in the high part alone
  }
};

// ---- operands

template <class T, class X>
struct Points {
  const X* x;
  const T* centre;
  const int64_t* lengths;
  int64_t batch, n, channels;

  __device__ int64_t length(int64_t b) const { return clamped(lengths, b, n); }
  // x' of a row of all clouds, known to be valid.
  __device__ T centred(int64_t row, int64_t c) const { return T(widened(x[row * channels + c])) - centre[c]; }
};

template <class T, class X>
__device__ Points<T, X> points_of(const PoolCloud& cloud, const void* centre) {
  return {static_cast<const X*>(cloud.x), static_cast<const T*>(centre), cloud.lengths, cloud.batch, cloud.n, cloud.c_in};
}

// Rows of one cloud, the depth along channels.
template <class T, class X, int depth>
struct Rows {
  static constexpr bool along_depth = true;
  const Points<T, X>& points;
  int64_t first;  // row of all clouds
  int valid;      // rows from there
  int64_t channel = 0;

  __device__ void seek(int64_t step) { channel = step * depth; }
  __device__ T operator()(int line, int k) const {
    const int64_t c = channel + k;
    return line < valid && c < points.channels ? points.centred(first + line, c) : T(0);
  }
};

// Step s of a sum over rows takes `depth` rows of cloud s / steps.
template <class T, class X, int depth>
struct RowSteps {
  const Points<T, X>& points;
  int64_t steps;  // of a cloud
  int64_t cloud = 0, first = 0;
  int valid = 0;

  __device__ void seek(int64_t step) {
    cloud = step / steps;
    first = step % steps * depth;
    const int64_t left = points.length(cloud) - first;
    valid = left < 0 ? 0 : left < depth ? static_cast<int>(left) : depth;
  }
};

// Channels from `column`, the depth along rows.
template <class T, class X, int depth>
struct Columns : RowSteps<T, X, depth> {
  static constexpr bool along_depth = false;
  int64_t column;

  __device__ Columns(const Points<T, X>& points, int64_t steps, int64_t column)
      : RowSteps<T, X, depth>{points, steps}, column(column) {}
  __device__ T operator()(int line, int k) const {
    const int64_t c = column + line;
    const bool there = k < this->valid && c < this->points.channels;
    return there ? this->points.centred(this->cloud * this->points.n + this->first + k, c) : T(0);
  }
};

// Rows `line` of a matrix (lines, width), the depth along them; or, turned, the columns of one (width, lines).
template <class T, class W, int depth, bool turned>
struct Matrix {
  static constexpr bool along_depth = !turned;
  const W* values;
  int64_t lines, width, first;
  int64_t at = 0;

  __device__ void seek(int64_t step) { at = step * depth; }
  __device__ T operator()(int line, int k) const {
    const int64_t i = first + line, j = at + k;
    if (i >= lines || j >= width) return T(0);
    return widened(turned ? values[j * lines + i] : values[i * width + j]);
  }
};

// g, the part of the gradient of h that is no multiple of h.
template <class T>
struct Gradient {
  const int32_t *mask, *winner;
  const T* spread;
  int64_t clouds, n, channels, words;

  __device__ T at(int64_t cloud, int64_t row, int64_t c) const {
    const int64_t i = cloud * channels + c, plane = clouds * channels;
    const bool up = (static_cast<uint32_t>(mask[(cloud * n + row) * words + c / 32]) >> (c % 32) & 1u) != 0;
    return spread[up ? i : plane + i] + (winner[i] == row ? spread[2 * plane + i] : T(0));
  }
};

template <class T, int depth>
struct GradientRows {
  static constexpr bool along_depth = true;
  const Gradient<T>& gradient;
  int64_t cloud, first;  // row of the cloud
  int valid;
  int64_t channel = 0;

  __device__ void seek(int64_t step) { channel = step * depth; }
  __device__ T operator()(int line, int k) const {
    const int64_t c = channel + k;
    return line < valid && c < gradient.channels ? gradient.at(cloud, first + line, c) : T(0);
  }
};

template <class T, class X, int depth>
struct GradientColumns : RowSteps<T, X, depth> {
  static constexpr bool along_depth = false;
  const Gradient<T>& gradient;
  int64_t column;

  __device__ GradientColumns(const Points<T, X>& points, int64_t steps, const Gradient<T>& gradient, int64_t column)
      : RowSteps<T, X, depth>{points, steps}, gradient(gradient), column(column) {}
  __device__ T operator()(int line, int k) const {
    const int64_t c = column + line;
    return k < this->valid && c < gradient.channels ? gradient.at(this->cloud, this->first + k, c) : T(0);
  }
};

// ---- sums over points

template <class X>
__global__ void __launch_bounds__(kThreads) pool_sums(PoolSumsArgs args) {
  CROSSPOINT_SHARED(sums, double[2][kRowWarps][kWarp]);
  const PoolCloud& cloud = args.cloud;
  const X* x = static_cast<const X*>(cloud.x);
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t slices = (cloud.c_in + kWarp - 1) / kWarp, each = (cloud.n + args.tiles - 1) / args.tiles;
  for (int64_t piece = blockIdx.x; piece < cloud.batch * args.tiles * slices; piece += gridDim.x) {
    const int64_t tile = piece / slices, b = tile / args.tiles, c = piece % slices * kWarp + lane;
    const int64_t first = tile % args.tiles * each, length = clamped(cloud.lengths, b, cloud.n);
    const int64_t last = first + each < length ? first + each : length;
    double sum = 0, square = 0;
    if (c < cloud.c_in) {
#pragma unroll 4
      for (int64_t i = first + warp; i < last; i += kRowWarps) {
        const double value = widened(x[(b * cloud.n + i) * cloud.c_in + c]);
        sum += value;
        square += value * value;
      }
    }
    sums[0][warp][lane] = sum;
    sums[1][warp][lane] = square;
    __syncthreads();
    if (warp < 2 && c < cloud.c_in) {
      double total = 0;
      for (int w = 0; w < kRowWarps; ++w) total += sums[warp][w][lane];
      args.out[(tile * 2 + warp) * cloud.c_in + c] = total;
    }
    __syncthreads();
  }
}

template <Product product, class X>
__global__ void __launch_bounds__(Block<product>::threads, Block<product>::blocks) pool_gram(PoolGramArgs args) {
  using B = Block<product>;
  using T = typename B::T;
  CROSSPOINT_SHARED(shared, typename Block<product>::Shared);
  const Points<T, X> points = points_of<T, X>(args.cloud, args.centre);
  const int64_t C = points.channels, steps = (points.n + B::depth - 1) / B::depth;
  const int64_t each = (points.batch * steps + args.parts - 1) / args.parts, part = blockIdx.x;
  const int64_t begin = part * each, most = points.batch * steps, end = begin + each < most ? begin + each : most;
  const int64_t left = int64_t(blockIdx.y) * B::rows, right = int64_t(blockIdx.z) * kColumns;
  if (right + kColumns <= left) return;  // below the diagonal: a mirror
  typename B::Sum sum{};
  const bool totals = blockIdx.y == 0 && threadIdx.x < kColumns;
  double first = 0;
  B::multiply(shared, Columns<T, X, B::depth>(points, steps, left), Columns<T, X, B::depth>(points, steps, right), begin,
              end, sum, [&](const typename B::Word (&words)[kColumns][kStride]) {
                if (!totals) return;
                T total = 0;
                for (int k = 0; k < kWords; ++k) total += B::K::total(words[threadIdx.x][k]);
                first += double(total);
              });
  T* gram = static_cast<T*>(args.gram) + part * C * C;
  B::each(sum, [&](int row, int column, T value) {
    const int64_t a = left + row, c = right + column;
    if (a > c || c >= C) return;
    gram[a * C + c] = value;
    gram[c * C + a] = value;
  });
  if (totals && right + threadIdx.x < C) args.first[part * C + right + threadIdx.x] = first;
}

// ---- the product, and what is pooled of it

template <class T>
struct Column {
  T h, value, sum, up_sum;
  int row, up;

  __device__ void join(const Column& other) {
    if (goes_before(other.value, other.row, value, row)) h = other.h, value = other.value, row = other.row;
    sum += other.sum;
    up_sum += other.up_sum;
    up += other.up;
  }
  __device__ Column of_lane(int step) const {
    return {__shfl_xor_sync(kAllLanes, h, step),      __shfl_xor_sync(kAllLanes, value, step),
            __shfl_xor_sync(kAllLanes, sum, step),    __shfl_xor_sync(kAllLanes, up_sum, step),
            __shfl_xor_sync(kAllLanes, row, step),    __shfl_xor_sync(kAllLanes, up, step)};
  }
};

template <Product product, class X>
__global__ void __launch_bounds__(Block<product>::threads, Block<product>::blocks) pool_tiles(PoolArgs args) {
  using B = Block<product>;
  using T = typename B::T;
  using W = typename B::K::Weight;
  CROSSPOINT_SHARED(shared, typename Block<product>::Shared);
  CROSSPOINT_SHARED(columns, Column<typename Block<product>::T>[Block<product>::K::row_warps][kColumns]);
  const Points<T, X> points = points_of<T, X>(args.cloud, args.centre);
  const int64_t blocks = (args.c_out + kColumns - 1) / kColumns, words = (args.c_out + 31) / 32;
  const int64_t tile = blockIdx.x / blocks, column = blockIdx.x % blocks * kColumns;  // neighbours share rows of x
  const int64_t b = tile / args.tiles, first = tile % args.tiles * B::rows, left = points.length(b) - first;
  const int valid = left < 0 ? 0 : left < B::rows ? static_cast<int>(left) : B::rows;
  const int64_t steps = valid == 0 ? 0 : (points.channels + B::depth - 1) / B::depth;
  typename B::Sum h{};
  B::multiply(shared, Rows<T, X, B::depth>{points, b * points.n + first, valid},
              Matrix<T, W, B::depth, false>{static_cast<const W*>(args.weight), args.c_out, points.channels, column}, 0,
              steps, h);

  const int warp = threadIdx.x / kWarp;
  uint32_t bits[B::fragments][2] = {};
#pragma unroll
  for (int n = 0; n < kColumnFragments; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t c = column + B::column_of(n, i);
      const bool there = c < args.c_out;
      const T scale = there ? static_cast<const T*>(args.scale)[c] : T(0);
      const T shift = there ? static_cast<const T*>(args.shift)[c] : T(0);
      const bool zero = there && static_cast<const T*>(args.gamma)[c] == T(0);
      Column<T> found{T(0), T(0), T(0), T(0), -1, 0};
#pragma unroll
      for (int m = 0; m < B::fragments; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = B::row_of(m, 2 * j);
          const T value = h.v[m][n][2 * j + i];
          if (row >= valid) continue;
          const bool up = value * scale + shift > T(0);
          found.join({value, zero ? value * T(0) : value, value, up ? value : T(0), static_cast<int>(first) + row, up});
          bits[m][j] |= static_cast<uint32_t>(up && there) << (n * 8 + lane_id() % 4 * 2 + i);
        }
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) found.join(found.of_lane(step));
      if (lane_id() < 4) columns[warp % B::K::row_warps][B::column_of(n, i)] = found;
    }
  if (args.mask != nullptr) {
#pragma unroll
    for (int m = 0; m < B::fragments; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t word = bits[m][j];
        word |= __shfl_xor_sync(kAllLanes, word, 1);
        word |= __shfl_xor_sync(kAllLanes, word, 2);
        const int64_t row = first + B::row_of(m, 2 * j), at = column / 32 + warp / B::K::row_warps;
        if (lane_id() % 4 == 0 && row < points.n && at < words)
          args.mask[(b * points.n + row) * words + at] = static_cast<int32_t>(word);
      }
  }
  __syncthreads();
  const int64_t c = column + threadIdx.x;
  if (threadIdx.x < kColumns && c < args.c_out) {
    Column<T> found = columns[0][threadIdx.x];
    for (int w = 1; w < B::K::row_warps; ++w) found.join(columns[w][threadIdx.x]);
    const int64_t at = tile * args.c_out + c, plane = points.batch * args.tiles * args.c_out;
    T* values = static_cast<T*>(args.values);
    values[at] = found.h;
    values[plane + at] = found.sum;
    values[2 * plane + at] = found.up_sum;
    args.places[at] = found.row;
    args.places[plane + at] = found.up;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) pool_finish(PoolFinishArgs<T> args) {
  const int64_t count = args.batch * args.channels, plane = count * args.tiles;
  for (int64_t e = blockIdx.x * int64_t(kThreads) + threadIdx.x; e < count; e += gridDim.x * int64_t(kThreads)) {
    const int64_t b = e / args.channels, c = e % args.channels;
    const bool zero = args.gamma[c] == T(0);
    T peak = 0, most = 0;
    double sum = 0, up_sum = 0;
    int64_t up = 0;
    int winner = -1;
    for (int64_t tile = 0; tile < args.tiles; ++tile) {
      const int64_t at = (b * args.tiles + tile) * args.channels + c;
      const T h = args.values[at], value = zero ? h * T(0) : h;
      const int row = args.places[at];
      if (goes_before(value, row, most, winner)) peak = h, most = value, winner = row;
      sum += args.values[plane + at];
      up_sum += args.values[2 * plane + at];
      up += args.places[plane + at];
    }
    const int64_t length = clamped(args.lengths, b, args.n);
    const T z = peak * args.scale[c] + args.shift[c];
    const double slope = args.negative_slope, slopes = slope * double(length) + (1 - slope) * double(up);
    const double weighted = slope * sum + (1 - slope) * up_sum;
    const double mean = (double(args.scale[c]) * weighted + double(args.shift[c]) * slopes) / double(length > 0 ? length : 1);
    args.out[b * 2 * args.channels + c] = length == 0 ? T(0) : z > T(0) ? z : z * T(slope);
    args.out[(b * 2 + 1) * args.channels + c] = length == 0 ? T(0) : T(mean);
    if (args.winner == nullptr) continue;
    args.winner[e] = winner;
    args.slopes[e] = slopes;
    args.slopes[count + e] = (weighted - args.mean[c] * slopes) * args.rstd[c];
    args.slopes[2 * count + e] = double(peak);
  }
}

// ---- backward

// Per cloud and channel: scale-free gradients of the maximum and of each row through the mean.
template <class T>
__device__ __forceinline__ void own_terms(const PoolTermsArgs<T>& args, int64_t b, int64_t c, double& largest, double& even) {
  const int64_t length = clamped(args.lengths, b, args.n);
  largest = even = 0;
  if (length == 0) return;
  const T z = T(args.slopes[(2 * args.batch + b) * args.channels + c]) * args.scale[c] + args.shift[c];
  largest = double(args.grad[b * 2 * args.channels + c]) * (z > T(0) ? 1.0 : args.negative_slope);
  even = double(args.grad[(b * 2 + 1) * args.channels + c]) / double(length);
}

// A block for 32 channels: a lane for each, a warp for every eighth cloud.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_terms(PoolTermsArgs<T> args) {
  CROSSPOINT_SHARED(sums, double[2][kRowWarps][kWarp]);
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t c = int64_t(blockIdx.x) * kWarp + lane, C = args.channels, plane = args.batch * C;
  const bool there = c < C;
  const double mean = there ? args.mean[c] : 0, rstd = there ? args.rstd[c] : 0;
  double beta = 0, gamma = 0, largest, even;
  for (int64_t b = warp; there && b < args.batch; b += kRowWarps) {
    own_terms(args, b, c, largest, even);
    if (clamped(args.lengths, b, args.n) == 0) continue;
    beta += even * args.slopes[b * C + c] + largest;
    gamma += even * args.slopes[plane + b * C + c] + largest * ((args.slopes[2 * plane + b * C + c] - mean) * rstd);
  }
  sums[0][warp][lane] = gamma;
  sums[1][warp][lane] = beta;
  __syncthreads();
  gamma = beta = 0;
  for (int w = 0; w < kRowWarps; ++w) {
    gamma += sums[0][w][lane];
    beta += sums[1][w][lane];
  }
  double scale = there ? std::fabs(double(args.gamma[c])) * rstd : 0, slope_term = 0, constant = 0;
  if (args.training) {
    const double count = *args.count > 1 ? *args.count : 1;
    if (!(*args.count > 1)) scale = 0;  // the norm of a single row is constant
    slope_term = scale * rstd * gamma / count;
    constant = slope_term * mean - scale * beta / count;
  }
  if (warp == 0 && there) {
    args.affine[c] = gamma;
    args.affine[C + c] = beta;
    if (args.training) args.affine[2 * C + c] = slope_term;
  }
  for (int64_t b = warp; there && b < args.batch; b += kRowWarps) {
    own_terms(args, b, c, largest, even);
    args.spread[b * C + c] = T(scale * even + constant);
    args.spread[plane + b * C + c] = T(args.negative_slope * (scale * even) + constant);
    args.spread[2 * plane + b * C + c] = T(scale * largest);
  }
}

template <Product product, class X>
__global__ void __launch_bounds__(Block<product>::threads, Block<product>::blocks) pool_x_gradient(PoolXGradientArgs args) {
  using B = Block<product>;
  using T = typename B::T;
  using W = typename B::K::Weight;
  CROSSPOINT_SHARED(shared, typename Block<product>::Shared);
  const Points<T, X> points = points_of<T, X>(args.cloud, args.centre);
  const Gradient<T> gradient{args.mask,     args.winner, static_cast<const T*>(args.spread),
                             points.batch,  points.n,    args.c_out,
                             (args.c_out + 31) / 32};
  const int64_t blocks = (points.channels + kColumns - 1) / kColumns, tiles = (points.n + B::rows - 1) / B::rows;
  const int64_t tile = blockIdx.x / blocks, column = blockIdx.x % blocks * kColumns;
  const int64_t b = tile / tiles, first = tile % tiles * B::rows, left = points.length(b) - first;
  const int valid = left < 0 ? 0 : left < B::rows ? static_cast<int>(left) : B::rows;
  typename B::Sum sum{};
  if (valid > 0) {
    B::multiply(shared, GradientRows<T, B::depth>{gradient, b, first, valid},
                Matrix<T, W, B::depth, true>{static_cast<const W*>(args.weight), points.channels, args.c_out, column}, 0,
                (args.c_out + B::depth - 1) / B::depth, sum);
    if (args.square != nullptr)
      B::multiply(shared, Rows<T, X, B::depth>{points, b * points.n + first, valid},
                  Matrix<T, W, B::depth, false>{static_cast<const W*>(args.square), points.channels, points.channels, column},
                  0, (points.channels + B::depth - 1) / B::depth, sum);
  }
  B::each(sum, [&](int row, int in_tile, T value) {
    const int64_t i = first + row, c = column + in_tile;
    if (i < points.n && c < points.channels)
      narrow(i < first + valid ? value : T(0), static_cast<X*>(args.out) + (b * points.n + i) * points.channels + c);
  });
}

template <Product product, class X>
__global__ void __launch_bounds__(Block<product>::threads, Block<product>::blocks) pool_weight_gradient(PoolWeightGradientArgs args) {
  using B = Block<product>;
  using T = typename B::T;
  CROSSPOINT_SHARED(shared, typename Block<product>::Shared);
  const Points<T, X> points = points_of<T, X>(args.cloud, args.centre);
  const Gradient<T> gradient{args.mask,     args.winner, static_cast<const T*>(args.spread),
                             points.batch,  points.n,    args.c_out,
                             (args.c_out + 31) / 32};
  const int64_t steps = (points.n + B::depth - 1) / B::depth, most = points.batch * steps;
  const int64_t each = (most + args.parts - 1) / args.parts, part = blockIdx.x;
  const int64_t begin = part * each, end = begin + each < most ? begin + each : most;
  const int64_t left = int64_t(blockIdx.y) * B::rows, right = int64_t(blockIdx.z) * kColumns;
  typename B::Sum sum{};
  B::multiply(shared, GradientColumns<T, X, B::depth>(points, steps, gradient, left),
              Columns<T, X, B::depth>(points, steps, right), begin, end, sum);
  T* out = static_cast<T*>(args.out) + part * args.c_out * points.channels;
  B::each(sum, [&](int row, int column, T value) {
    const int64_t a = left + row, c = right + column;
    if (a < args.c_out && c < points.channels) out[a * points.channels + c] = value;
  });
}

// ---- launches

// Calls f(product, a value of the type of x).
template <class F>
cudaError_t with_product(Product product, bool half, F&& f) {
  if (half && product != Product::bf16) return cudaErrorInvalidValue;
  switch (product) {
    case Product::bf16: return half ? f(Constant<Product::bf16>{}, Half{}) : f(Constant<Product::bf16>{}, float{});
    case Product::tf32: return f(Constant<Product::tf32>{}, float{});
    case Product::tf32x3: return f(Constant<Product::tf32x3>{}, float{});
    case Product::float64: return f(Constant<Product::float64>{}, double{});
    default: return cudaErrorInvalidValue;
  }
}

unsigned blocks_of(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

}  // namespace

cudaError_t conv_bn_act_pool_sums(const PoolSumsArgs& args, cudaStream_t stream) {
  const int64_t pieces = args.cloud.batch * args.tiles * blocks_of(args.cloud.c_in, kWarp);
  const dim3 grid = grid_of(pieces, 1), block(kThreads);
  if (args.wide) return launch(pool_sums<double>, grid, block, 0, stream, args);
  if (args.cloud.half) return launch(pool_sums<Half>, grid, block, 0, stream, args);
  return launch(pool_sums<float>, grid, block, 0, stream, args);
}

cudaError_t conv_bn_act_pool_gram(const PoolGramArgs& args, cudaStream_t stream) {
  return with_product(args.product, args.cloud.half, [&](auto product, auto x) {
    constexpr Product kind = decltype(product)::value;
    using B = Block<kind>;
    const dim3 grid(blocks_of(args.parts, 1), blocks_of(args.cloud.c_in, B::rows), blocks_of(args.cloud.c_in, kColumns));
    return launch(pool_gram<kind, decltype(x)>, grid, dim3(B::threads), 0, stream, args);
  });
}

cudaError_t conv_bn_act_pool_tiles(const PoolArgs& args, cudaStream_t stream) {
  return with_product(args.product, args.cloud.half, [&](auto product, auto x) {
    constexpr Product kind = decltype(product)::value;
    const dim3 grid(blocks_of(args.cloud.batch * args.tiles * blocks_of(args.c_out, kColumns), 1));
    return launch(pool_tiles<kind, decltype(x)>, grid, dim3(Block<kind>::threads), 0, stream, args);
  });
}

template <class T>
cudaError_t launch_finish(const PoolFinishArgs<T>& args, cudaStream_t stream) {
  return launch(pool_finish<T>, grid_of(args.batch * args.channels, kThreads), dim3(kThreads), 0, stream, args);
}
cudaError_t conv_bn_act_pool_finish(const PoolFinishArgs<float>& a, cudaStream_t s) { return launch_finish(a, s); }
cudaError_t conv_bn_act_pool_finish(const PoolFinishArgs<double>& a, cudaStream_t s) { return launch_finish(a, s); }

template <class T>
cudaError_t launch_terms(const PoolTermsArgs<T>& args, cudaStream_t stream) {
  return launch(pool_terms<T>, dim3(blocks_of(args.channels, kWarp)), dim3(kThreads), 0, stream, args);
}
cudaError_t conv_bn_act_pool_terms(const PoolTermsArgs<float>& a, cudaStream_t s) { return launch_terms(a, s); }
cudaError_t conv_bn_act_pool_terms(const PoolTermsArgs<double>& a, cudaStream_t s) { return launch_terms(a, s); }

cudaError_t conv_bn_act_pool_x_gradient(const PoolXGradientArgs& args, cudaStream_t stream) {
  return with_product(args.product, args.cloud.half, [&](auto product, auto x) {
    constexpr Product kind = decltype(product)::value;
    using B = Block<kind>;
    const dim3 grid(blocks_of(args.cloud.batch * blocks_of(args.cloud.n, B::rows) * blocks_of(args.cloud.c_in, kColumns), 1));
    return launch(pool_x_gradient<kind, decltype(x)>, grid, dim3(B::threads), 0, stream, args);
  });
}

cudaError_t conv_bn_act_pool_weight_gradient(const PoolWeightGradientArgs& args, cudaStream_t stream) {
  return with_product(args.product, args.cloud.half, [&](auto product, auto x) {
    constexpr Product kind = decltype(product)::value;
    using B = Block<kind>;
    const dim3 grid(blocks_of(args.parts, 1), blocks_of(args.c_out, B::rows), blocks_of(args.cloud.c_in, kColumns));
    return launch(pool_weight_gradient<kind, decltype(x)>, grid, dim3(B::threads), 0, stream, args);
  });
}

}  // namespace crosspoint::cuda
