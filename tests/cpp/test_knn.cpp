#include "check.h"
#include "crosspoint/knn.h"

using namespace check;
using crosspoint::KnnArgs;
using crosspoint::Self;

namespace {

template <class T>
struct Search {
  int64_t batch, queries, candidates, channels, k;
  Self self;
  std::vector<T> query, points;  // the query is empty where the points ask for their own neighbours
  std::vector<int64_t> lengths_query = {}, lengths_points = {};

  struct Result {
    std::vector<int64_t> idx;
    std::vector<T> dist2;
    bool operator==(const Result& other) const { return idx == other.idx && dist2 == other.dist2; }
  };

  const T* asking() const { return self == Self::other_set ? query.data() : points.data(); }

  Result run() const {
    return with_any_threads([&](const crosspoint::Parallel& parallel) {
      Result found{std::vector<int64_t>(batch * queries * k, 99), std::vector<T>(batch * queries * k, T(99))};
      const auto pointer = [](const std::vector<int64_t>& lengths) { return lengths.empty() ? nullptr : lengths.data(); };
      crosspoint::knn(KnnArgs<T>{asking(), points.data(), pointer(lengths_query), pointer(lengths_points), batch,
                                 queries, candidates, channels, k, self, found.idx.data(), found.dist2.data()},
                      parallel);
      return found;
    });
  }

  double distance(int64_t b, int64_t i, int64_t j) const {
    double total = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const double d = double(asking()[(b * queries + i) * channels + c]) -
                       double(points[(b * candidates + j) * channels + c]);
      total += d * d;
    }
    return std::isnan(total) ? std::numeric_limits<double>::infinity() : total;
  }

  // Against a sort in double; with tolerance 0 the graph must be the same, otherwise each rank's distance.
  void verify(double tolerance) const {
    const double infinite = std::numeric_limits<double>::infinity();
    const Result found = run();
    const int64_t step = candidates > 1000 ? 17 : 1;  // the naive search is slow
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < queries; i += step) {
        const int64_t* idx = &found.idx[(b * queries + i) * k];
        const T* dist2 = &found.dist2[(b * queries + i) * k];
        std::vector<std::pair<double, int64_t>> order;
        const bool asked = lengths_query.empty() || i < lengths_query[b];
        for (int64_t j = 0; asked && j < (lengths_points.empty() ? candidates : lengths_points[b]); ++j) {
          if (self != Self::other_set && i == j) {
            if (self == Self::first) order.emplace_back(-1.0, j);
            continue;
          }
          order.emplace_back(distance(b, i, j), j);
        }
        std::partial_sort(order.begin(), order.begin() + std::min<int64_t>(k, order.size()), order.end());
        std::vector<int64_t> seen;
        for (int64_t s = 0; s < k; ++s) {
          if (s >= int64_t(order.size())) {
            CHECK(idx[s] == -1 && dist2[s] == infinite);
            continue;
          }
          const auto [expected, j] = order[s];
          const bool own = self == Self::first && s == 0;
          if (own || tolerance == 0) {
            CHECK(idx[s] == j);
            CHECK(own || double(dist2[s]) == expected);
          } else {
            if (!CHECK(idx[s] >= 0 && idx[s] < candidates)) return;
            CHECK(std::abs(distance(b, i, idx[s]) - expected) <= tolerance * expected);
            CHECK(std::abs(dist2[s] - expected) <= tolerance * expected);
            CHECK(std::find(seen.begin(), seen.end(), idx[s]) == seen.end());
          }
          seen.push_back(idx[s]);
        }
      }
  }
};

template <class T>
double rounding(int64_t channels) {
  return (channels + 2) * double(std::numeric_limits<T>::epsilon());
}

// Three searches serve clouds: panels (up to 8 channels), a tree (up to 3 channels, many points), a filter (beyond 8).
template <class T>
void own_neighbours(int64_t batch, int64_t n, int64_t channels, int64_t k) {
  for (Self self : {Self::first, Self::left_out}) {
    Search<T>{batch, n, n, channels, k, self, {}, normal<T>(batch * n * channels, 1)}.verify(rounding<T>(channels));
    Search<T>{batch, n, n, channels, k, self, {}, lattice<T>(batch * n * channels, 2)}.verify(0);
  }
}

