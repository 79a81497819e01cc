// NT-Xent, backward: each tile of similarities is formed again, turned into weights, and multiplied with
// the rows of both its sides.
#include "nt_xent_labels.h"
#include "nt_xent_tiles.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// Per row: what turns a power of two into a softmax weight, and the weight that the positive lacks.
template <class T>
struct RowWeights {
  explicit RowWeights(const Views<T>& views)
      : softmax(views.nodes() * tile), positive(views.nodes() * tile) {}

  // lse: log of the sum over the positives and the negatives.
  void set(int64_t row, double lse, double missing, const Exponents<T>& exponents) {
    positive[row] = missing;
    softmax[row] = exponents.weight(lse * log2_e);
  }
  void set_no_part(int64_t row, const Exponents<T>& exponents) {
    set(row, std::numeric_limits<double>::infinity(), 0, exponents);
  }
  void set_padding(const Views<T>& views, int64_t node) {
    const int64_t count = views.count(node);
    fill(softmax.data() + node * tile + count, tile - count, T(0));
    fill(positive.data() + node * tile + count, tile - count, 0.0);
  }

  Buffer<T> softmax;  // with a shared bound: the factor of 2^(x - bound); otherwise what is added to x
  Buffer<double> positive;
};

template <class T>
RowWeights<T> paired_weights(const NtXentBackward<T>& args, const Views<T>& views,
                             const Exponents<T>& exponents, const Parallel& parallel) {
  RowWeights<T> weights(views);
  parallel.ranges(views.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t other = views.blocks() + block;
      for (int64_t i = 0; i < views.count(block); ++i) {
        const double positive = views.cosine(block, i, other, i) / args.temperature;
        for (int view = 0; view < 2; ++view) {
          const int64_t row = (view == 0 ? block : other) * tile + i;
          const double loss = args.row_losses[view * args.samples + views.first(block) + i];
          if (view == 0 || args.symmetric)
            weights.set(row, positive + loss, missing_probability(loss), exponents);
          else
            weights.set_no_part(row, exponents);
        }
      }
      for (int64_t node : {block, other}) weights.set_padding(views, node);
    }
  });
  return weights;
}

template <class T>
RowWeights<T> labelled_weights(const NtXentBackward<T>& args, const Views<T>& views,
                               const Exponents<T>& exponents) {
  RowWeights<T> weights(views);
  for (int64_t node = 0; node < views.nodes(); ++node) {
    for (int64_t i = 0; i < views.count(node); ++i) {
      const int64_t sample = views.first(node) + i;
      const double lse = double(args.row_lse[sample]) + 1 / std::abs(args.temperature);
      weights.set(node * tile + i, lse, missing_probability(args.row_losses[sample]), exponents);
    }
    weights.set_padding(views, node);
  }
  return weights;
}

// x, a tile of similarities, becomes the sum of both softmaxes: row i's at column j, and row j's at column i.
template <class T, bool shared>
void to_softmaxes(T* x, int64_t rows, int64_t columns, const T* row, const T* column, T bound) {
  constexpr int64_t L = lanes<T>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += L) {
      const Vec<T> entry = load(x + i * tile + j);
      if (shared)
        store(x + i * tile + j, exp2<T>(entry - splat(bound)) * (splat(row[i]) + load(column + j)));
      else
        store(x + i * tile + j, exp2<T>(entry + splat(row[i])) + exp2<T>(entry + load(column + j)));
    }
  }
}

// The tile of nodes a and b.
template <class T>
void form_weights(const Views<T>& views, const Exponents<T>& exponents, const RowWeights<T>& weights, int64_t a,
                  int64_t b, T* x) {
  const int64_t rows = views.count(a), columns = views.count(b);
  const T *row = weights.softmax.data() + a * tile, *column = weights.softmax.data() + b * tile;
  views.similarities(a, b, T(exponents.scale), x);
  if (exponents.shared)
    to_softmaxes<T, true>(x, rows, columns, row, column, exponents.bound);
  else
    to_softmaxes<T, false>(x, rows, columns, row, column, T(0));
}

