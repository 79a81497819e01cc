#include "check.h"
#include "crosspoint/edge_conv.h"

using namespace check;
using crosspoint::EdgeConvBackwardArgs;
using crosspoint::EdgeConvForwardArgs;
using crosspoint::EdgeConvSaved;

namespace {

constexpr double kEps = 1e-5, kMomentum = 0.1;

struct Shape {
  int64_t batch, n, k, c_in, c_out;
  bool norm = true, training = true;
  double slope = 0.2;

  int64_t nodes() const { return batch * n; }
};

template <class T>
struct Input {
  std::vector<T> x, weight, gamma, beta, running_mean, running_var, grad;
  std::vector<int64_t> idx;

  explicit Input(const Shape& s)
      : x(normal<T>(s.nodes() * s.c_in, 1)),
        weight(normal<T>(s.c_out * 2 * s.c_in, 2, 0.3)),
        running_mean(normal<T>(s.c_out, 5, 0.1)),
        running_var(s.c_out, T(1.5)),
        grad(normal<T>(s.nodes() * s.c_out, 6)),
        idx(integers(s.nodes() * s.k, 7, -1, s.n - 1)) {
    if (s.norm) gamma = normal<T>(s.c_out, 3), beta = normal<T>(s.c_out, 4);  // of either sign
    for (int64_t slot = 0; slot < s.k; ++slot) idx[slot] = -1;                // a node without neighbours
  }
};

template <class T>
struct Output {
  std::vector<T> out, running_mean, running_var, grad_x, grad_weight, grad_gamma, grad_beta;

