// NT-Xent, forward: the tiles of the upper triangle, reduced to one sum of exponentials per row, or two with labels.
#include "nt_xent_labels.h"
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

  // Of a tile where `exclude` has marked what takes no part.
  void take(const T* x, int64_t rows, int64_t columns, const Exponents<T>& exponents) {
    if (exponents.shared)
      take<true>(x, rows, columns, exponents.bound);
    else
      take<false>(x, rows, columns, T(0));
  }

  void add_rows(int64_t rows, LogSum* to) const {
    for (int64_t i = 0; i < rows; ++i) to[i].add(row_bound[i], row_sum[i]);
  }
  void add_columns(int64_t columns, LogSum* to) const {
    for (int64_t j = 0; j < columns; ++j) to[j].add(column_bound[j], column_sum[j]);
  }

 private:
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

// Excludes from tile (a, b) the padding, up to a whole vector, each row's own entry, and with two views its
// positive.
template <class T>
void exclude(const Views<T>& views, int64_t a, int64_t b, T* x) {
  constexpr T lowest = std::numeric_limits<T>::lowest();
  const int64_t rows = views.count(a), columns = views.count(b);
  const int64_t padded = (columns + lanes<T> - 1) / lanes<T> * lanes<T>;
  for (int64_t i = 0; i < rows; ++i) fill(x + i * tile + columns, padded - columns, lowest);
  if (views.first(a) == views.first(b))
    for (int64_t i = 0; i < rows; ++i) x[i * tile + i] = lowest;
}

// The sums of all rows: of the negatives and, with labels, of the positives.
template <class T>
struct RowSums {
  RowSums(const Views<T>& views, bool labelled) : negatives(views.nodes() * tile) {
    fill(negatives.data(), views.nodes() * tile, LogSum());
    if (!labelled) return;
    positives = Buffer<LogSum>(views.nodes() * tile);
    totals = Buffer<double>(views.nodes() * tile);
    fill(positives.data(), views.nodes() * tile, LogSum());
    fill(totals.data(), views.nodes() * tile, 0.0);
  }

  Buffer<LogSum> negatives, positives;
  Buffer<double> totals;  // of the positives' exponents themselves
};

// Of the negatives. visit(make_scratch, compute, merge) is one of the ways to visit the tiles.
template <class T, class Visit>
void sum_tiles(const Views<T>& views, const Exponents<T>& exponents, RowSums<T>& to, Visit&& visit) {
  struct Scratch {
    ScratchTile<T> similarities;
    TileSums<T> sums;
  };
  const auto compute = [&](int64_t a, int64_t b, Scratch& scratch) {
    T* x = scratch.similarities.data;
    views.similarities(a, b, T(exponents.scale), x);
    exclude(views, a, b, x);
    scratch.sums.take(x, views.count(a), views.count(b), exponents);
  };
  const auto merge = [&](int64_t a, int64_t b, bool mutual, const Scratch& scratch) {
    scratch.sums.add_rows(views.count(a), to.negatives.data() + a * tile);
    if (mutual) scratch.sums.add_columns(views.count(b), to.negatives.data() + b * tile);
  };
  visit([] { return Scratch(); }, compute, merge);
}

template <class T>
void sum_labelled_tiles(const Views<T>& views, const Labels<T>& labels, const Exponents<T>& exponents,
                        RowSums<T>& to, const Parallel& parallel) {
  struct Scratch {
    ScratchTile<T> similarities;
    TileSums<T> negatives, positives;
    PositiveTile<T> taken;
    bool any;
  };
  const auto compute = [&](int64_t a, int64_t b, Scratch& scratch) {
    T* x = scratch.similarities.data;
    const int64_t rows = views.count(a), columns = views.count(b);
    views.similarities(a, b, T(exponents.scale), x);
    exclude(views, a, b, x);
    scratch.any = scratch.taken.take(x, rows, columns, labels.of(a), labels.of(b));
    scratch.negatives.take(x, rows, columns, exponents);
    if (scratch.any) scratch.positives.take(scratch.taken.entries.data, rows, columns, exponents);
  };
  const auto merge = [&](int64_t a, int64_t b, bool mutual, const Scratch& scratch) {
    const int64_t rows = views.count(a), columns = views.count(b);
    scratch.negatives.add_rows(rows, to.negatives.data() + a * tile);
    if (mutual) scratch.negatives.add_columns(columns, to.negatives.data() + b * tile);
    if (!scratch.any) return;
    scratch.positives.add_rows(rows, to.positives.data() + a * tile);
    for (int64_t i = 0; i < rows; ++i) to.totals[a * tile + i] += scratch.taken.row_total[i];
    if (!mutual) return;
    scratch.positives.add_columns(columns, to.positives.data() + b * tile);
    for (int64_t j = 0; j < columns; ++j) to.totals[b * tile + j] += scratch.taken.column_total[j];
  };
  visit_tiles(views, true, parallel, [] { return Scratch(); }, compute, merge);
}