template <class T>
void other_neighbours(int64_t batch, int64_t queries, int64_t n, int64_t channels, int64_t k) {
  Search<T>{batch, queries, n, channels, k, Self::other_set, normal<T>(batch * queries * channels, 3),
            normal<T>(batch * n * channels, 4)}
      .verify(rounding<T>(channels));
  Search<T>{batch, queries, n, channels, k, Self::other_set, lattice<T>(batch * queries * channels, 5),
            lattice<T>(batch * n * channels, 6)}
      .verify(0);
}

template <class T>
void panels() {
  for (int64_t channels : {1, 2, 3, 5, 8}) own_neighbours<T>(2, 130, channels, 20);
  other_neighbours<T>(2, 33, 150, 3, 7);
  other_neighbours<T>(1, 50, 300, 3, 100);
  own_neighbours<T>(1, 2100, 3, 70);  // more neighbours than the tree serves, more points than are looked at together
}

template <class T>
void filter() {
  for (int64_t channels : {9, 16, 33, 64, 131}) own_neighbours<T>(2, 110, channels, 20);
  other_neighbours<T>(2, 60, 150, 40, 7);
  other_neighbours<T>(1, 20, 300, 12, 100);
  own_neighbours<T>(1, 2100, 12, 5);
}

template <class T>
void tree() {
  for (int64_t channels : {1, 2, 3}) own_neighbours<T>(1, 2600, channels, 16);
  other_neighbours<T>(1, 200, 2600, 3, 5);
  const int64_t n = 2600;
  Search<T>{2, n, n, 3, 8, Self::first, {}, normal<T>(2 * n * 3, 7), {2100, 0}, {2100, 0}}.verify(rounding<T>(3));
}

template <class T>
void duplicates() {
  for (auto [n, channels] : {std::pair<int64_t, int64_t>{300, 3}, {300, 20}, {2600, 3}}) {
    const auto few = normal<T>(5 * channels, 8);
    const auto choice = integers(n, 9, 0, 4);
    std::vector<T> points;
    for (int64_t i : choice) points.insert(points.end(), &few[i * channels], &few[i * channels] + channels);
    // Distances between equal points are 0, others differ: the order is exact although the values are not.
    const Search<T> search{1, n, n, channels, 12, Self::left_out, {}, points};
    const auto found = search.run();
    for (int64_t i = 0; i < n; ++i)
      for (int64_t s = 0, j = 0; s < 12; ++s, ++j) {
        while (j == i || choice[j] != choice[i]) ++j;
        CHECK(found.idx[i * 12 + s] == j && found.dist2[i * 12 + s] == 0);
      }
  }
}

template <class T>
void few_points() {
  for (int64_t channels : {3, 20}) {
    own_neighbours<T>(2, 6, channels, 9);
    own_neighbours<T>(1, 1, channels, 2);
    own_neighbours<T>(2, 0, channels, 3);
    own_neighbours<T>(0, 5, channels, 3);
    other_neighbours<T>(2, 4, 0, channels, 3);
    other_neighbours<T>(2, 0, 4, channels, 3);
    Search<T>{4, 40, 40, channels, 10, Self::first, {}, lattice<T>(4 * 40 * channels, 10), {40, 17, 1, 0}, {40, 17, 1, 0}}
        .verify(0);
    Search<T>{3, 9, 12, channels, 5, Self::other_set, lattice<T>(3 * 9 * channels, 11), lattice<T>(3 * 12 * channels, 12),
              {9, 4, 0}, {0, 12, 3}}
        .verify(0);
  }
}

template <class T>
void not_finite() {
  for (auto [n, channels] : {std::pair<int64_t, int64_t>{100, 3}, {100, 20}, {2600, 3}}) {
    auto points = lattice<T>(n * channels, 13);
    points[5 * channels] = std::numeric_limits<T>::quiet_NaN();
    points[9 * channels + 1] = std::numeric_limits<T>::infinity();
    points[2 * channels + 1] = -std::numeric_limits<T>::infinity();
    const int64_t k = n < 200 ? n : 10;
    for (Self self : {Self::first, Self::left_out}) Search<T>{1, n, n, channels, k, self, {}, points}.verify(0);
  }
}

}  // namespace

TEST(few_channels) { panels<float>(), panels<double>(); }
TEST(many_channels) { filter<float>(), filter<double>(); }
TEST(large_clouds) { tree<float>(), tree<double>(); }
TEST(equal_points_go_by_index) { duplicates<float>(), duplicates<double>(); }
TEST(fewer_points_than_neighbours_and_lengths) { few_points<float>(), few_points<double>(); }
TEST(nan_and_infinity_come_last) { not_finite<float>(), not_finite<double>(); }