  bool operator==(const Output& o) const {
    return out == o.out && running_mean == o.running_mean && running_var == o.running_var && grad_x == o.grad_x &&
           grad_weight == o.grad_weight && grad_gamma == o.grad_gamma && grad_beta == o.grad_beta;
  }
};

template <class T>
Output<T> run(const Shape& s, const Input<T>& input, const crosspoint::Parallel& parallel) {
  const int64_t values = s.nodes() * s.c_out;
  Output<T> o{std::vector<T>(values),
              input.running_mean,
              input.running_var,
              std::vector<T>(input.x.size()),
              std::vector<T>(input.weight.size()),
              std::vector<T>(s.norm ? s.c_out : 0),
              std::vector<T>(s.norm ? s.c_out : 0)};
  const T* gamma = s.norm ? input.gamma.data() : nullptr;
  const T* beta = s.norm ? input.beta.data() : nullptr;
  std::vector<int32_t> degrees(2 * s.nodes()), slots(values);
  std::vector<T> centre(s.batch * s.c_in), winner(values), out_sum(values), in_sum(values);
  std::vector<double> offset(s.batch * s.c_out), rstd(s.c_out);
  const EdgeConvSaved<T> saved{degrees.data(),
                               degrees.data() + s.nodes(),
                               centre.data(),
                               offset.data(),
                               rstd.data(),
                               winner.data(),
                               slots.data(),
                               s.k <= 256 ? 1 : 4,
                               s.training ? out_sum.data() : nullptr,
                               s.training ? in_sum.data() : nullptr};
  crosspoint::edge_conv_forward(
      EdgeConvForwardArgs<T>{s.batch, s.n, s.k, s.c_in, s.c_out, input.x.data(), input.idx.data(), input.weight.data(),
                             gamma, beta, s.norm ? o.running_mean.data() : nullptr,
                             s.norm ? o.running_var.data() : nullptr, s.training, kMomentum, kEps, s.slope,
                             o.out.data(), saved},
      parallel);
  crosspoint::edge_conv_backward(
      EdgeConvBackwardArgs<T>{s.batch, s.n, s.k, s.c_in, s.c_out, input.grad.data(), input.x.data(), input.idx.data(),
                              input.weight.data(), gamma, beta, s.training, s.slope, saved, o.grad_x.data(),
                              o.grad_weight.data(), s.norm ? o.grad_gamma.data() : nullptr,
                              s.norm ? o.grad_beta.data() : nullptr},
      parallel);
  return o;
}

// Every edge written out, in double, by the chain rule.
Output<double> naive(const Shape& s, const Input<double>& input) {
  const int64_t edges = s.nodes() * s.k;
  Output<double> o{std::vector<double>(s.nodes() * s.c_out),
                   input.running_mean,
                   input.running_var,
                   std::vector<double>(input.x.size()),
                   std::vector<double>(input.weight.size()),
                   std::vector<double>(s.norm ? s.c_out : 0),
                   std::vector<double>(s.norm ? s.c_out : 0)};
  const auto feature = [&](int64_t e, int64_t c) {  // [x_j - x_i, x_i]
    const int64_t i = e / s.k, j = i / s.n * s.n + input.idx[e];
    if (c >= s.c_in) return input.x[i * s.c_in + c - s.c_in];
    return input.x[j * s.c_in + c] - input.x[i * s.c_in + c];
  };
  double count = 0;
  for (int64_t j : input.idx) count += j >= 0;
  std::vector<double> h(edges), dh(edges);
  for (int64_t channel = 0; channel < s.c_out; ++channel) {
    const double* weight = &input.weight[channel * 2 * s.c_in];
    double mean = 0, variance = 0, scale = 1, shift = 0;
    for (int64_t e = 0; e < edges; ++e) {
      h[e] = dh[e] = 0;
      if (input.idx[e] < 0) continue;
      for (int64_t c = 0; c < 2 * s.c_in; ++c) h[e] += weight[c] * feature(e, c);
      mean += h[e] / count;
    }
    for (int64_t e = 0; e < edges; ++e)
      if (input.idx[e] >= 0) variance += (h[e] - mean) * (h[e] - mean) / count;
    if (s.norm) {
      if (s.training) {
        o.running_mean[channel] += kMomentum * (mean - o.running_mean[channel]);
        o.running_var[channel] += kMomentum * (variance * count / (count - 1) - o.running_var[channel]);
      } else {
        mean = input.running_mean[channel], variance = input.running_var[channel];
      }
      scale = 1 / std::sqrt(variance + kEps), shift = mean;
    }
    const double gamma = s.norm ? input.gamma[channel] : 1, beta = s.norm ? input.beta[channel] : 0;
    double sum = 0, sum_h = 0;  // of dy, and of dy times the normalised h
    for (int64_t i = 0; i < s.nodes(); ++i) {
      int64_t winner = -1;
      double best = -std::numeric_limits<double>::infinity();
      for (int64_t e = i * s.k; e < (i + 1) * s.k; ++e) {
        if (input.idx[e] < 0) continue;
        const double y = (h[e] - shift) * scale * gamma + beta, z = y > 0 ? y : s.slope * y;
        if (z > best) best = z, winner = e;
      }
      if (winner < 0) continue;
      o.out[i * s.c_out + channel] = best;
      dh[winner] = input.grad[i * s.c_out + channel] * (best > 0 ? 1 : s.slope);
      sum += dh[winner];
      sum_h += dh[winner] * (h[winner] - shift) * scale;
    }
    if (s.norm) o.grad_gamma[channel] = sum_h, o.grad_beta[channel] = sum;
    for (int64_t e = 0; e < edges; ++e) {
      if (input.idx[e] < 0) continue;
      if (s.norm && s.training) dh[e] -= sum / count + (h[e] - shift) * scale * sum_h / count;
      dh[e] *= gamma * scale;
      const int64_t i = e / s.k, j = i / s.n * s.n + input.idx[e];
      for (int64_t c = 0; c < s.c_in; ++c) {
        o.grad_weight[channel * 2 * s.c_in + c] += dh[e] * feature(e, c);
        o.grad_weight[channel * 2 * s.c_in + s.c_in + c] += dh[e] * feature(e, s.c_in + c);
        o.grad_x[j * s.c_in + c] += dh[e] * weight[c];
        o.grad_x[i * s.c_in + c] += dh[e] * (weight[s.c_in + c] - weight[c]);
      }
    }
  }
  return o;
}

template <class T>
void compare(const Shape& s) {
  const Input<T> input(s);
  Input<double> wide(s);  // the same rounded values
  wide.x = widen(input.x), wide.weight = widen(input.weight), wide.grad = widen(input.grad);
  wide.gamma = widen(input.gamma), wide.beta = widen(input.beta), wide.running_mean = widen(input.running_mean);
  const Output<T> actual =
      with_any_threads([&](const crosspoint::Parallel& parallel) { return run(s, input, parallel); });
  const Output<double> expected = naive(s, wide);
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-11;
  CHECK_BELOW(error(actual.out, expected.out), tolerance);
  CHECK_BELOW(error(actual.running_mean, expected.running_mean), tolerance);
  CHECK_BELOW(error(actual.running_var, expected.running_var), tolerance);
  CHECK_BELOW(error(actual.grad_x, expected.grad_x), tolerance);
  CHECK_BELOW(error(actual.grad_weight, expected.grad_weight), tolerance);
  CHECK_BELOW(error(actual.grad_gamma, expected.grad_gamma), tolerance);
  CHECK_BELOW(error(actual.grad_beta, expected.grad_beta), tolerance);
}

template <class T>
void every_shape(bool norm, bool training, double slope) {
  compare<T>({2, 60, 12, 3, 64, norm, training, slope});
  compare<T>({3, 33, 7, 17, 5, norm, training, slope});
  compare<T>({1, 70, 9, 64, 40, norm, training, slope});
  compare<T>({2, 40, 3, 1, 1, norm, training, slope});
  compare<T>({1, 12, 300, 4, 33, norm, training, slope});  // slots beyond a byte
}

}  // namespace

TEST(training_float32) { every_shape<float>(true, true, 0.2); }
TEST(training_float64) { every_shape<double>(true, true, 0.2); }
TEST(evaluation_float32) { every_shape<float>(true, false, 0.2); }
TEST(evaluation_float64) { every_shape<double>(true, false, 0.0); }
TEST(without_norm_float32) { every_shape<float>(false, false, 0.01); }
TEST(without_norm_float64) { every_shape<double>(false, false, 1.0); }