// Sums of f(own block) over the own blocks, in their order.
template <class F>
double sum_over_blocks(int64_t blocks, const Parallel& parallel, F&& f) {
  Buffer<double> totals(blocks);
  parallel.ranges(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) totals[block] = f(block);
  });
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += totals[block];
  return total;
}

template <class T>
void forward(const NtXentForward<T>& args, const Parallel& parallel) {
  *args.loss = T(0);
  if (args.rows == 0) return;
  const Views<T> views(args, parallel);
  const Exponents<T> exponents(args.temperature);
  const Labels<T> labels(args, views, parallel);
  RowSums<T> sums(views, args.labels != nullptr);
  if (args.labels == nullptr)
    sum_tiles(views, exponents, sums,
              [&](auto&&... f) { visit_tiles(views, args.within_views, parallel, f...); });
  else
    sum_labelled_tiles(views, labels, exponents, sums, parallel);

  const auto paired = [&](int64_t own) {
    const int64_t block = views.own_block(own), other = views.blocks() + block;
    double total = 0;
    for (int64_t i = 0; i < views.count(block); ++i) {
      const double positive = views.cosine(block, i, other, i) / args.temperature;
      for (int view = 0; view < 2; ++view) {
        const double lse = sums.negatives[(view == 0 ? block : other) * tile + i].log2() / log2_e;
        const double loss = view == 0 || args.symmetric ? softplus(lse - positive) : 0;
        args.row_losses[view * args.rows + views.first_row(block) + i] = T(loss);
        total += loss;
      }
    }
    return total;
  };
  const auto labelled = [&](int64_t own) {
    const int64_t node = views.own_node(own);
    double total = 0;
    for (int64_t i = 0; i < views.count(node); ++i) {
      const int64_t row = node * tile + i, count = labels.count(node, i);
      double loss = 0, lse = std::numeric_limits<double>::infinity();
      if (count > 0) {
        double positives = sums.positives[row].log2() / log2_e;
        double mean = sums.totals[row] / (count * log2_e);
        if (count == 1) {
          const int64_t partner = labels.partner(node, i);
          positives = mean = views.cosine(node, i, partner / tile, partner % tile) / args.temperature;
        }
        const double push = softplus(sums.negatives[row].log2() / log2_e - positives);
        loss = push + (positives - mean);
        lse = positives + push - 1 / std::abs(args.temperature);
      }
      args.row_losses[views.first_row(node) + i] = T(loss);
      args.row_lse[views.first_row(node) + i] = T(lse);
      total += loss;
    }
    return total;
  };
  const int64_t blocks = views.own_blocks();
  int64_t averaged = args.symmetric ? 2 * args.rows : args.rows;
  double total;
  if (args.labels == nullptr) {
    total = sum_over_blocks(blocks, parallel, paired);
  } else {
    total = sum_over_blocks(blocks, parallel, labelled);
    averaged = rows_with_positives(args.row_lse, args.rows);
  }
  *args.loss = T(averaged == 0 ? 0 : total / double(averaged));
}

template <class T>
void visit_forward(const ContrastVisitForward<T>& args, const Parallel& parallel) {
  if (args.rows == 0) return;
  const Views<T> views(args, parallel);
  RowSums<T> sums(views, false);
  sum_tiles(views, Exponents<T>(args.temperature), sums,
            [&](auto&&... f) { visit_other_columns(views, true, parallel, f...); });
  // Own nodes come first, so that a row's place is its number but for the padding of the last.
  for (int64_t i = 0; i < args.rows; ++i) args.lse[i] = sums.negatives[i].log2() / log2_e;
}

}  // namespace

void nt_xent_forward(const NtXentForward<float>& args, const Parallel& parallel) { forward(args, parallel); }
void nt_xent_forward(const NtXentForward<double>& args, const Parallel& parallel) { forward(args, parallel); }
void contrast_visit_forward(const ContrastVisitForward<float>& args, const Parallel& parallel) {
  visit_forward(args, parallel);
}
void contrast_visit_forward(const ContrastVisitForward<double>& args, const Parallel& parallel) {
  visit_forward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
