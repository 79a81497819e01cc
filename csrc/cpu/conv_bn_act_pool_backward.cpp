#include <cmath>

#include "conv_bn_act_pool.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// The gradient of h, before the weight: scale * (slope(z) g_mean + [the row wins] slope(z) g_max) - mean_term -
// slope_term * (h - mean), the last two only where the batch made the statistics.
template <class T>
struct Terms {
  Terms(const ConvBnActPoolLayer<T>& layer)
      : mean_term(layer.c_out), slope_term(layer.c_out), even(layer.batch * layer.c_out), spike(layer.batch * layer.c_out) {}

  Buffer<T> mean_term, slope_term;  // (c_out)
  Buffer<T> even;                   // (batch, c_out): scale * g_mean, to every row
  Buffer<T> spike;                  // (batch, c_out): scale * slope(z) * g_max, to the winner
};

template <class T>
void find_terms(const ConvBnActPoolBackwardArgs<T>& args, const Norm<T>& norm, Terms<T>& terms) {
  const ConvBnActPoolSaved<T>& saved = args.saved;
  const int64_t channels = args.c_out;
  Buffer<double> beta(channels), gamma(channels);
  std::fill_n(beta.data(), channels, 0.0);
  std::fill_n(gamma.data(), channels, 0.0);
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t rows = length_of(args, b);
    const T* grad = args.grad + b * 2 * channels;
    for (int64_t c = 0; rows > 0 && c < channels; ++c) {
      const int64_t at = b * channels + c;
      const T h = saved.h[(b * args.n + saved.winner[at]) * channels + c];
      const double slope = norm(h, c) > T(0) ? 1.0 : args.negative_slope;
      const double largest = grad[c] * slope, even = double(grad[channels + c]) / double(rows);
      beta[c] += even * saved.slope_sum[at] + largest;
      gamma[c] += even * saved.slope_dot[at] + largest * (double(h) - saved.mean[c]) * saved.rstd[c];
      terms.even[at] = T(norm.scale[c] * even);
      terms.spike[at] = T(norm.scale[c] * largest);
    }
  }
  const int64_t rows = rows_of(args);
  for (int64_t c = 0; c < channels; ++c) {
    args.grad_gamma[c] = T(gamma[c]);
    args.grad_beta[c] = T(beta[c]);
    if (!args.training) continue;
    const double scale = args.gamma[c] * saved.rstd[c] / double(std::max<int64_t>(rows, 1));
    terms.mean_term[c] = T(scale * beta[c]);
    terms.slope_term[c] = T(scale * gamma[c] * saved.rstd[c]);
  }
  if (args.training && rows == 1) {  // the norm of a single row is constant
    for (Buffer<T>* zero : {&terms.mean_term, &terms.slope_term}) std::fill_n(zero->data(), channels, T(0));
    for (Buffer<T>* zero : {&terms.even, &terms.spike}) std::fill_n(zero->data(), args.batch * channels, T(0));
  }
}

// The chunk's gradient of h, (rows, c_out).
template <bool training, class T>
void spread(const ConvBnActPoolBackwardArgs<T>& args, const Chunk& chunk, const Norm<T>& norm, const Terms<T>& terms,
            T* __restrict out) {
  const int64_t channels = args.c_out, cloud = chunk.cloud * channels;
  const T slope = T(args.negative_slope);
  const T *__restrict scale = norm.scale.data(), *__restrict shift = norm.shift.data();
  const T *__restrict high = norm.high.data(), *__restrict low = norm.low.data();
  const T *__restrict mean_term = terms.mean_term.data(), *__restrict slope_term = terms.slope_term.data();
  const T* __restrict even = terms.even.data() + cloud;
  const T* __restrict h = args.saved.h + (chunk.cloud * args.n + chunk.first) * channels;
  for (int64_t r = 0; r < chunk.rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      const T d = (h[r * channels + c] - high[c]) - low[c], z = scale[c] * d + shift[c];
      const T derivative = z > T(0) ? T(1) : slope;
      const T direct = derivative * even[c];
      out[r * channels + c] = training ? direct - mean_term[c] - slope_term[c] * d : direct;
    }
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t row = args.saved.winner[cloud + c] - chunk.first;
    if (row >= 0 && row < chunk.rows) out[row * channels + c] += terms.spike[cloud + c];
  }
}

template <class T>
void run(const ConvBnActPoolBackwardArgs<T>& args, const Parallel& parallel) {
  const int64_t c_in = args.c_in, channels = args.c_out, weights = channels * c_in;
  const std::vector<Chunk> chunks = chunks_of(args);
  const Norm<T> norm(args, args.saved.mean, args.saved.rstd);
  Terms<T> terms(args);
  find_terms(args, norm, terms);
  const Packed<T> weight(channels, args.grad_x == nullptr ? 0 : c_in, Strided<T>{args.weight, c_in, 1});

  // A fixed number of groups of chunks, each with its own sum: results do not depend on the number of threads.
  constexpr int64_t most_groups = 16;
  const int64_t count = int64_t(chunks.size()), groups = std::min(count, most_groups);
  Buffer<T> sums(args.grad_weight == nullptr ? 0 : groups * weights);
  parallel.items(
      groups, [&] { return Buffer<T>(Chunk::most_rows * channels); },
      [&](int64_t group, Buffer<T>& grad_h) {
        const int64_t begin = group * count / groups, end = (group + 1) * count / groups;
        for (int64_t i = begin; i < end; ++i) {
          const Chunk& chunk = chunks[i];
          const int64_t row = chunk.cloud * args.n + chunk.first;
          if (args.training)
            spread<true>(args, chunk, norm, terms, grad_h.data());
          else
            spread<false>(args, chunk, norm, terms, grad_h.data());
          if (args.grad_x != nullptr)
            multiply(chunk.rows, Strided<T>{grad_h.data(), channels, 1}, weight, args.grad_x + row * c_in, c_in);
          if (args.grad_weight != nullptr) {
            const Packed<T> x(chunk.rows, c_in, Strided<T>{args.x + row * c_in, c_in, 1});
            multiply(channels, Strided<T>{grad_h.data(), 1, channels}, x, sums.data() + group * weights, c_in, i > begin);
          }
        }
      });
  if (args.grad_weight != nullptr)
    parallel.ranges(weights, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) args.grad_weight[w] = groups > 0 ? sums[w] : T(0);
      for (int64_t group = 1; group < groups; ++group)
        for (int64_t w = begin; w < end; ++w) args.grad_weight[w] += sums[group * weights + w];
    });
  if (args.grad_x != nullptr)
    for (int64_t b = 0; b < args.batch; ++b) {
      const int64_t length = length_of(args, b);
      std::fill_n(args.grad_x + (b * args.n + length) * c_in, (args.n - length) * c_in, T(0));
    }
}

}  // namespace

void conv_bn_act_pool_backward(const ConvBnActPoolBackwardArgs<float>& args, const Parallel& parallel) {
  run(args, parallel);
}
void conv_bn_act_pool_backward(const ConvBnActPoolBackwardArgs<double>& args, const Parallel& parallel) {
  run(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
