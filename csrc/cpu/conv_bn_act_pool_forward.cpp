#include <cmath>

#include "conv_bn_act_pool.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// What a chunk of rows contributes, per channel.
template <class T>
struct Partial {
  Partial(int64_t chunks, int64_t channels)
      : channels(channels),
        mean(chunks * channels),
        scatter(chunks * channels),
        best(chunks * channels),
        row(chunks * channels),
        activation(chunks * channels),
        slope_sum(chunks * channels),
        slope_dot(chunks * channels) {}

  int64_t channels;
  Buffer<double> mean, scatter;  // of h; scatter: sum of squares about the mean
  Buffer<T> best;                // largest sign(gamma) h ...
  Buffer<int32_t> row;           // ... and the first row of the chunk that has it
  Buffer<double> activation;     // sum of the activations
  Buffer<double> slope_sum, slope_dot;
};

// Mean and scatter of the chunk's rows, summed about its first row, which is near enough to the mean to lose nothing.
template <class T>
void sum_moments(const T* __restrict h, int64_t rows, int64_t channels, double* __restrict mean,
                 double* __restrict scatter) {
  Buffer<T> first_row(channels);
  T* __restrict origin = first_row.data();
  for (int64_t c = 0; c < channels; ++c) {
    origin[c] = std::isfinite(h[c]) ? h[c] : T(0);
    mean[c] = scatter[c] = 0;
  }
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T* __restrict line = h + r * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double d0 = double(line[c]) - origin[c], d1 = double(line[channels + c]) - origin[c];
      const double d2 = double(line[2 * channels + c]) - origin[c], d3 = double(line[3 * channels + c]) - origin[c];
      mean[c] += (d0 + d1) + (d2 + d3);
      scatter[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      const double d = double(h[r * channels + c]) - origin[c];
      mean[c] += d;
      scatter[c] += d * d;
    }
  for (int64_t c = 0; c < channels; ++c) {
    const double d = mean[c] / double(rows);
    scatter[c] -= mean[c] * d;
    mean[c] = d + origin[c];
  }
}

// The first row with the largest sign * h; a NaN counts as larger than every number.
template <class T>
void find_extremes(const T* __restrict h, int64_t rows, int64_t channels, const T* __restrict sign,
                   T* __restrict best, int32_t* __restrict row) {
  for (int64_t c = 0; c < channels; ++c) {
    best[c] = sign[c] * h[c];
    row[c] = 0;
  }
  for (int64_t r = 1; r < rows; ++r) {
    const T* __restrict line = h + r * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const T value = sign[c] * line[c];
      const bool wins = (value > best[c]) | ((value != value) & (best[c] == best[c]));
      best[c] = wins ? value : best[c];
      row[c] = wins ? int32_t(r) : row[c];
    }
  }
}

// Sums over the chunk's rows: the activations; and, if a backward pass follows, their derivative and its product with h.
template <bool backward, class T>
void sum_activations(const T* __restrict h, int64_t rows, int64_t channels, const Norm<T>& norm, T slope,
                     double* __restrict activation, double* __restrict slope_sum, double* __restrict slope_dot) {
  const T *__restrict scale = norm.scale.data(), *__restrict shift = norm.shift.data();
  const T *__restrict high = norm.high.data(), *__restrict low = norm.low.data();
  for (int64_t c = 0; c < channels; ++c) {
    activation[c] = 0;
    if (backward) slope_sum[c] = slope_dot[c] = 0;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict line = h + r * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const T d = (line[c] - high[c]) - low[c], z = scale[c] * d + shift[c];
      const T derivative = z > T(0) ? T(1) : slope;
      activation[c] += double(derivative * z);
      if (backward) {
        slope_sum[c] += double(derivative);
        slope_dot[c] += double(derivative * d);
      }
    }
  }
}

// Mean and variance over all chunks, joined in their order; the running statistics follow.
template <class T>
void join_moments(const ConvBnActPoolForwardArgs<T>& args, const std::vector<Chunk>& chunks, const Partial<T>& partial,
                  double* mean, double* variance) {
  std::fill_n(mean, args.c_out, 0.0);
  std::fill_n(variance, args.c_out, 0.0);
  double count = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    const double rows = double(chunks[i].rows), total = count + rows;
    const double *other = partial.mean.data() + i * args.c_out, *scatter = partial.scatter.data() + i * args.c_out;
    for (int64_t c = 0; c < args.c_out; ++c) {
      const double apart = other[c] - mean[c];
      mean[c] += apart * (rows / total);
      variance[c] += scatter[c] + apart * apart * (count * rows / total);
    }
    count = total;
  }
  if (count == 0) return;
  for (int64_t c = 0; c < args.c_out; ++c) {
    const double unbiased = variance[c] / std::max(count - 1, 1.0);
    variance[c] /= count;
    if (args.running_mean == nullptr) continue;
    args.running_mean[c] += T(args.momentum * (mean[c] - args.running_mean[c]));
    args.running_var[c] += T(args.momentum * (unbiased - args.running_var[c]));
  }
}

