// NT-Xent, backward: each tile of similarities is formed again, turned into weights, and multiplied with
// the rows of both its sides.
#include "common/contrast.h"
#include "nt_xent_tiles.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// Per row: what turns a power of two into a softmax weight, and the weight that the positive lacks.
template <class T>
struct RowWeights {
  Buffer<T> softmax;  // with a shared bound: the factor of 2^(x - bound); otherwise what is added to x
  Buffer<double> positive;
};

template <class T>
RowWeights<T> row_weights(const NtXentBackward<T>& args, const Views<T>& views, const Exponents<T>& exponents,
                          const Parallel& parallel) {
  RowWeights<T> weights{Buffer<T>(views.nodes() * tile), Buffer<double>(views.nodes() * tile)};
  parallel.ranges(views.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t other = views.blocks() + block;
      for (int64_t i = 0; i < views.count(block); ++i) {
        const double positive = views.positive(block, i) / args.temperature;
        for (int view = 0; view < 2; ++view) {
          const int64_t row = (view == 0 ? block : other) * tile + i;
          const double loss = args.row_losses[view * args.samples + views.first(block) + i];
          const double lse = (positive + loss) * log2_e;  // of the positive and the negatives
          const bool counts = view == 0 || args.symmetric;
          weights.positive[row] = counts ? missing_probability(loss) : 0;
          if (exponents.shared)
            weights.softmax[row] = counts ? T(std::exp2(exponents.bound - lse)) : T(0);
          else
            weights.softmax[row] = counts ? T(-lse) : -std::numeric_limits<T>::infinity();
        }
      }
      for (int64_t node : {block, other})
        fill(weights.softmax.data() + node * tile + views.count(node), tile - views.count(node), T(0));
    }
  });
  return weights;
}

// x, a tile of similarities, becomes the sum of both softmaxes: row i's at column j, and row j's at column i.
template <class T, bool shared>
void form_weights(T* x, int64_t rows, int64_t columns, const T* row, const T* column, T bound) {
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
  if (args.samples == 0) return;
  const Views<T> views(args, parallel);
  const Exponents<T> exponents(args.temperature);
  const RowWeights<T> weights = row_weights(args, views, exponents, parallel);
  const int64_t channels = args.channels;
  const auto gradient = [&](int64_t node) {
    return (node < views.blocks() ? args.dz1 : args.dz2) + views.first(node) * channels;
  };

  const auto compute = [&](int64_t a, int64_t b, ScratchTile<T>& scratch) {
    const int64_t rows = views.count(a), columns = views.count(b);
    const T *row = weights.softmax.data() + a * tile, *column = weights.softmax.data() + b * tile;
    T* x = scratch.data;
    views.similarities(a, b, T(exponents.scale), x);
    if (exponents.shared)
      form_weights<T, true>(x, rows, columns, row, column, exponents.bound);
    else
      form_weights<T, false>(x, rows, columns, row, column, T(0));
    if (views.first(a) == views.first(b))  // a row itself, or its positive, which is added at the end
      for (int64_t i = 0; i < rows; ++i) x[i * tile + i] = T(0);
  };
  Buffer<bool> begun(views.nodes());
  fill(begun.data(), views.nodes(), false);
  const auto merge = [&](int64_t a, int64_t b, const ScratchTile<T>& scratch) {
    const int64_t rows = views.count(a), columns = views.count(b), stride = views.stride();
    const T* w = scratch.data;
    multiply_weights<tile>(w, 1, rows, columns, views.rows(b), stride, gradient(a), channels, begun[a]);
    begun[a] = true;
    if (a == b) return;
    multiply_weights<1>(w, tile, columns, rows, views.rows(a), stride, gradient(b), channels, begun[b]);
    begun[b] = true;
  };
  Rounds(views.blocks(), args.within_views).run(parallel, [] { return ScratchTile<T>(); }, compute, merge);

  // The positives, then from the gradient of the normalised rows to that of the rows.
  const double rows_averaged = double(args.symmetric ? 2 * args.samples : args.samples);
  const double scale = args.grad / (rows_averaged * args.temperature);
  Buffer<double> along(views.nodes());
  parallel.ranges(views.nodes(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t node = begin; node < end; ++node) {
      const int64_t other = (node + views.blocks()) % views.nodes();
      double total = 0;
      for (int64_t i = 0; i < views.count(node); ++i) {
        const T* z = views.rows(node) + i * views.stride();
        const T* positive = views.rows(other) + i * views.stride();
        T* dz = gradient(node) + i * channels;
        const double pull = weights.positive[node * tile + i] + weights.positive[other * tile + i];
        const double radial = dot(z, dz, channels) - pull * dot(z, positive, channels);
        const double norm = views.norms(node)[i];
        const bool clamped = norm < shortest;  // a constant divisor: the gradient is not projected
        const double projection = clamped ? 0 : radial, factor = scale / (clamped ? shortest : norm);
        for (int64_t c = 0; c < channels; ++c)
          dz[c] = T((dz[c] - pull * positive[c] - projection * z[c]) * factor);
        total += radial;
      }
      along[node] = total;
    }
  });
  double total = 0;
  for (int64_t node = 0; node < views.nodes(); ++node) total += along[node];
  *args.dtemperature = T(-total * scale / (2 * args.temperature));
}

}  // namespace

void nt_xent_backward(const NtXentBackward<float>& args, const Parallel& parallel) {
  backward(args, parallel);
}
void nt_xent_backward(const NtXentBackward<double>& args, const Parallel& parallel) {
  backward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
