#include "edge_conv.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// In signed, centred values, with z = scale h + shift, g = grad * leaky'(z) at the winners and E edges, the
// gradient of h on edge (i, j) is scale * ([the edge wins] g - mean_term - slope_term * h): the last two only
// where the batch made the statistics. Summed by source and by target that needs the sums of h which the
// forward pass saved, no edge.
template <class T>
struct Plan {
  Plan(const EdgeConvBackwardArgs<T>& args)
      : blocks(args.batch, args.n, args.c_out),
        groups(std::min<int64_t>(args.batch, kGroups)),
        parts(std::min<int64_t>(blocks.count, (kGroups + groups - 1) / groups)),
        scale(args.c_out),
        slope_term(args.c_out),
        shift(args.batch * args.c_out),
        mean_term(args.batch * args.c_out) {}

  int64_t first_cloud(int64_t group, int64_t batch) const { return group * batch / groups; }
  int64_t first_block(int64_t part) const { return part * blocks.count / parts; }

  // Work is cut in groups of clouds (each sums its own weight gradient) times parts of the channels (each its
  // own grad_x).
  static constexpr int64_t kGroups = 16;
  ChannelBlocks<T> blocks;
  int64_t groups, parts;
  Buffer<T> scale, slope_term;  // (c_out)
  Buffer<T> shift, mean_term;   // (batch, c_out)
};

// Sums of g and of g h over the nodes of cloud b, for V vectors of channels from c.
template <int V, class T>
void sum_gradients(const EdgeConvBackwardArgs<T>& args, const Plan<T>& plan, int64_t b, int64_t c,
                   double* sum_g, double* sum_gh) {
  constexpr int64_t L = lanes<T>;
  const int64_t n = args.n, c_out = args.c_out;
  const T slope = T(args.negative_slope);
  Vec<T> scale[V], shift[V];
  int64_t rest[V];
  for (int v = 0; v < V; ++v) {
    rest[v] = c_out - c - v * L;
    scale[v] = load_part(plan.scale.data() + c + v * L, rest[v]);
    shift[v] = load_part(plan.shift.data() + b * c_out + c + v * L, rest[v]);
  }
  for (int64_t i0 = 0; i0 < n; i0 += kStatisticsRows) {
    Vec<T> part_g[V] = {}, part_gh[V] = {};
    for (int64_t i = i0; i < std::min(n, i0 + kStatisticsRows); ++i) {
      const int64_t node = b * n + i, at = node * c_out + c;
      prefetch_ahead(args.grad + at, V * L, c_out);
      prefetch_ahead(args.saved.winner + at, V * L, c_out);
      if (args.saved.out_degree[node] == 0) continue;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<T> winner = load_part(args.saved.winner + at + v * L, rest[v]);
        const Vec<T> grad = load_part(args.grad + at + v * L, rest[v]);
        const Vec<T> g = winner * scale[v] + shift[v] > T(0) ? grad : grad * slope;
        part_g[v] += g;
        part_gh[v] += g * winner;
      }
    }
    for (int v = 0; v < V; ++v)
      for (int64_t l = 0; l < std::min(L, rest[v]); ++l) {
        sum_g[c + v * L + l] += part_g[v][l];
        sum_gh[c + v * L + l] += part_gh[v][l];
      }
  }
}

// gamma's and beta's gradient, and from them the dense terms of h's.
template <class T>
void norm_gradients(const EdgeConvBackwardArgs<T>& args, Plan<T>& plan, const Parallel& parallel) {
  const int64_t batch = args.batch, n = args.n, c_out = args.c_out;
  const EdgeConvSaved<T>& saved = args.saved;
  Buffer<double> sum_g(batch * c_out), sum_gh(batch * c_out);
  for (int64_t i = 0; i < batch * c_out; ++i) sum_g[i] = sum_gh[i] = 0;
  parallel.ranges(batch * plan.blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / plan.blocks.count, which = item % plan.blocks.count;
      over_columns<T>(plan.blocks.channels(which), [&](auto vectors, int64_t c) {
        const int64_t first = plan.blocks.first(which) + c;
        sum_gradients<vectors.value>(args, plan, b, first, sum_g.data() + b * c_out,
                                     sum_gh.data() + b * c_out);
      });
    }
  });

  int64_t count = 0;
  for (int64_t i = 0; i < batch * n; ++i) count += saved.out_degree[i];
  const double edges = std::max<int64_t>(count, 1);
  for (int64_t c = 0; c < c_out; ++c) {
    double beta = 0, gamma = 0;
    for (int64_t b = 0; b < batch; ++b) {
      beta += sum_g[b * c_out + c];
      gamma += sum_gh[b * c_out + c] + saved.offset[b * c_out + c] * sum_g[b * c_out + c];
    }
    gamma *= saved.rstd[c];
    args.grad_gamma[c] = T(sign_of(args.gamma, c) * gamma);
    args.grad_beta[c] = T(beta);
    if (!args.training) continue;
    const double slope_term = gamma * saved.rstd[c] / edges;
    plan.slope_term[c] = T(slope_term);
    for (int64_t b = 0; b < batch; ++b)
      plan.mean_term[b * c_out + c] = T(beta / edges + slope_term * saved.offset[b * c_out + c]);
  }
}