// A cloud's row of the output, and of what is saved, from its chunks [begin, end).
template <class T>
void finish_cloud(const ConvBnActPoolForwardArgs<T>& args, int64_t b, const std::vector<Chunk>& chunks, size_t begin,
                  size_t end, const T* sign, const Partial<T>& partial, const Norm<T>& norm) {
  const int64_t channels = args.c_out;
  const T slope = T(args.negative_slope);
  const ConvBnActPoolSaved<T>& saved = args.saved;
  for (int64_t c = 0; c < channels; ++c) {
    T best = 0;
    int64_t winner = -1;
    double activation = 0, slope_sum = 0, slope_dot = 0;
    for (size_t i = begin; i < end; ++i) {
      const int64_t at = int64_t(i) * channels + c;
      const T value = partial.best[at];
      if (winner < 0 || value > best || (value != value && best == best)) {
        best = value;
        winner = chunks[i].first + partial.row[at];
      }
      activation += partial.activation[at];
      if (saved.winner == nullptr) continue;
      slope_sum += partial.slope_sum[at];
      slope_dot += partial.slope_dot[at];
    }
    const T h = sign[c] < T(0) ? -best : best;
    const T z = norm(h, c);
    T* out = args.out + b * 2 * channels;
    out[c] = winner < 0 ? T(0) : z > T(0) ? z : slope * z;
    out[channels + c] = winner < 0 ? T(0) : T(activation / double(length_of(args, b)));
    if (saved.winner == nullptr) continue;
    saved.winner[b * channels + c] = int32_t(winner);
    saved.slope_sum[b * channels + c] = slope_sum;
    saved.slope_dot[b * channels + c] = slope_dot * saved.rstd[c];
  }
}

template <class T>
void run(const ConvBnActPoolForwardArgs<T>& args, const Parallel& parallel) {
  const int64_t channels = args.c_out;
  const T slope = T(args.negative_slope);
  const std::vector<Chunk> chunks = chunks_of(args);
  const Packed<T> weight(args.c_in, channels, Strided<T>{args.weight, 1, args.c_in});
  Partial<T> partial(int64_t(chunks.size()), channels);
  Buffer<T> sign(channels);
  Buffer<double> variance(channels);
  for (int64_t c = 0; c < channels; ++c) {
    sign[c] = T(args.gamma[c] > 0) - T(args.gamma[c] < 0);
    if (args.training) continue;
    args.saved.mean[c] = args.running_mean[c];
    args.saved.rstd[c] = 1 / std::sqrt(double(args.running_var[c]) + args.eps);
  }

  const auto activate = [&](int64_t i, const T* h, const Norm<T>& norm) {
    const int64_t at = i * channels;
    double *activation = partial.activation.data() + at, *sum = partial.slope_sum.data() + at,
           *dot = partial.slope_dot.data() + at;
    if (args.saved.winner == nullptr)
      sum_activations<false>(h, chunks[i].rows, channels, norm, slope, activation, sum, dot);
    else
      sum_activations<true>(h, chunks[i].rows, channels, norm, slope, activation, sum, dot);
  };
  const auto fill_statistics = [&](const auto& norm) {
    parallel.items(
        int64_t(chunks.size()), [&] { return Buffer<T>(args.saved.h == nullptr ? Chunk::most_rows * channels : 0); },
        [&](int64_t i, Buffer<T>& scratch) {
          const Chunk& chunk = chunks[i];
          const int64_t row = chunk.cloud * args.n + chunk.first;
          T* h = args.saved.h == nullptr ? scratch.data() : args.saved.h + row * channels;
          multiply(chunk.rows, Strided<T>{args.x + row * args.c_in, args.c_in, 1}, weight, h, channels);
          find_extremes(h, chunk.rows, channels, sign.data(), partial.best.data() + i * channels,
                        partial.row.data() + i * channels);
          norm(i, h);
        });
  };
  if (args.training) {
    fill_statistics([&](int64_t i, const T* h) {
      sum_moments(h, chunks[i].rows, channels, partial.mean.data() + i * channels,
                  partial.scatter.data() + i * channels);
    });
    join_moments(args, chunks, partial, args.saved.mean, variance.data());
    for (int64_t c = 0; c < channels; ++c) args.saved.rstd[c] = 1 / std::sqrt(variance[c] + args.eps);
  }
  const Norm<T> norm(args, args.saved.mean, args.saved.rstd);
  if (args.training)
    parallel.items(
        int64_t(chunks.size()), [] { return 0; },
        [&](int64_t i, int) {
          activate(i, args.saved.h + (chunks[i].cloud * args.n + chunks[i].first) * channels, norm);
        });
  else
    fill_statistics([&](int64_t i, const T* h) { activate(i, h, norm); });

  std::vector<size_t> first(args.batch + 1, 0);  // chunk of each cloud
  for (const Chunk& chunk : chunks) ++first[chunk.cloud + 1];
  for (int64_t b = 0; b < args.batch; ++b) first[b + 1] += first[b];
  parallel.items(
      args.batch, [] { return 0; },
      [&](int64_t b, int) {
        finish_cloud(args, b, chunks, first[b], first[b + 1], sign.data(), partial, norm);
        if (args.saved.h == nullptr) return;
        const int64_t length = length_of(args, b);
        std::fill_n(args.saved.h + (b * args.n + length) * channels, (args.n - length) * channels, T(0));
      });
}

}  // namespace

void conv_bn_act_pool_forward(const ConvBnActPoolForwardArgs<float>& args, const Parallel& parallel) { run(args, parallel); }
void conv_bn_act_pool_forward(const ConvBnActPoolForwardArgs<double>& args, const Parallel& parallel) { run(args, parallel); }

}  // namespace crosspoint::CROSSPOINT_ISA
