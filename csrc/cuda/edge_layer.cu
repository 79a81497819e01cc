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
  const T* weight;
  int64_t channels, width;
  double sign;

  __device__ Row(const EdgeLayer<T>& layer, int64_t o)
      : weight(layer.weight + o * layer.width),
        channels(layer.in_channels),
        width(layer.width),
        sign(layer.signs && layer.gamma != nullptr && layer.gamma[o] < T(0) ? -1 : 1) {}

  // Of [A | D], or of A.
  __device__ __forceinline__ double split(int64_t p) const {
    if (p < channels) return sign * static_cast<double>(weight[p]);
    return sign * (static_cast<double>(weight[p]) - static_cast<double>(weight[p - channels]));
  }
  // Of what the centre goes through: B, or A.
  __device__ __forceinline__ double last(int64_t c) const { return sign * static_cast<double>(weight[width - channels + c]); }
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

// Of doubles, or of floats.
__device__ __forceinline__ double read_either(const void* values, int64_t is_double, int64_t i) {
  return is_double ? static_cast<const double*>(values)[i] : static_cast<double>(static_cast<const float*>(values)[i]);
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

// As torch.lerp does, which gives `value` itself for a momentum of 1.
__device__ __forceinline__ void move_running(void* values, int64_t is_double, int64_t o, double value, double momentum) {
  const double before = read_either(values, is_double, o), step = value - before;
  const double after = momentum < 0.5 ? before + momentum * step : value - step * (1 - momentum);
  if (is_double)
    static_cast<double*>(values)[o] = after;
  else
    static_cast<float*>(values)[o] = static_cast<float>(after);
}

// One channel's norm. sum_of(b) is the sum of h less that of the centre over the edges of cloud b, and squares() this
// thread's part of the sum of its squares over all edges; a warp calls the one, the block the other. Scatter within
// clouds and between their means are sums of squares both: no large offset enters a difference.
template <class T, class SumOf, class Squares>
__device__ __forceinline__ void norm_of_channel(const EdgeLayer<T>& layer, const EdgeNorm<T>& norm, int64_t o, const Row<T>& row,
                                                bool training, double* space, SumOf&& sum_of, Squares&& squares) {
  const int64_t C = layer.in_channels, O = layer.out_channels, B = layer.batch;
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  double count = 0, total = 0, own = 0;  // edges; of h; of the squares of each cloud's mean of h less that of the centre
#pragma unroll 1
  for (int64_t b = warp; b < B; b += kWarps) {
    double constant = 0;
#pragma unroll 1
    for (int64_t c = lane; c < C; c += kWarp) constant += read_either(norm.centre, norm.centre_double, b * C + c) * row.last(c);
    constant = warp_sum(constant);
    if (lane == 0) norm.offset[b * O + o] = constant;
    if (!training) continue;
    const double sum = sum_of(b);
    if (lane != 0) continue;
    const double edges = norm.edges[b];
    count += edges;
    total += sum + edges * constant;
    own += sum * sum / at_least_one(edges);
  }
  double mean = 0, rstd = 1;
  if (training) {
    count = block_sum(count, space);
    mean = block_sum(total, space) / at_least_one(count);
    const double within = block_sum(squares(), space) - block_sum(own, space);
    double between = 0;
#pragma unroll 1
    for (int64_t b = warp; b < B; b += kWarps) {
      const double sum = sum_of(b);
      if (lane != 0) continue;
      const double edges = norm.edges[b], off = sum / at_least_one(edges) + norm.offset[b * O + o] - mean;
      between += edges * off * off;
    }
    between = block_sum(between, space);
    const double var = ((within < 0 ? 0 : within) + between) / at_least_one(count);  // NaN stays
    rstd = 1 / sqrt(var + norm.eps);
    if (threadIdx.x == 0 && norm.running_mean != nullptr && count > 0) {
      const double unbiased = var * (count / at_least_one(count - 1));
      move_running(norm.running_mean, norm.running_double, o, row.sign * mean, norm.momentum);
      move_running(norm.running_var, norm.running_double, o, unbiased, norm.momentum);
    }
  } else if (layer.gamma != nullptr) {
    mean = row.sign * read_either(norm.running_mean, norm.running_double, o);
    rstd = 1 / sqrt(read_either(norm.running_var, norm.running_double, o) + norm.eps);
  }
  __syncthreads();  // every offset of this channel is there
  double scale = rstd;
  if (layer.gamma != nullptr) {
    const double gamma = layer.gamma[o];
    scale *= layer.signs && gamma < 0 ? -gamma : gamma;
  }
  const double beta = norm.beta == nullptr ? 0 : static_cast<double>(norm.beta[o]);
#pragma unroll 1
  for (int64_t b = threadIdx.x; b < B; b += kThreads) {
    const double offset = norm.offset[b * O + o] - mean;
    norm.offset[b * O + o] = offset;
    norm.shift[b * O + o] = static_cast<T>(beta + scale * offset);
  }
  if (threadIdx.x == 0) {
    norm.rstd[o] = rstd;
    norm.scale[o] = static_cast<T>(scale);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) layer_norm(EdgeNormArgs<T> args) {
  CROSSPOINT_SHARED(space, double[kWarps]);
  const int64_t C = args.layer.in_channels, O = args.layer.out_channels, W = 2 * C;
  for (int64_t o = blockIdx.x; o < O; o += gridDim.x) {
    const Row<T> row(args.layer, o);
    for (int64_t c = threadIdx.x; c < C; c += kThreads) {
      args.halves[o * C + c] = static_cast<T>(row.split(c));
      args.halves[(O + o) * C + c] = static_cast<T>(row.split(C + c));
    }
    const auto sum_of = [&](int64_t b) {
      const double* first = args.moments + (W + b) * W;
      double sum = 0;
#pragma unroll 1
      for (int64_t p = lane_id(); p < W; p += kWarp) sum += first[p] * row.split(p);
      return warp_sum(sum);
    };
    const auto squares = [&] {
      double square = 0;
      for (int64_t p = threadIdx.x; p < W; p += kThreads) {
        double product = 0;
#pragma unroll 8
        for (int64_t q = 0; q < W; ++q) product += row.split(q) * args.moments[q * W + p];
        square += row.split(p) * product;
      }
      return square;
    };
    norm_of_channel(args.layer, args.norm, o, row, args.moments != nullptr, space, sum_of, squares);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) layer_sums_norm(EdgeSumsNormArgs<T> args) {
  CROSSPOINT_SHARED(space, double[kWarps]);
  const int64_t O = args.layer.out_channels, B = args.layer.batch, parts = args.parts;
  for (int64_t o = blockIdx.x; o < O; o += gridDim.x) {
    const auto sum_of = [&](int64_t b) {
      double sum = 0;
      for (int64_t part = lane_id(); part < parts; part += kWarp) sum += args.partial[(b * parts + part) * O + o];
      return warp_sum(sum);
    };
    const auto squares = [&] {
      double square = 0;
      for (int64_t i = threadIdx.x; i < B * parts; i += kThreads) square += args.partial[(B * parts + i) * O + o];
      return square;
    };
    norm_of_channel(args.layer, args.norm, o, Row<T>(args.layer, o), args.partial != nullptr, space, sum_of, squares);
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
__global__ void __launch_bounds__(kFlatThreads) layer_pivot(EdgePivotArgs<T> args) {
  for_each_index(args.batch * args.channels, [&](int64_t i) {
    const int64_t o = i - short_quotient(i, args.channels) * args.channels;
    const double shift = scale_of(args.gamma, 0, args.rstd, o) * args.offset[i] + (args.beta == nullptr ? 0 : static_cast<double>(args.beta[o]));
    args.pivot[i] = shift > 0 ? shift : shift * args.negative_slope;
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
  const int64_t C = layer.in_channels, O = layer.out_channels, W = layer.width;
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
  const int64_t C = args.layer.in_channels, O = args.layer.out_channels, B = args.layer.batch, W = args.layer.width;
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
    // Of column p of split: what is summed at the winners, less what the statistics take from every edge.
    const auto column = [&](int64_t p) {
      const double sparse = args.sparse[p < C ? o * C + p : (O + o) * C + p - C];
      if (!training) return sparse;
      double dense = 0;
#pragma unroll 4
      for (int64_t q = 0; q < W; ++q) dense += row.split(q) * args.moments[q * W + p];
      dense *= slope;
      for (int64_t b = 0; b < B; ++b) dense += args.mean_term[b * O + o] * first[b * W + p];
      return sparse - dense;
    };
    const double factor = row.sign * scale;
    for (int64_t c = threadIdx.x; c < C; c += kThreads) {
      // Over all clouds the sums add up to 0 in training, so what the centres share may go before it is rounded.
      const auto centre = [&](int64_t b) { return read_either(args.centre, args.centre_double, b * C + c); };
      double mean = 0, last = column(W - C + c);
      if (training) {
        for (int64_t b = 0; b < B; ++b) mean += centre(b);
        mean /= static_cast<double>(B);
      }
      if (W != C) args.grad[o * W + c] = static_cast<T>(factor * (column(c) - last));
      for (int64_t b = 0; b < B; ++b) last += args.sum[b * O + o] * (centre(b) - mean);
      args.grad[o * W + W - C + c] = static_cast<T>(factor * last);
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
  const int64_t width = args.layer.width, dense = args.mean_term == nullptr ? 0 : width + args.layer.batch;
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
cudaError_t edge_sums_norm(const EdgeSumsNormArgs<float>& a, cudaStream_t s) {
  return by_channel(layer_sums_norm<float>, a.layer.out_channels, a, s);
}
cudaError_t edge_sums_norm(const EdgeSumsNormArgs<double>& a, cudaStream_t s) {
  return by_channel(layer_sums_norm<double>, a.layer.out_channels, a, s);
}
cudaError_t edge_affine(const EdgeAffineArgs<float>& a, cudaStream_t s) {
  return by_number(layer_affine<float>, a.batch * a.channels, a, s);
}
cudaError_t edge_affine(const EdgeAffineArgs<double>& a, cudaStream_t s) {
  return by_number(layer_affine<double>, a.batch * a.channels, a, s);
}
cudaError_t edge_pivot(const EdgePivotArgs<float>& a, cudaStream_t s) {
  return by_number(layer_pivot<float>, a.batch * a.channels, a, s);
}
cudaError_t edge_pivot(const EdgePivotArgs<double>& a, cudaStream_t s) {
  return by_number(layer_pivot<double>, a.batch * a.channels, a, s);
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
