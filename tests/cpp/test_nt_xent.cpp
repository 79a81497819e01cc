#include "check.h"
#include "crosspoint/nt_xent.h"

using namespace check;
using crosspoint::ContrastInput;
using crosspoint::NtXentBackward;
using crosspoint::NtXentForward;

namespace {

struct Options {
  int64_t samples, channels;
  bool within_views, symmetric;
  double temperature;
};

template <class T>
struct Output {
  std::vector<T> loss, row_losses, dz1, dz2, dtemperature;
  bool operator==(const Output& o) const {
    return loss == o.loss && row_losses == o.row_losses && dz1 == o.dz1 && dz2 == o.dz2 &&
           dtemperature == o.dtemperature;
  }
};

constexpr double kGrad = 1.7;  // what comes into the backward pass

template <class T>
Output<T> run(const Options& o, const std::vector<T>& z1, const std::vector<T>& z2,
              const crosspoint::Parallel& parallel) {
  Output<T> result{std::vector<T>(1), std::vector<T>(2 * o.samples), std::vector<T>(z1.size()),
                   std::vector<T>(z2.size()), std::vector<T>(1)};
  const ContrastInput<T> input{o.samples, o.channels, 0,             o.samples,      z1.data(),
                               z2.data(), nullptr,    o.temperature, o.within_views, o.symmetric};
  crosspoint::nt_xent_forward(NtXentForward<T>{input, result.loss.data(), result.row_losses.data(), nullptr}, parallel);
  crosspoint::nt_xent_backward(NtXentBackward<T>{input, kGrad, result.row_losses.data(), nullptr, result.dz1.data(),
                                                 result.dz2.data(), result.dtemperature.data()},
                               parallel);
  return result;
}

// The matrix of similarities written out, in double, by the chain rule.
Output<double> naive(const Options& o, const std::vector<double>& z1, const std::vector<double>& z2) {
  const int64_t n = o.samples, d = o.channels;
  std::vector<double> z(z1), unit, length(2 * n), d_unit(2 * n * d);
  z.insert(z.end(), z2.begin(), z2.end());
  unit = z;
  for (int64_t i = 0; i < 2 * n; ++i) {
    for (int64_t c = 0; c < d; ++c) length[i] += z[i * d + c] * z[i * d + c];
    length[i] = std::max(std::sqrt(length[i]), 1e-12);
    for (int64_t c = 0; c < d; ++c) unit[i * d + c] /= length[i];
  }
  const auto similarity = [&](int64_t i, int64_t j) {
    double dot = 0;
    for (int64_t c = 0; c < d; ++c) dot += unit[i * d + c] * unit[j * d + c];
    return dot / o.temperature;
  };
  Output<double> result{std::vector<double>(1), std::vector<double>(2 * n), std::vector<double>(n * d),
                        std::vector<double>(n * d), std::vector<double>(1)};
  const int64_t rows = o.symmetric ? 2 * n : n;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t positive = (i + n) % (2 * n);
    std::vector<double> s(2 * n, -std::numeric_limits<double>::infinity());
    for (int64_t j = 0; j < 2 * n; ++j)
      if (j != i && (o.within_views || (i < n) != (j < n))) s[j] = similarity(i, j);
    const double largest = *std::max_element(s.begin(), s.end());
    double total = 0;
    for (double value : s) total += std::exp(value - largest);
    result.loss[0] += (largest + std::log(total) - s[positive]) / rows;
    for (int64_t j = 0; j < 2 * n; ++j) {
      const double ds = kGrad / rows * (std::exp(s[j] - largest) / total - (j == positive));
      if (!std::isfinite(s[j])) continue;
      result.dtemperature[0] -= ds * s[j] / o.temperature;
      for (int64_t c = 0; c < d; ++c) {
        d_unit[i * d + c] += ds * unit[j * d + c] / o.temperature;
        d_unit[j * d + c] += ds * unit[i * d + c] / o.temperature;
      }
    }
  }
  for (int64_t i = 0; i < 2 * n; ++i) {
    double along = 0;
    for (int64_t c = 0; c < d; ++c) along += d_unit[i * d + c] * unit[i * d + c];
    for (int64_t c = 0; c < d; ++c)
      (i < n ? result.dz1[i * d + c] : result.dz2[(i - n) * d + c]) =
          (d_unit[i * d + c] - along * unit[i * d + c]) / length[i];
  }
  return result;
}

template <class T>
void compare(const Options& o) {
  const auto z1 = normal<T>(o.samples * o.channels, 1), z2 = normal<T>(o.samples * o.channels, 2);
  const Output<T> actual =
      with_any_threads([&](const crosspoint::Parallel& parallel) { return run(o, z1, z2, parallel); });
  const Output<double> expected = naive(o, widen(z1), widen(z2));
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-11;
  CHECK_BELOW(error(actual.loss, expected.loss), tolerance);
  CHECK_BELOW(error(actual.dz1, expected.dz1), tolerance);
  CHECK_BELOW(error(actual.dz2, expected.dz2), tolerance);
  CHECK_BELOW(error(actual.dtemperature, expected.dtemperature), tolerance);
}

