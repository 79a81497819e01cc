// Farthest point sampling: one sweep over the cloud per sample updates the distance of each point to the samples and
// finds the largest on the way.
#include "crosspoint/farthest_point_sampling.h"

#include <cstring>
#include <numeric>

#include "buffer.h"
#include "knn_distance.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// C: the number of channels, or 0 for any.
template <class T, int C>
class Sampler {
 public:
  Sampler(int64_t n, int64_t channels)
      : channels_(C > 0 ? C : channels),
        panels_(round_up(n, kPanel<T>) * channels_),
        nearest_(round_up(n, kPanel<T>)) {}

  void run(const T* points, int64_t n, int64_t m, int64_t start, int64_t* idx) {
    const int64_t samples = std::min(m, n), padded = round_up(n, kPanel<T>);
    std::fill(idx + samples, idx + m, int64_t(-1));
    if (samples == 0) return;
    pack_points(points, n, channels_, channels_, panels_.data());
    std::fill(nearest_.data(), nearest_.data() + n, infinity<T>);
    std::fill(nearest_.data() + n, nearest_.data() + padded, T(-1));
    int64_t last = start;
    for (int64_t i = 0;; ++i) {
      idx[i] = last;
      nearest_[last] = T(-1);  // below every distance, so it is not found again
      if (i + 1 == samples) return;
      last = sweep(points + last * channels_, padded);
    }
  }

 private:
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Index = decltype(Vec<T>{} < Vec<T>{});

  int64_t sweep(const T* query, int64_t padded) {
    constexpr int L = lanes<T>;
    const int64_t channels = C > 0 ? C : channels_;
    const T* panel = panels_.data();
    Vec<T> farthest[2] = {splat(T(-1)), splat(T(-1))};
    Index place[2] = {}, here[2];
    Integer first[kPanel<T>];
    std::iota(first, first + kPanel<T>, Integer(0));
    std::memcpy(here, first, sizeof here);
    for (int64_t j = 0; j < padded; j += kPanel<T>, panel += channels * kPanel<T>) {
      Vec<T> sum[2] = {};
      for (int64_t c = 0; c < channels; ++c) {
        const Vec<T> own = splat(query[c]);
        for (int h = 0; h < 2; ++h)
          sum[h] = add_square<T>(sum[h], load(panel + c * kPanel<T> + h * L) - own);
      }
      for (int h = 0; h < 2; ++h) {
        T* nearest = nearest_.data() + j + h * L;
        const Vec<T> distance = least<T>(sum[h], load(nearest));
        store(nearest, distance);
        const Index farther = distance > farthest[h];
        farthest[h] = farther ? distance : farthest[h];
        place[h] = farther ? here[h] : place[h];
        here[h] += Integer(kPanel<T>);
      }
    }
    T best = T(-1);
    int64_t found = 0;
    for (int h = 0; h < 2; ++h)
      for (int lane = 0; lane < L; ++lane) {
        const T distance = farthest[h][lane];
        const int64_t index = place[h][lane];
        if (distance > best || (distance == best && index < found)) best = distance, found = index;
      }
    return found;
  }

  int64_t channels_;
  Buffer<T> panels_;   // points side by side, channel by channel
  Buffer<T> nearest_;  // squared distance of each point to the samples
};

template <class T, int C>
void sample_clouds(const FarthestPointSamplingArgs<T>& a, const Parallel& parallel) {
  parallel.items(
      a.batch, [&] { return Sampler<T, C>(a.n, a.channels); },
      [&](int64_t b, Sampler<T, C>& sampler) {
        const int64_t n = a.lengths == nullptr ? a.n : a.lengths[b];
        sampler.run(a.points + b * a.n * a.channels, n, a.m, a.start, a.idx + b * a.m);
      });
}

template <class T>
void sample(const FarthestPointSamplingArgs<T>& a, const Parallel& parallel) {
  if (a.channels == 3)
    sample_clouds<T, 3>(a, parallel);
  else
    sample_clouds<T, 0>(a, parallel);
}

}  // namespace

void farthest_point_sampling(const FarthestPointSamplingArgs<float>& args, const Parallel& parallel) {
  sample(args, parallel);
}
void farthest_point_sampling(const FarthestPointSamplingArgs<double>& args, const Parallel& parallel) {
  sample(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
