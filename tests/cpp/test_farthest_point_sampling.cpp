#include "check.h"
#include "crosspoint/farthest_point_sampling.h"

using namespace check;

namespace {

template <class T>
struct Clouds {
  int64_t batch, n, channels;
  std::vector<T> points;

  double dist2(int64_t b, int64_t i, int64_t j) const {
    double total = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const double d = double(points[(b * n + i) * channels + c]) - double(points[(b * n + j) * channels + c]);
      total += d * d;
    }
    return std::isnan(total) ? std::numeric_limits<double>::infinity() : total;
  }

  std::vector<int64_t> sample(int64_t m, int64_t start, const std::vector<int64_t>& lengths = {}) const {
    return with_any_threads([&](const crosspoint::Parallel& parallel) {
      std::vector<int64_t> idx(batch * m, 99);
      const int64_t* valid = lengths.empty() ? nullptr : lengths.data();
      crosspoint::farthest_point_sampling(
          crosspoint::FarthestPointSamplingArgs<T>{points.data(), valid, batch, n, channels, m, start, idx.data()},
          parallel);
      return idx;
    });
  }

  // Each sample is as far as the farthest (up to `tolerance`), and where that is 0, the first of them.
  void verify(const std::vector<int64_t>& idx, int64_t m, int64_t start, double tolerance,
              const std::vector<int64_t>& lengths = {}) const {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t valid = lengths.empty() ? n : lengths[b];
      std::vector<double> nearest(valid, std::numeric_limits<double>::infinity());
      for (int64_t s = 0; s < m; ++s) {
        const int64_t taken = idx[b * m + s];
        if (s >= valid) {
          CHECK(taken == -1);
          continue;
        }
        if (!CHECK(taken >= 0 && taken < valid)) return;
        const int64_t first = std::max_element(nearest.begin(), nearest.end()) - nearest.begin();
        if (s == 0)
          CHECK(taken == start);
        else if (tolerance == 0)
          CHECK(taken == first);
        else
          CHECK(nearest[taken] >= nearest[first] * (1 - tolerance));
        for (int64_t i = 0; i < valid; ++i) nearest[i] = std::min(nearest[i], dist2(b, i, taken));
        nearest[taken] = -1;
        for (int64_t before = 0; before < s; ++before) {
          nearest[idx[b * m + before]] = -1;
          CHECK(idx[b * m + before] != taken);
        }
      }
    }
  }
};

template <class T>
void lattices() {
  for (int64_t channels : {1, 2, 3, 4, 9, 20})
    for (int64_t n : {1, 2, 7, 8, 15, 16, 31, 32, 33, 100}) {
      const Clouds<T> clouds{2, n, channels, lattice<T>(2 * n * channels, unsigned(n))};
      for (int64_t start : {int64_t(0), n - 1}) clouds.verify(clouds.sample(n + 2, start), n + 2, start, 0);
    }
}

template <class T>
void random(double tolerance) {
  for (int64_t channels : {3, 6, 40}) {
    const Clouds<T> clouds{3, 500, channels, normal<T>(3 * 500 * channels, 3)};
    clouds.verify(clouds.sample(120, 5), 120, 5, tolerance);
  }
}

template <class T>
void lengths() {
  const std::vector<int64_t> valid{40, 17, 1, 0};
  const Clouds<T> clouds{4, 40, 3, lattice<T>(4 * 40 * 3, 4)};
  clouds.verify(clouds.sample(30, 0, valid), 30, 0, 0, valid);
}

template <class T>
void not_finite() {
  Clouds<T> clouds{1, 40, 3, lattice<T>(40 * 3, 5)};
  clouds.points[20 * 3] = std::numeric_limits<T>::quiet_NaN();
  clouds.points[10 * 3 + 1] = std::numeric_limits<T>::infinity();
  const auto idx = clouds.sample(40, 0);
  clouds.verify(idx, 40, 0, 0);
  CHECK(idx[1] == 10 && idx[2] == 20);
}

}  // namespace

TEST(lattices_are_exact) { lattices<float>(), lattices<double>(); }
TEST(random_clouds_up_to_rounding) { random<float>(1e-5), random<double>(1e-13); }
TEST(clouds_of_different_sizes) { lengths<float>(), lengths<double>(); }
TEST(nan_counts_as_infinitely_far) { not_finite<float>(), not_finite<double>(); }
TEST(no_clouds) { CHECK((Clouds<float>{0, 5, 3, {}}.sample(4, 0).empty())); }