// What the positives of a row or a column lack of their softmax weights. The entry of a single positive is
// replaced, so that it keeps its digits where the weight is all but one.
template <class T>
void subtract_positives(T* x, const Views<T>& views, const Labels<T>& labels, const RowWeights<T>& weights,
                        int64_t a, int64_t b) {
  constexpr int64_t L = lanes<T>;
  const auto* column_labels = labels.of(b);
  for (int64_t i = 0; i < views.count(a); ++i) {
    const int64_t count = labels.count(a, i), partner = labels.partner(a, i);
    if (count == 0) continue;
    if (count == 1) {
      if (partner / tile == b)
        x[i * tile + partner % tile] = T(-(weights.positive[a * tile + i] + weights.positive[partner]));
      continue;
    }
    const auto label = splat(labels.of(a)[i]);
    const Vec<T> target = splat(T(2 / double(count)));  // of the row's softmax and of the column's
    for (int64_t j = 0; j < views.count(b); j += L) {
      const Vec<T> entry = load(x + i * tile + j);
      store(x + i * tile + j, load(column_labels + j) == label ? entry - target : entry);
    }
  }
}

// out (rows x channels) += or = w z, with w(i, p) = weights[i * row_stride + p * step].
template <int64_t row_stride, class T>
void multiply_weights(const T* weights, int64_t step, int64_t rows, int64_t depth, const T* z, int64_t stride,
                      T* out, int64_t channels, bool add) {
  constexpr int64_t R = Tile<T>::rows, W = Tile<T>::columns;
  for (int64_t c = 0; c < channels; c += W) {
    for (int64_t i = 0; i < rows; i += R) {
      Vec<T> acc[R][Tile<T>::vectors];
      clear<T>(acc);
      multiply_tile<row_stride>(depth, weights + i * row_stride, step, z + c, stride, acc);
      const int64_t height = std::min(R, rows - i), width = std::min(W, channels - c);
      store_tile<T>(acc, out + i * channels + c, channels, height, width, add);
    }
  }
}

