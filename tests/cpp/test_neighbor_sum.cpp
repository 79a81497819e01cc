#include "check.h"
#include "crosspoint/neighbor_sum.h"

using namespace check;

// In the kernel's order, so that the result is the same to the last bit.
template <class T>
static std::vector<T> naive(const std::vector<T>& x, const std::vector<int64_t>& idx, int64_t batch, int64_t n,
                            int64_t nodes, int64_t k, int64_t channels) {
  std::vector<T> out;
  for (int64_t i = 0; i < batch * nodes; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t s = 0; s < k; ++s) {
        const int64_t j = idx[i * k + s];
        if (j >= 0) total += x[(i / nodes * n + j) * channels + c];
      }
      out.push_back(static_cast<T>(total));
    }
  return out;
}

template <class T>
static void compare(int64_t batch, int64_t n, int64_t nodes, int64_t k, int64_t channels) {
  const auto x = normal<T>(batch * n * channels, 1);
  const auto idx = integers(batch * nodes * k, 2, -1, n - 1);
  const auto out = with_any_threads([&](const crosspoint::Parallel& parallel) {
    std::vector<T> out(batch * nodes * channels, T(7));
    crosspoint::neighbor_sum(
        crosspoint::NeighborSumArgs<T>{batch, n, nodes, k, channels, x.data(), idx.data(), out.data()}, parallel);
    return out;
  });
  CHECK(out == naive(x, idx, batch, n, nodes, k, channels));
}

template <class T>
static void every_shape() {
  compare<T>(2, 50, 50, 20, 3);
  compare<T>(3, 40, 111, 6, 64);
  compare<T>(1, 9, 300, 4, 17);
  compare<T>(1, 30, 1, 1, 1);
  compare<T>(2, 5, 8, 0, 4);
  compare<T>(2, 5, 0, 3, 4);
  compare<T>(2, 5, 8, 3, 0);
  compare<T>(2, 0, 8, 3, 2);
  compare<T>(0, 5, 8, 3, 2);
}

TEST(float32) { every_shape<float>(); }
TEST(float64) { every_shape<double>(); }
