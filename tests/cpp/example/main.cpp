#include <crosspoint/farthest_point_sampling.h>
#include <crosspoint/knn.h>
#include <crosspoint/threads.h>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  const int64_t batch = 2, n = 1000, channels = 3, k = 8, m = 16;
  std::vector<float> points(batch * n * channels);  // row-major (batch, n, channels), as everywhere
  for (size_t i = 0; i < points.size(); ++i) points[i] = std::sin(0.37f * float(i * i % 1009));

  const crosspoint::Parallel parallel = crosspoint::threads(2);  // or serial(), or your own pool

  crosspoint::KnnArgs<float> knn{};
  knn.query = knn.points = points.data();
  knn.batch = batch, knn.queries = knn.candidates = n, knn.channels = channels, knn.k = k;
  knn.self = crosspoint::Self::first;  // each point is its own first neighbour
  std::vector<int64_t> neighbours(batch * n * k);
  std::vector<float> dist2(batch * n * k);
  knn.idx = neighbours.data();
  knn.dist2 = dist2.data();
  crosspoint::knn(knn, parallel);

  crosspoint::FarthestPointSamplingArgs<float> sampling{};
  sampling.points = points.data();
  sampling.batch = batch, sampling.n = n, sampling.channels = channels, sampling.m = m;
  std::vector<int64_t> samples(batch * m);
  sampling.idx = samples.data();
  crosspoint::farthest_point_sampling(sampling, parallel);

  std::printf("kernels: %s\n", crosspoint::isa_name(crosspoint::isa()));
  const int64_t point = samples[1];  // the farthest from point 0
  std::printf("neighbours of point %lld:", static_cast<long long>(point));
  for (int64_t s = 0; s < k; ++s) std::printf(" %lld", static_cast<long long>(neighbours[point * k + s]));
  std::printf("\n");
}