template <class T>
void backward(const NtXentBackward<T>& args, const Parallel& parallel) {
  *args.dtemperature = T(0);
  if (args.rows == 0) return;
  const bool labelled = args.labels != nullptr;
  const Views<T> views(args, parallel);
  const Exponents<T> exponents(args.temperature);
  const Labels<T> labels(args, views, parallel);
  const RowWeights<T> weights = labelled ? labelled_weights(args, views, exponents)
                                         : paired_weights(args, views, exponents, parallel);
  const int64_t channels = args.channels;
  const auto gradient = [&](int64_t node) {
    return (views.view(node) == 0 ? args.dz1 : args.dz2) + views.first_row(node) * channels;
  };

  const auto compute = [&](int64_t a, int64_t b, ScratchTile<T>& scratch) {
    T* x = scratch.data;
    form_weights(views, exponents, weights, a, b, x);
    if (labelled) subtract_positives(x, views, labels, weights, a, b);
    if (views.first(a) == views.first(b))  // a row itself, or its positive, which is added at the end
      for (int64_t i = 0; i < views.count(a); ++i) x[i * tile + i] = T(0);
  };
  Buffer<bool> begun(views.nodes());
  fill(begun.data(), views.nodes(), false);
  const auto merge = [&](int64_t a, int64_t b, bool mutual, const ScratchTile<T>& scratch) {
    const int64_t rows = views.count(a), columns = views.count(b), stride = views.stride();
    const T* w = scratch.data;
    multiply_weights<tile>(w, 1, rows, columns, views.rows(b), stride, gradient(a), channels, begun[a]);
    begun[a] = true;
    if (!mutual) return;
    multiply_weights<1>(w, tile, columns, rows, views.rows(a), stride, gradient(b), channels, begun[b]);
    begun[b] = true;
  };
  visit_tiles(views, args.within_views, parallel, [] { return ScratchTile<T>(); }, compute, merge);

  // The positives, then from the gradient of the normalised rows to that of the rows.
  int64_t averaged = args.symmetric ? 2 * args.samples : args.samples;
  if (labelled) averaged = std::max<int64_t>(1, rows_with_positives(args.row_lse, args.samples));
  const double scale = args.grad / (double(averaged) * args.temperature);
  Buffer<double> along(views.own_nodes());
  parallel.ranges(views.own_nodes(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own) {
      const int64_t node = views.own_node(own), other = (node + views.blocks()) % views.nodes();
      double total = 0;
      for (int64_t i = 0; i < views.count(node); ++i) {
        const T* z = views.rows(node) + i * views.stride();
        const T* positive = views.rows(other) + i * views.stride();
        T* dz = gradient(node) + i * channels;
        const double pull =
            labelled ? 0 : weights.positive[node * tile + i] + weights.positive[other * tile + i];
        const double radial = dot(z, dz, channels) - pull * dot(z, positive, channels);
        const double norm = views.norms(node)[i];
        const bool clamped = norm < shortest;  // a constant divisor: the gradient is not projected
        const double projection = clamped ? 0 : radial, factor = scale / (clamped ? shortest : norm);
        for (int64_t c = 0; c < channels; ++c)
          dz[c] = T((dz[c] - pull * positive[c] - projection * z[c]) * factor);
        total += radial;
      }
      along[own] = total;
    }
  });
  double total = 0;
  for (int64_t own = 0; own < views.own_nodes(); ++own) total += along[own];
  *args.dtemperature = T(-total * scale / (2 * args.temperature));
}

template <class T>
void visit_backward(const ContrastVisitBackward<T>& args, const Parallel& parallel) {
  const int64_t rows = args.rows, channels = args.channels;
  fill(args.sums, rows * channels, T(0));
  *args.moment = 0;
  if (rows == 0) return;
  const Views<T> views(args, parallel);
  const Exponents<T> exponents(args.temperature);
  RowWeights<T> weights(views);
  for (int64_t node = 0; node < views.nodes(); ++node) {
    for (int64_t i = 0; i < views.count(node); ++i) {
      const int64_t sample = views.first(node) + i;
      weights.set(node * tile + i, sample < rows ? args.row_lse[sample] : args.column_lse[sample - rows], 0, exponents);
    }
    weights.set_padding(views, node);
  }
  visit_other_columns(
      views, true, parallel, [] { return ScratchTile<T>(); },
      [&](int64_t a, int64_t b, ScratchTile<T>& scratch) {
        form_weights(views, exponents, weights, a, b, scratch.data);
      },
      [&](int64_t a, int64_t b, bool, const ScratchTile<T>& scratch) {
        multiply_weights<tile>(scratch.data, 1, views.count(a), views.count(b), views.rows(b), views.stride(),
                               args.sums + views.first_row(a) * channels, channels, true);
      });
  for (int64_t own = 0; own < views.own_nodes(); ++own)
    for (int64_t i = 0; i < views.count(own); ++i)
      *args.moment += dot(views.rows(own) + i * views.stride(), args.sums + (views.first_row(own) + i) * channels,
                          channels);
  *args.moment /= args.temperature;
}

}  // namespace

void nt_xent_backward(const NtXentBackward<float>& args, const Parallel& parallel) {
  backward(args, parallel);
}
void nt_xent_backward(const NtXentBackward<double>& args, const Parallel& parallel) {
  backward(args, parallel);
}
void contrast_visit_backward(const ContrastVisitBackward<float>& args, const Parallel& parallel) {
  visit_backward(args, parallel);
}
void contrast_visit_backward(const ContrastVisitBackward<double>& args, const Parallel& parallel) {
  visit_backward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