// scale * A and scale * (B - A) of every channel block, signed, packed as right operands (channels x c_in).
template <class T>
struct PackedWeights {
  PackedWeights(const EdgeConvBackwardArgs<T>& args, const Plan<T>& plan, const Parallel& parallel)
      : block_size(plan.blocks.width * packed_columns<T>(args.c_in)),
        neighbour(plan.blocks.count * block_size),
        own(plan.blocks.count * block_size) {
    const int64_t c_in = args.c_in;
    parallel.ranges(plan.blocks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = plan.blocks.first(b), channels = plan.blocks.channels(b),
                      padded = plan.blocks.padded(b);
        const auto factor = [&](int64_t c) { return sign_of(args.gamma, first + c) * plan.scale[first + c]; };
        pack_columns(padded, c_in, neighbour.data() + b * block_size, [&](int64_t c, int64_t p) {
          return c < channels ? factor(c) * args.weight[(first + c) * 2 * c_in + p] : T(0);
        });
        pack_columns(padded, c_in, own.data() + b * block_size, [&](int64_t c, int64_t p) {
          if (c >= channels) return T(0);
          const T* row = args.weight + (first + c) * 2 * c_in;
          return factor(c) * (row[c_in + p] - row[p]);
        });
      }
    });
  }

  int64_t block_size;
  Buffer<T> neighbour, own;
};

// The gradients of A x_j and (B - A) x_i, over scale, for one channel block of one cloud: (n, width), zeros
// beyond the last channel. `sums` receives the sum of either over the nodes: they are equal, because each
// sums over all edges.
template <class T, class Slot>
void node_gradients(const EdgeConvBackwardArgs<T>& args, const Plan<T>& plan, int64_t b, int64_t which,
                    T* neighbour, T* own, double* sums) {
  constexpr int64_t L = lanes<T>;
  const int64_t n = args.n, k = args.k, c_out = args.c_out;
  const EdgeConvSaved<T>& saved = args.saved;
  const int64_t first = plan.blocks.first(which), channels = plan.blocks.channels(which);
  const int64_t width = plan.blocks.padded(which);
  const T slope = T(args.negative_slope);
  const T* scale = plan.scale.data() + first;
  const T* shift = plan.shift.data() + b * c_out + first;
  const T* slope_term = plan.slope_term.data() + first;
  const T* mean_term = plan.mean_term.data() + b * c_out + first;

  for (int64_t j = 0; j < n; ++j) {
    if (args.training) prefetch_ahead(saved.in_sum + (b * n + j) * c_out + first, channels, c_out);
    for (int64_t c = 0; c < width; c += L) {
      Vec<T> value{};
      if (args.training) {
        const int64_t rest = channels - c;
        value = -(load_part(slope_term + c, rest) *
                      load_part(saved.in_sum + (b * n + j) * c_out + first + c, rest) +
                  load_part(mean_term + c, rest) * T(saved.in_degree[b * n + j]));
      }
      store(neighbour + j * width + c, value);
    }
  }

  for (int64_t c = 0; c < width; ++c) sums[c] = 0;
  T g[64], part[64];
  for (int64_t i0 = 0; i0 < n; i0 += kStatisticsRows) {
    for (int64_t c = 0; c < width; ++c) part[c] = 0;
    for (int64_t i = i0; i < std::min(n, i0 + kStatisticsRows); ++i) {
      const int64_t node = b * n + i, at = node * c_out + first;
      T* own_row = own + i * width;
      const Slot* slot = static_cast<const Slot*>(saved.slot) + at;
      prefetch_ahead(args.grad + at, channels, c_out);
      prefetch_ahead(saved.winner + at, channels, c_out);
      if (args.training) prefetch_ahead(saved.out_sum + at, channels, c_out);
      prefetch_ahead(slot, channels, c_out);
      if (saved.out_degree[node] == 0) {
        for (int64_t c = 0; c < width; ++c) own_row[c] = 0;
        continue;
      }
      const T degree = T(saved.out_degree[node]);
      for (int64_t c = 0; c < width; c += L) {
        const int64_t rest = channels - c;
        const Vec<T> z =
            load_part(saved.winner + at + c, rest) * load_part(scale + c, rest) + load_part(shift + c, rest);
        const Vec<T> grad = load_part(args.grad + at + c, rest);
        const Vec<T> routed = z > T(0) ? grad : grad * slope;
        Vec<T> value = routed;
        if (args.training)
          value -= load_part(slope_term + c, rest) * load_part(saved.out_sum + at + c, rest) +
                   load_part(mean_term + c, rest) * degree;
        store(g + c, routed);
        store(own_row + c, value);
        store(part + c, load(part + c) + value);
      }
      const int64_t* neighbours = args.idx + node * k;
      for (int64_t c = 0; c < channels; ++c) neighbour[neighbours[slot[c]] * width + c] += g[c];
    }
    for (int64_t c = 0; c < width; ++c) sums[c] += part[c];
  }
}

