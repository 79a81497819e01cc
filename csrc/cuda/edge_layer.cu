// The algebra of a linear layer with batch norm on edges: a block for each output channel, or a thread for each number.
#include "crosspoint/cuda/edge_layer.h"

#include "cuda/rows.h"
#include "cuda/warp.h"

namespace crosspoint::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFlatThreads = 256;

// One row of the layer's signed weight.
template <class T>
struct Row {
  const T* weight;  // of A, then of B
  int64_t channels;
  double sign;

  __device__ Row(const EdgeLayer<T>& layer, int64_t o)
      : weight(layer.weight + o * 2 * layer.in_channels),
        channels(layer.in_channels),
        sign(layer.signs && layer.gamma != nullptr && layer.gamma[o] < T(0) ? -1 : 1) {}

  // Of [A | D].
  __device__ __forceinline__ double split(int64_t p) const {
    if (p < channels) return sign * static_cast<double>(weight[p]);
    return sign * (static_cast<double>(weight[p]) - static_cast<double>(weight[p - channels]));
  }
  __device__ __forceinline__ double own(int64_t c) const { return sign * static_cast<double>(weight[channels + c]); }
};

// By what h of channel o is multiplied on its way to z.
template <class T>
__device__ __forceinline__ double scale_of(const T* gamma, int64_t signs, const double* rstd, int64_t o) {
  if (gamma == nullptr) return rstd[o];
  const double factor = gamma[o];
  return (signs && factor < 0 ? -factor : factor) * rstd[o];
}

