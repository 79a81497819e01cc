// NT-Xent, forward: the tiles of the upper triangle, reduced to one sum of exponentials per row.
#include "common/contrast.h"
#include "nt_xent_tiles.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// sum of 2^x over the entries of a row so far, as `sum` times 2^`bound`.
struct LogSum {
  double bound = -std::numeric_limits<double>::infinity();
  double sum = 0;

  void add(double other_bound, double other_sum) {
    if (other_bound == bound) {
      sum += other_sum;
    } else if (other_bound > bound) {
      sum = sum * std::exp2(bound - other_bound) + other_sum;
      bound = other_bound;
    } else {
      sum += other_sum * std::exp2(other_bound - bound);
    }
  }

  double log2() const { return bound + std::log2(sum); }
};

template <class T>
inline double sum_of_lanes(Vec<T> v) {
  T lane[lanes<T>];
  store(lane, v);
  for (int half = lanes<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <class T>
inline T largest_lane(Vec<T> v) {
  T lane[lanes<T>];
  store(lane, v);
  T largest = lane[0];
  for (int l = 1; l < lanes<T>; ++l) largest = std::max(largest, lane[l]);
  return largest;
}

// What one tile adds to each of its rows and columns.
template <class T>
struct TileSums {
  alignas(64) T row_bound[tile];
  alignas(64) T column_bound[tile];
  double row_sum[tile];
  alignas(64) T column_sum[tile];

  // Of a tile where `exclude` has marked what is no negative.
  template <bool shared>
  void take(const T* x, int64_t rows, int64_t columns, T bound) {
    constexpr int64_t L = lanes<T>;
    if (shared) {
      fill(row_bound, rows, bound);
      fill(column_bound, columns, bound);
    } else {
      find_bounds(x, rows, columns);
    }
    for (int64_t j = 0; j < columns; j += L) store(column_sum + j, Vec<T>{});
    for (int64_t i = 0; i < rows; ++i) {
      Vec<T> row{};
      for (int64_t j = 0; j < columns; j += L) {
        const Vec<T> entry = load(x + i * tile + j);
        const Vec<T> power = exp2<T>(entry - splat(row_bound[i]));
        row += power;
        const Vec<T> other = shared ? power : exp2<T>(entry - load(column_bound + j));
        store(column_sum + j, load(column_sum + j) + other);
      }
      row_sum[i] = sum_of_lanes<T>(row);
    }
  }

 private:
  void find_bounds(const T* x, int64_t rows, int64_t columns) {
    constexpr int64_t L = lanes<T>;
    const Vec<T> lowest = splat(std::numeric_limits<T>::lowest());
    for (int64_t j = 0; j < columns; j += L) store(column_bound + j, lowest);
    for (int64_t i = 0; i < rows; ++i) {
      Vec<T> row = lowest;
      for (int64_t j = 0; j < columns; j += L) {
        const Vec<T> entry = load(x + i * tile + j);
        row = max(entry, row);  // a NaN is left to the sum
        store(column_bound + j, max(entry, load(column_bound + j)));
      }
      row_bound[i] = largest_lane<T>(row);
    }
  }
};

// Excludes from tile (a, b) the padding, up to a whole vector, and each row's own entry or its positive.
template <class T>
void exclude(const Views<T>& views, int64_t a, int64_t b, T* x) {
  constexpr T lowest = std::numeric_limits<T>::lowest();
  const int64_t rows = views.count(a), columns = views.count(b);
  const int64_t padded = (columns + lanes<T> - 1) / lanes<T> * lanes<T>;
  for (int64_t i = 0; i < rows; ++i) fill(x + i * tile + columns, padded - columns, lowest);
  if (views.first(a) == views.first(b))
    for (int64_t i = 0; i < rows; ++i) x[i * tile + i] = lowest;
}

template <class T>
void forward(const NtXentForward<T>& args, const Parallel& parallel) {
  if (args.samples == 0) {
    *args.loss = T(0);
    return;
  }
  const Views<T> views(args, parallel);
  const Exponents<T> exponents(args.temperature);
  Buffer<LogSum> negatives(views.nodes() * tile);
  fill(negatives.data(), views.nodes() * tile, LogSum());

  struct Scratch {
    ScratchTile<T> similarities;
    TileSums<T> sums;
  };
  const auto compute = [&](int64_t a, int64_t b, Scratch& scratch) {
    T* x = scratch.similarities.data;
    views.similarities(a, b, T(exponents.scale), x);
    exclude(views, a, b, x);
    if (exponents.shared)
      scratch.sums.template take<true>(x, views.count(a), views.count(b), exponents.bound);
    else
      scratch.sums.template take<false>(x, views.count(a), views.count(b), T(0));
  };
  const auto merge = [&](int64_t a, int64_t b, const Scratch& scratch) {
    const TileSums<T>& sums = scratch.sums;
    for (int64_t i = 0; i < views.count(a); ++i)
      negatives[a * tile + i].add(sums.row_bound[i], sums.row_sum[i]);
    if (a != b)
      for (int64_t j = 0; j < views.count(b); ++j)
        negatives[b * tile + j].add(sums.column_bound[j], sums.column_sum[j]);
  };
  Rounds(views.blocks(), args.within_views).run(parallel, [] { return Scratch(); }, compute, merge);

  Buffer<double> totals(views.blocks());
  parallel.ranges(views.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t other = views.blocks() + block;
      double total = 0;
      for (int64_t i = 0; i < views.count(block); ++i) {
        const double positive = views.positive(block, i) / args.temperature;
        for (int view = 0; view < 2; ++view) {
          const double lse = negatives[(view == 0 ? block : other) * tile + i].log2() / log2_e;
          const double loss = view == 0 || args.symmetric ? softplus(lse - positive) : 0;
          args.row_losses[view * args.samples + views.first(block) + i] = T(loss);
          total += loss;
        }
      }
      totals[block] = total;
    }
  });
  double total = 0;
  for (int64_t block = 0; block < views.blocks(); ++block) total += totals[block];
  *args.loss = T(total / double(args.symmetric ? 2 * args.samples : args.samples));
}

}  // namespace

void nt_xent_forward(const NtXentForward<float>& args, const Parallel& parallel) { forward(args, parallel); }
void nt_xent_forward(const NtXentForward<double>& args, const Parallel& parallel) { forward(args, parallel); }

}  // namespace crosspoint::CROSSPOINT_ISA