template <class T>
struct Scratch {
  Buffer<T> x, neighbour, own;
};

template <class T>
void backward(const EdgeConvBackwardArgs<T>& args, const Parallel& parallel) {
  const int64_t batch = args.batch, n = args.n, c_in = args.c_in, c_out = args.c_out;
  const EdgeConvSaved<T>& saved = args.saved;
  Plan<T> plan(args);
  for (int64_t c = 0; c < c_out; ++c) plan.scale[c] = T(scale_of(args.gamma, saved.rstd, c));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < c_out; ++c)
      plan.shift[b * c_out + c] = T(shift_of(args.gamma, args.beta, saved.rstd, saved.offset + b * c_out, c));
  if (args.gamma != nullptr) norm_gradients(args, plan, parallel);
  if (args.grad_x == nullptr && args.grad_weight == nullptr) return;

  const PackedWeights<T> weights(args, plan, parallel);
  const int64_t ldc = plan.blocks.count * plan.blocks.width;
  Buffer<T> partial_weight, partial_x;
  Buffer<double> sums(batch * ldc);
  if (args.grad_weight != nullptr) partial_weight.resize(plan.groups * 2 * c_in * ldc);
  if (args.grad_x != nullptr) partial_x.resize((plan.parts - 1) * batch * n * c_in);

  const auto make_scratch = [&] {
    Scratch<T> scratch;
    if (args.grad_weight != nullptr) scratch.x.resize(n * c_in);
    scratch.neighbour.resize(n * plan.blocks.width);
    scratch.own.resize(n * plan.blocks.width);
    return scratch;
  };
  parallel.items(plan.groups * plan.parts, make_scratch, [&](int64_t item, Scratch<T>& scratch) {
    const int64_t group = item / plan.parts, part = item % plan.parts;
    const int64_t first_block = plan.first_block(part), last_block = plan.first_block(part + 1);
    T* grad_x = part == 0 ? args.grad_x : partial_x.data() + (part - 1) * batch * n * c_in;
    T* grad_weight = partial_weight.data() + group * 2 * c_in * ldc;
    if (args.grad_weight != nullptr)
      for (int64_t row = 0; row < 2 * c_in; ++row)
        for (int64_t c = first_block * plan.blocks.width; c < last_block * plan.blocks.width; ++c)
          grad_weight[row * ldc + c] = 0;
    for (int64_t b = plan.first_cloud(group, batch); b < plan.first_cloud(group + 1, batch); ++b) {
      const T* x = scratch.x.data();
      if (args.grad_weight != nullptr)
        centre_cloud(n, c_in, args.x + b * n * c_in, saved.centre + b * c_in, saved.out_degree + b * n,
                     saved.in_degree + b * n, scratch.x.data());
      for (int64_t which = first_block; which < last_block; ++which) {
        const int64_t first = plan.blocks.first(which), width = plan.blocks.padded(which);
        const T* nodes[] = {scratch.neighbour.data(), scratch.own.data()};
        const auto compute = saved.slot_bytes == 1 ? node_gradients<T, uint8_t> : node_gradients<T, int32_t>;
        compute(args, plan, b, which, scratch.neighbour.data(), scratch.own.data(),
                sums.data() + b * ldc + first);
        if (args.grad_x != nullptr) {
          const int64_t offset = which * weights.block_size;
          const T* weight[] = {weights.neighbour.data() + offset, weights.own.data() + offset};
          multiply_packed(n, c_in, nodes, width, weight, width, 2, grad_x + b * n * c_in, c_in,
                          which > first_block);
        }
        if (args.grad_weight != nullptr)
          for (int64_t side = 0; side < 2; ++side)
            multiply_transposed(n, x, c_in, c_in, nodes[side], width, width,
                                grad_weight + side * c_in * ldc + first, ldc);
      }
    }
  });

  if (args.grad_x != nullptr && plan.parts > 1)
    parallel.ranges(batch * n * c_in, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < plan.parts; ++part) {
        const T* more = partial_x.data() + (part - 1) * batch * n * c_in;
        for (int64_t i = begin; i < end; ++i) args.grad_x[i] += more[i];
      }
    });
  if (args.grad_weight == nullptr) return;
  Buffer<double> factor(c_out);
  for (int64_t c = 0; c < c_out; ++c) factor[c] = double(sign_of(args.gamma, c)) * plan.scale[c];
  finish_weight(batch, c_in, c_out, ldc, plan.groups, partial_weight.data(), sums.data(), saved.centre,
                args.training, factor.data(), args.grad_weight, parallel);
}

}  // namespace

void edge_conv_backward(const EdgeConvBackwardArgs<float>& args, const Parallel& parallel) {
  backward(args, parallel);
}
void edge_conv_backward(const EdgeConvBackwardArgs<double>& args, const Parallel& parallel) {
  backward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