// The sum over the block, in every thread; the whole block calls.
__device__ __forceinline__ double block_sum(double value, double* space) {
  value = warp_sum(value);
  __syncthreads();
  if (lane_id() == 0) space[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = space[0];
  for (int w = 1; w < kWarps; ++w) total += space[w];
  return total;
}

__device__ __forceinline__ double at_least_one(double x) { return x > 1 ? x : 1; }

// a / b of what `by_number` lets through.
__device__ __forceinline__ int64_t short_quotient(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

template <class F>
__device__ __forceinline__ void for_each_index(int64_t count, F&& f) {
  for (int64_t i = blockIdx.x * int64_t(kFlatThreads) + threadIdx.x; i < count; i += gridDim.x * int64_t(kFlatThreads))
    f(i);
}

// ---- sums

template <class T>
__global__ void __launch_bounds__(kFlatThreads) layer_sum_parts(EdgeSumPartsArgs<T> args) {
  const int64_t C = args.channels, square = C * C, rows = args.batch * args.parts;
  for_each_index((3 * C + 2 * args.batch) * C, [&](int64_t i) {
    double sum = 0;
    if (i < 3 * square) {
#pragma unroll 8
      for (int64_t r = 0; r < rows; ++r) sum += static_cast<double>(args.gram[r * 3 * square + i]);
      const int which = i < square ? 0 : i < 2 * square ? 1 : 2;
      const int64_t a = short_quotient(i - which * square, C), c = i - which * square - a * C;
      if (which == 1) args.moments[(C + c) * 2 * C + a] = sum;
      args.moments[(which == 2 ? C + a : a) * 2 * C + (which == 0 ? c : C + c)] = sum;
    } else {
      const int64_t b = short_quotient(i - 3 * square, 2 * C), p = i - 3 * square - b * 2 * C;
      for (int64_t part = 0; part < args.parts; ++part) sum += args.first[(b * args.parts + part) * 2 * C + p];
      args.moments[(2 * C + b) * 2 * C + p] = sum;
    }
  });
}

// ---- the norm: loops are not unrolled where that would cost registers and gain nothing

__device__ __forceinline__ double read_running(const void* values, int64_t is_double, int64_t o) {
  return is_double ? static_cast<const double*>(values)[o] : static_cast<double>(static_cast<const float*>(values)[o]);
}

// As torch.lerp does, which gives `value` itself for a momentum of 1.
__device__ __forceinline__ void move_running(void* values, int64_t is_double, int64_t o, double value, double momentum) {
  const double before = read_running(values, is_double, o), step = value - before;
  const double after = momentum < 0.5 ? before + momentum * step : value - step * (1 - momentum);
  if (is_double)
    static_cast<double*>(values)[o] = after;
  else
    static_cast<float*>(values)[o] = static_cast<float>(after);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) layer_norm(EdgeNormArgs<T> args) {
  CROSSPOINT_SHARED(space, double[kWarps]);
  const int64_t C = args.layer.in_channels, O = args.layer.out_channels, B = args.layer.batch;
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  for (int64_t o = blockIdx.x; o < O; o += gridDim.x) {
    const Row<T> row(args.layer, o);
    for (int64_t c = threadIdx.x; c < C; c += kThreads) {
      args.halves[o * C + c] = static_cast<T>(row.split(c));
      args.halves[(O + o) * C + c] = static_cast<T>(row.split(C + c));
    }
    // h of each cloud's centre, and the square of each cloud's mean of what is left.
    const double* first = args.moments == nullptr ? nullptr : args.moments + 2 * C * 2 * C;
    double count = 0, sum = 0, square = 0;
#pragma unroll 1
    for (int64_t b = warp; b < B; b += kWarps) {
      double constant = 0, mean = 0;
#pragma unroll 1
      for (int64_t c = lane; c < C; c += kWarp) constant += static_cast<double>(args.centre[b * C + c]) * row.own(c);
      constant = warp_sum(constant);
      if (lane == 0) args.offset[b * O + o] = constant;
      if (args.moments == nullptr) continue;
#pragma unroll 1
      for (int64_t p = lane; p < 2 * C; p += kWarp) mean += first[b * 2 * C + p] * row.split(p);
      mean = warp_sum(mean);
      if (lane != 0) continue;
      const double edges = args.edges[b];
      count += edges;
      sum += mean + edges * constant;
      square += mean * mean / at_least_one(edges);
    }
    double mean = 0, rstd = 1;
    if (args.moments != nullptr) {
      count = block_sum(count, space);
      mean = block_sum(sum, space) / at_least_one(count);
      square = block_sum(square, space);
      double within = 0, between = 0;
      for (int64_t p = threadIdx.x; p < 2 * C; p += kThreads) {
        double product = 0;
#pragma unroll 8
        for (int64_t q = 0; q < 2 * C; ++q) product += row.split(q) * args.moments[q * 2 * C + p];
        within += row.split(p) * product;
      }
#pragma unroll 1
      for (int64_t b = warp; b < B; b += kWarps) {
        double own = 0;
#pragma unroll 1
        for (int64_t p = lane; p < 2 * C; p += kWarp) own += first[b * 2 * C + p] * row.split(p);
        own = warp_sum(own);
        if (lane != 0) continue;
        const double edges = args.edges[b], off = own / at_least_one(edges) + args.offset[b * O + o] - mean;
        between += edges * off * off;
      }
      within = block_sum(within, space) - square;
      between = block_sum(between, space);
      const double var = ((within < 0 ? 0 : within) + between) / at_least_one(count);  // NaN stays
      rstd = 1 / sqrt(var + args.eps);
      if (threadIdx.x == 0 && args.running_mean != nullptr && count > 0) {
        move_running(args.running_mean, args.running_double, o, row.sign * mean, args.momentum);
        move_running(args.running_var, args.running_double, o, var * (count / at_least_one(count - 1)), args.momentum);
      }
    } else if (args.layer.gamma != nullptr) {
      mean = row.sign * read_running(args.running_mean, args.running_double, o);
      rstd = 1 / sqrt(read_running(args.running_var, args.running_double, o) + args.eps);
    }
    __syncthreads();  // every offset of this channel is there
    double scale = rstd;
    if (args.layer.gamma != nullptr) {
      const double gamma = args.layer.gamma[o];
      scale *= args.layer.signs && gamma < 0 ? -gamma : gamma;
    }
    const double beta = args.beta == nullptr ? 0 : static_cast<double>(args.beta[o]);
#pragma unroll 1
    for (int64_t b = threadIdx.x; b < B; b += kThreads) {
      const double offset = args.offset[b * O + o] - mean;
      args.offset[b * O + o] = offset;
      args.shift[b * O + o] = static_cast<T>(beta + scale * offset);
    }
    if (threadIdx.x == 0) {
      args.rstd[o] = rstd;
      args.scale[o] = static_cast<T>(scale);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kFlatThreads) layer_affine(EdgeAffineArgs<T> args) {
  for_each_index(args.batch * args.channels, [&](int64_t i) {
    const int64_t b = short_quotient(i, args.channels), o = i - b * args.channels;
    const double scale = scale_of(args.gamma, args.signs, args.rstd, o);
    const double beta = args.beta == nullptr ? 0 : static_cast<double>(args.beta[o]);
    if (b == 0) args.scale[o] = static_cast<T>(scale);
    args.shift[i] = static_cast<T>(beta + scale * args.offset[i]);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) layer_norm_gradient(EdgeNormGradientArgs<T> args) {
  CROSSPOINT_SHARED(space, double[kWarps]);
  const int64_t O = args.channels, B = args.batch, parts = args.parts;
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  for (int64_t o = blockIdx.x; o < O; o += gridDim.x) {
    double count = 0, beta = 0, gamma = 0;
    for (int64_t b = warp; b < B; b += kWarps) {
      double sum = 0, weighted = 0;
      for (int64_t part = lane; part < parts; part += kWarp) {
        sum += args.partial[(b * parts + part) * O + o];
        weighted += args.partial[((B + b) * parts + part) * O + o];
      }
      sum = warp_sum(sum);
      weighted = warp_sum(weighted);
      if (lane != 0) continue;
      args.sum[b * O + o] = sum;
      count += args.edges[b];
      beta += sum;
      gamma += weighted + args.offset[b * O + o] * sum;
    }
    count = at_least_one(block_sum(count, space));
    beta = block_sum(beta, space);
    gamma = block_sum(gamma, space) * args.rstd[o];
    const double slope = gamma * args.rstd[o] / count;
    for (int64_t b = threadIdx.x; b < B; b += kThreads)
      args.mean_term[b * O + o] = beta / count + slope * args.offset[b * O + o];
    if (threadIdx.x != 0) continue;
    args.slope_term[o] = slope;
    if (args.gamma == nullptr) continue;
    args.grad_gamma[o] = static_cast<T>(args.signs && args.gamma[o] < T(0) ? -gamma : gamma);
    args.grad_beta[o] = static_cast<T>(beta);
  }
}

// ---- gradients of x and of the weight

template <class T>
__global__ void __launch_bounds__(kFlatThreads) layer_input_terms(EdgeInputTermsArgs<T> args) {
  const EdgeLayer<T>& layer = args.layer;
  const int64_t C = layer.in_channels, O = layer.out_channels, W = 2 * C;
  const int64_t halves = O * W, square = args.mean_term == nullptr ? 0 : W * W;
  const int64_t constant = args.mean_term == nullptr ? 0 : layer.batch * W;
  for_each_index(halves + square + constant, [&](int64_t i) {
    if (i < halves) {
      const int64_t o = short_quotient(i, W), p = i - o * W;
      const double value = scale_of(layer.gamma, layer.signs, args.rstd, o) * Row<T>(layer, o).split(p);
      args.halves[p < C ? o * C + p : (O + o) * C + p - C] = static_cast<T>(value);
      return;
    }
    i -= halves;
    const bool squared = i < square;
    if (!squared) i -= square;
    const int64_t r = short_quotient(i, W), p = i - r * W;
    double sum = 0;
    for (int64_t o = 0; o < O; ++o) {
      const Row<T> row(layer, o);
      const double factor = squared ? row.split(r) * args.slope_term[o] : args.mean_term[r * O + o];
      sum += factor * scale_of(layer.gamma, layer.signs, args.rstd, o) * row.split(p);
    }
    if (squared)
      args.square[(p < C ? r : W + r) * C + (p < C ? p : p - C)] = static_cast<T>(-sum);
    else
      args.constant[i] = static_cast<T>(sum);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) layer_weight_gradient(EdgeWeightGradientArgs<T> args) {
  const int64_t C = args.layer.in_channels, O = args.layer.out_channels, B = args.layer.batch, W = 2 * C;
  const bool training = args.mean_term != nullptr;
  const double* first = training ? args.moments + W * W : nullptr;
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  for (int64_t o = blockIdx.x; o < O; o += gridDim.x) {
    const Row<T> row(args.layer, o);
    const double scale = scale_of(args.layer.gamma, args.layer.signs, args.rstd, o);
    const double slope = training ? args.slope_term[o] : 0;
    if (training) {
      for (int64_t b = warp; b < B; b += kWarps) {
        double own = 0;
        for (int64_t p = lane; p < W; p += kWarp) own += first[b * W + p] * row.split(p);
        own = warp_sum(own);
        if (lane == 0) args.sum[b * O + o] -= args.edges[b] * args.mean_term[b * O + o] + slope * own;
      }
      __syncthreads();  // every sum of this channel is there
    }
    for (int64_t c = threadIdx.x; c < C; c += kThreads) {
      double end = args.sparse[o * C + c], begin = args.sparse[(O + o) * C + c];
      if (training) {
        double from_end = 0, from_begin = 0;
        for (int64_t q = 0; q < W; ++q) {
          const double factor = row.split(q);
          from_end += factor * args.moments[q * W + c];
          from_begin += factor * args.moments[q * W + C + c];
        }
        from_end *= slope;
        from_begin *= slope;
        for (int64_t b = 0; b < B; ++b) {
          const double factor = args.mean_term[b * O + o];
          from_end += factor * first[b * W + c];
          from_begin += factor * first[b * W + C + c];
        }
        end -= from_end;
        begin -= from_begin;
      }
      // Over all clouds the sums add up to 0 in training, so what the centres share may go before it is rounded.
      double mean = 0, moved = 0;
      if (training) {
        for (int64_t b = 0; b < B; ++b) mean += static_cast<double>(args.centre[b * C + c]);
        mean /= static_cast<double>(B);
      }
      for (int64_t b = 0; b < B; ++b)
        moved += args.sum[b * O + o] * (static_cast<double>(args.centre[b * C + c]) - mean);
      const double factor = row.sign * scale;
      args.grad[o * W + c] = static_cast<T>(factor * (end - begin));
      args.grad[o * W + C + c] = static_cast<T>(factor * (begin + moved));
    }
  }
}

// ---- launches

template <class Kernel, class Args>
cudaError_t by_channel(Kernel kernel, int64_t channels, const Args& args, cudaStream_t stream) {
  return launch(kernel, grid_for(channels), dim3(kThreads), 0, stream, args);
}

template <class Kernel, class Args>
cudaError_t by_number(Kernel kernel, int64_t numbers, const Args& args, cudaStream_t stream) {
  if (numbers > UINT32_MAX) return cudaErrorInvalidValue;  // 38,000 channels: their sums would not fit the device
  return launch(kernel, grid_for((numbers + kFlatThreads - 1) / kFlatThreads), dim3(kFlatThreads), 0, stream, args);
}

template <class T>
cudaError_t launch_sum_parts(const EdgeSumPartsArgs<T>& args, cudaStream_t stream) {
  return by_number(layer_sum_parts<T>, (3 * args.channels + 2 * args.batch) * args.channels, args, stream);
}

template <class T>
cudaError_t launch_input_terms(const EdgeInputTermsArgs<T>& args, cudaStream_t stream) {
  const int64_t width = 2 * args.layer.in_channels, dense = args.mean_term == nullptr ? 0 : width + args.layer.batch;
  return by_number(layer_input_terms<T>, (args.layer.out_channels + dense) * width, args, stream);
}

}  // namespace

cudaError_t edge_sum_parts(const EdgeSumPartsArgs<float>& a, cudaStream_t s) { return launch_sum_parts(a, s); }
cudaError_t edge_sum_parts(const EdgeSumPartsArgs<double>& a, cudaStream_t s) { return launch_sum_parts(a, s); }
cudaError_t edge_norm(const EdgeNormArgs<float>& a, cudaStream_t s) {
  return by_channel(layer_norm<float>, a.layer.out_channels, a, s);
}
cudaError_t edge_norm(const EdgeNormArgs<double>& a, cudaStream_t s) {
  return by_channel(layer_norm<double>, a.layer.out_channels, a, s);
}
cudaError_t edge_affine(const EdgeAffineArgs<float>& a, cudaStream_t s) {
  return by_number(layer_affine<float>, a.batch * a.channels, a, s);
}
cudaError_t edge_affine(const EdgeAffineArgs<double>& a, cudaStream_t s) {
  return by_number(layer_affine<double>, a.batch * a.channels, a, s);
}
cudaError_t edge_norm_gradient(const EdgeNormGradientArgs<float>& a, cudaStream_t s) {
  return by_channel(layer_norm_gradient<float>, a.channels, a, s);
}
cudaError_t edge_norm_gradient(const EdgeNormGradientArgs<double>& a, cudaStream_t s) {
  return by_channel(layer_norm_gradient<double>, a.channels, a, s);
}
cudaError_t edge_input_terms(const EdgeInputTermsArgs<float>& a, cudaStream_t s) { return launch_input_terms(a, s); }
cudaError_t edge_input_terms(const EdgeInputTermsArgs<double>& a, cudaStream_t s) { return launch_input_terms(a, s); }
cudaError_t edge_weight_gradient(const EdgeWeightGradientArgs<float>& a, cudaStream_t s) {
  return by_channel(layer_weight_gradient<float>, a.layer.out_channels, a, s);
}
cudaError_t edge_weight_gradient(const EdgeWeightGradientArgs<double>& a, cudaStream_t s) {
  return by_channel(layer_weight_gradient<double>, a.layer.out_channels, a, s);
}

}  // namespace crosspoint::cuda