template <class T>
void every_shape(bool within_views, bool symmetric) {
  for (double temperature : {0.1, 0.5})
    for (auto [samples, channels] : {std::pair<int64_t, int64_t>{2, 3}, {7, 2}, {48, 16}, {100, 33}})
      compare<T>({samples, channels, within_views, symmetric, temperature});
}

}  // namespace

TEST(nt_xent_float32) { every_shape<float>(true, true); }
TEST(nt_xent_float64) { every_shape<double>(true, true); }
TEST(info_nce_float32) { every_shape<float>(false, true); }
TEST(info_nce_float64) { every_shape<double>(false, true); }
TEST(one_sided_info_nce_float32) { every_shape<float>(false, false); }
TEST(one_sided_info_nce_float64) { every_shape<double>(false, false); }

// Three parts, one of them empty, each with its rows alone: together they are the whole.
TEST(ranges_of_rows_make_the_whole) {
  const Options o{130, 9, true, true, 0.2};
  const auto z1 = normal<double>(o.samples * o.channels, 1), z2 = normal<double>(o.samples * o.channels, 2);
  const Output<double> whole = run(o, z1, z2, crosspoint::serial());
  const auto rows_of = [&](int64_t first, int64_t rows) {
    return ContrastInput<double>{o.samples, o.channels, first,         rows,           z1.data(),
                                 z2.data(), nullptr,    o.temperature, o.within_views, o.symmetric};
  };
  double dtemperature = 0;
  for (auto [first, rows] : {std::pair<int64_t, int64_t>{0, 31}, {31, 0}, {31, 99}}) {
    std::vector<double> loss(1), row_losses(2 * rows), share(1);
    std::vector<double> dz1(rows * o.channels), dz2(rows * o.channels);
    crosspoint::nt_xent_forward(
        NtXentForward<double>{rows_of(first, rows), loss.data(), row_losses.data(), nullptr}, crosspoint::serial());
    crosspoint::nt_xent_backward(
        NtXentBackward<double>{rows_of(first, rows), kGrad, whole.row_losses.data(), nullptr, dz1.data(), dz2.data(),
                               share.data()},
        crosspoint::serial());
    dtemperature += share[0];
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t view : {0, 1})
        CHECK_BELOW(std::abs(row_losses[view * rows + i] - whole.row_losses[view * o.samples + first + i]), 1e-12);
    for (int64_t i = 0; i < rows * o.channels; ++i) {
      CHECK_BELOW(std::abs(dz1[i] - whole.dz1[first * o.channels + i]), 1e-13);
      CHECK_BELOW(std::abs(dz2[i] - whole.dz2[first * o.channels + i]), 1e-13);
    }
  }
  CHECK_BELOW(std::abs(dtemperature - whole.dtemperature[0]), 1e-12);
}

// Labels 0, 1, 2, ..., 0, 1, 2, ... of one set are the pairs of two views.
TEST(labels_that_occur_twice_make_two_views) {
  const Options o{100, 12, true, true, 0.2};
  const int64_t n = o.samples;
  const auto z1 = normal<double>(n * o.channels, 1), z2 = normal<double>(n * o.channels, 2);
  const Output<double> pairs = run(o, z1, z2, crosspoint::serial());
  std::vector<double> z(z1), loss(1), row_losses(2 * n), row_lse(2 * n), dz(2 * n * o.channels), dtemperature(1);
  z.insert(z.end(), z2.begin(), z2.end());
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < 2 * n; ++i) labels.push_back(i % n);
  const ContrastInput<double> input{2 * n,   o.channels,    0,             2 * n, z.data(),
                                    nullptr, labels.data(), o.temperature, true,  false};
  crosspoint::nt_xent_forward(NtXentForward<double>{input, loss.data(), row_losses.data(), row_lse.data()},
                              crosspoint::serial());
  crosspoint::nt_xent_backward(NtXentBackward<double>{input, kGrad, row_losses.data(), row_lse.data(), dz.data(), nullptr,
                                                      dtemperature.data()},
                               crosspoint::serial());
  std::vector<double> expected(pairs.dz1);
  expected.insert(expected.end(), pairs.dz2.begin(), pairs.dz2.end());
  CHECK_BELOW(error(loss, pairs.loss), 1e-12);
  CHECK_BELOW(error(dz, expected), 1e-11);
  CHECK_BELOW(error(dtemperature, pairs.dtemperature), 1e-11);
}

TEST(one_sample_has_no_negatives) {
  const Output<double> result = run<double>({1, 4, true, true, 0.1}, normal<double>(4, 1), normal<double>(4, 2),
                                            crosspoint::serial());
  CHECK(result.loss[0] == 0);
  for (double value : result.dz1) CHECK(value == 0);
}
