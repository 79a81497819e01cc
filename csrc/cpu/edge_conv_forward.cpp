#include "edge_conv.h"
#include "graph.h"
#include "winners.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// One channel block of one cloud.
template <class T>
struct Block {
  const EdgeConvForwardArgs<T>& args;
  int64_t cloud, first, channels, width;  // width: stride of neighbour and own
  const int64_t* idx = nullptr;
  const int32_t* out_degree = nullptr;
  const int32_t* in_degree = nullptr;
  const T* neighbour = nullptr;  // A x_j of every node
  const T* own = nullptr;        // (B - A) x_i
  const T* dead = nullptr;       // per channel, 1 where gamma = 0
  const T* scale = nullptr;      // per channel; null as long as the statistics are not known
  const T* shift = nullptr;
  T* pending = nullptr;    // (n, c_out) of this cloud: where h of the winners goes, or null
  double* sums = nullptr;  // per channel: sum of h and of h^2 over the edges; null unless training
  double* squares = nullptr;
  const int32_t* slots = nullptr;       // 0, 1, ..., k - 1
  int64_t* valid_neighbours = nullptr;  // room for one node's list
  int32_t* valid_slots = nullptr;

  int64_t position(int64_t i, int64_t c) const { return i * args.c_out + first + c; }
};

// Maximum, slot and sum over the edges of every node, for V vectors of channels from column c of the block.
// Not inlined: its accumulators need the registers.
template <int V, bool Exact, class T>
__attribute__((noinline)) void gather(const Block<T>& block, int64_t c) {
  constexpr int64_t L = lanes<T>;
  const EdgeConvForwardArgs<T>& args = block.args;
  const EdgeConvSaved<T>& saved = args.saved;
  const int64_t n = args.n, k = args.k, valid = block.channels - c;
  const int64_t base = block.cloud * n;
  const T slope = T(args.negative_slope);
  Vec<T> dead[V], scale[V] = {}, shift[V] = {};
  for (int v = 0; v < V; ++v) {
    dead[v] = load(block.dead + c + v * L);
    if (block.scale == nullptr) continue;
    scale[v] = load(block.scale + c + v * L);
    shift[v] = load(block.shift + c + v * L);
  }
  for (int64_t i0 = 0; i0 < n; i0 += kStatisticsRows) {
    Vec<T> total[V] = {}, square[V] = {};
    for (int64_t i = i0; i < std::min(n, i0 + kStatisticsRows); ++i) {
      const int64_t degree = block.out_degree[i];
      const int64_t* neighbours = block.idx + i * k;
      const int32_t* slots = block.slots;
      if (degree < k) {
        int64_t found = 0;
        for (int64_t s = 0; s < k; ++s) {
          if (neighbours[s] < 0) continue;
          block.valid_neighbours[found] = neighbours[s];
          block.valid_slots[found++] = static_cast<int32_t>(s);
        }
        neighbours = block.valid_neighbours;
        slots = block.valid_slots;
      }
      Vec<T> most[V] = {}, sum[V] = {};
      Mask<T> slot[V] = {};
      if (degree > 0) {
        const T* row = block.neighbour + neighbours[0] * block.width + c;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          most[v] = sum[v] = load(row + v * L);
          slot[v] = Mask<T>{} + slots[0];
        }
      }
      for (int64_t p = 1; p < degree; ++p) {
        const T* row = block.neighbour + neighbours[p] * block.width + c;
        const Mask<T> here = Mask<T>{} + slots[p];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vec<T> value = load(row + v * L);
          const Mask<T> wins = beats<Exact, T>(value, most[v], dead[v]);
          most[v] = wins ? value : most[v];
          slot[v] = wins ? here : slot[v];
          sum[v] += value;
        }
      }
      const int64_t node = block.position(base + i, c);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t offset = i * block.width + c + v * L, rest = valid - v * L;
        const Vec<T> own = load(block.own + offset), winner = most[v] + own;
        if (block.pending != nullptr) store_part(block.pending + block.position(i, c + v * L), winner, rest);
        if (saved.slot != nullptr) store_slots<T>(saved.slot, saved.slot_bytes, node + v * L, slot[v], rest);
        if (block.sums != nullptr) {
          const Vec<T> self = load(block.neighbour + offset), all = sum[v] + T(degree) * own;
          total[v] += all;
          square[v] += own * (sum[v] + all) + T(block.in_degree[i]) * self * self;
          if (saved.out_sum != nullptr) store_part(saved.out_sum + node + v * L, all, rest);
        }
        if (block.scale != nullptr) {
          const Vec<T> z = winner * scale[v] + shift[v];
          store_part(args.out + node + v * L, degree > 0 ? leaky(z, slope) : Vec<T>{}, rest);
        }
      }
    }
    if (block.sums != nullptr)
      for (int v = 0; v < V; ++v)
        for (int l = 0; l < L; ++l) {
          block.sums[c + v * L + l] += total[v][l];
          block.squares[c + v * L + l] += square[v][l];
        }
  }
}

// Sum of h over the edges that lead to every node.
template <int V, class T>
__attribute__((noinline)) void gather_reverse(const Block<T>& block, const ReverseGraph& reverse, int64_t c) {
  constexpr int64_t L = lanes<T>;
  const int64_t* start = reverse.start.data() + block.cloud * (block.args.n + 1);
  const int32_t* from = reverse.from.data() + block.cloud * block.args.n * block.args.k;
  for (int64_t j = 0; j < block.args.n; ++j) {
    Vec<T> sum[V];
    for (int v = 0; v < V; ++v)
      sum[v] = T(block.in_degree[j]) * load(block.neighbour + j * block.width + c + v * L);
    for (int64_t e = start[j]; e < start[j + 1]; ++e) {
      const T* row = block.own + from[e] * block.width + c;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[v] += load(row + v * L);
    }
    T* target = block.args.saved.in_sum + block.position(block.cloud * block.args.n + j, c);
    for (int v = 0; v < V; ++v) store_part(target + v * L, sum[v], block.channels - c - v * L);
  }
}

// A and B - A of every channel block, signed, as packed right operands.
template <class T>
struct PackedWeights {
  PackedWeights(const EdgeConvForwardArgs<T>& args, const ChannelBlocks<T>& blocks, const Parallel& parallel)
      : block_size(args.c_in * blocks.width),
        neighbour(blocks.count * block_size),
        own(blocks.count * block_size) {
    const int64_t c_in = args.c_in;
    parallel.ranges(blocks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const T* rows = args.weight + blocks.first(b) * 2 * c_in;
        const T* gamma = args.gamma == nullptr ? nullptr : args.gamma + blocks.first(b);
        const int64_t channels = blocks.channels(b);
        pack_columns(c_in, channels, neighbour.data() + b * block_size,
                     [&](int64_t p, int64_t c) { return sign_of(gamma, c) * rows[c * 2 * c_in + p]; });
        pack_columns(c_in, channels, own.data() + b * block_size, [&](int64_t p, int64_t c) {
          const T* row = rows + c * 2 * c_in;
          return sign_of(gamma, c) * (row[c_in + p] - row[p]);
        });
      }
    });
  }

  int64_t block_size;
  Buffer<T> neighbour, own;
};

// What all blocks share.
template <class T>
struct Pass {
  Pass(const EdgeConvForwardArgs<T>& args, const Parallel& parallel)
      : args(args),
        blocks(args.batch, args.n, args.c_out),
        weights(args, blocks, parallel),
        pending(args.saved.winner != nullptr ? args.saved.winner
                : args.training              ? args.out
                                             : nullptr),
        edges(args.batch),
        sums(args.batch * args.c_out),
        squares(args.batch * args.c_out),
        dead(blocks.count * blocks.width),
        slots(args.k) {
    for (int64_t c = 0; c < blocks.count * blocks.width; ++c)
      dead[c] = c < args.c_out && args.gamma != nullptr && args.gamma[c] == T(0) ? T(1) : T(0);
    for (int64_t s = 0; s < args.k; ++s) slots[s] = static_cast<int32_t>(s);
    if (args.saved.in_sum == nullptr) return;
    reverse.start.resize(args.batch * (args.n + 1));
    reverse.from.resize(args.batch * args.n * args.k);
  }

  const EdgeConvForwardArgs<T>& args;
  ChannelBlocks<T> blocks;
  PackedWeights<T> weights;
  T* pending;
  Buffer<int64_t> edges;         // of each cloud
  Buffer<double> sums, squares;  // (batch, c_out), of centred h over each cloud's edges
  Buffer<T> dead;
  Buffer<int32_t> slots;
  ReverseGraph reverse;
};

template <class T>
void prepare_cloud(Pass<T>& pass, int64_t b) {
  const EdgeConvForwardArgs<T>& args = pass.args;
  const int64_t n = args.n, k = args.k, c_in = args.c_in;
  const int64_t* idx = args.idx + b * n * k;
  int32_t* out_degree = args.saved.out_degree + b * n;
  int32_t* in_degree = args.saved.in_degree + b * n;
  pass.edges[b] = count_degrees(n, k, idx, out_degree, in_degree);
  choose_centre(n, c_in, args.x + b * n * c_in, out_degree, args.saved.centre + b * c_in);
  if (args.saved.in_sum == nullptr) return;
  reverse_cloud(n, n, k, idx, in_degree, pass.reverse.start.data() + b * (n + 1),
                pass.reverse.from.data() + b * n * k);
}

template <class T>
struct Scratch {
  Buffer<T> x, neighbour, own, scale, shift;
  Buffer<double> sums, squares;
  Buffer<int64_t> valid_neighbours;
  Buffer<int32_t> valid_slots;
  int64_t cloud = -1;  // whose nodes x holds
};

template <class T>
void run_block(Pass<T>& pass, int64_t b, int64_t which, Scratch<T>& scratch) {
  const EdgeConvForwardArgs<T>& args = pass.args;
  const EdgeConvSaved<T>& saved = args.saved;
  const int64_t n = args.n, k = args.k, c_in = args.c_in, c_out = args.c_out;
  const int64_t first = pass.blocks.first(which), channels = pass.blocks.channels(which);
  const int64_t width = pass.blocks.padded(which);
  const int32_t* out_degree = saved.out_degree + b * n;
  const int32_t* in_degree = saved.in_degree + b * n;
  if (scratch.cloud != b) {
    centre_cloud(n, c_in, args.x + b * n * c_in, saved.centre + b * c_in, out_degree, in_degree,
                 scratch.x.data());
    scratch.cloud = b;
  }
  const T* x = scratch.x.data();
  const T* neighbour_weight = pass.weights.neighbour.data() + which * pass.weights.block_size;
  const T* own_weight = pass.weights.own.data() + which * pass.weights.block_size;
  multiply_packed(n, width, &x, c_in, &neighbour_weight, c_in, 1, scratch.neighbour.data(), width, false);
  multiply_packed(n, width, &x, c_in, &own_weight, c_in, 1, scratch.own.data(), width, false);

  double* offset = saved.offset + b * c_out;
  for (int64_t c = first; c < first + channels; ++c) {
    const double h = centre_h(c_in, args.weight + c * 2 * c_in, saved.centre + b * c_in);
    const bool known = !args.training && args.gamma != nullptr;
    offset[c] = sign_of(args.gamma, c) * (known ? h - args.running_mean[c] : h);
  }
  for (int64_t c = 0; c < width; ++c) {
    scratch.sums[c] = scratch.squares[c] = 0;
    const bool known = !args.training && c < channels;
    scratch.scale[c] = known ? T(scale_of(args.gamma, saved.rstd, first + c)) : T(0);
    scratch.shift[c] = known ? T(shift_of(args.gamma, args.beta, saved.rstd, offset, first + c)) : T(0);
  }

  Block<T> block{args, b, first, channels, width};
  block.idx = args.idx + b * n * k;
  block.out_degree = out_degree;
  block.in_degree = in_degree;
  block.neighbour = scratch.neighbour.data();
  block.own = scratch.own.data();
  block.dead = pass.dead.data() + first;
  if (pass.pending != nullptr) block.pending = pass.pending + b * n * c_out;
  if (args.training) {
    block.sums = scratch.sums.data();
    block.squares = scratch.squares.data();
  } else {
    block.scale = scratch.scale.data();
    block.shift = scratch.shift.data();
  }
  block.slots = pass.slots.data();
  block.valid_neighbours = scratch.valid_neighbours.data();
  block.valid_slots = scratch.valid_slots.data();

  bool exact = !all_finite(block.neighbour, n * width);
  for (int64_t c = 0; c < channels; ++c) exact |= block.dead[c] != T(0);
  over_columns<T>(width, [&](auto vectors, int64_t c) {
    if (exact)
      gather<vectors.value, true>(block, c);
    else
      gather<vectors.value, false>(block, c);
    if (saved.in_sum != nullptr) gather_reverse<vectors.value>(block, pass.reverse, c);
  });
  for (int64_t c = 0; c < channels && args.training; ++c) {
    pass.sums[b * c_out + first + c] = scratch.sums[c];
    pass.squares[b * c_out + first + c] = scratch.squares[c];
  }
}

template <class T>
void forward(const EdgeConvForwardArgs<T>& args, const Parallel& parallel) {
  Pass<T> pass(args, parallel);
  parallel.ranges(args.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) prepare_cloud(pass, b);
  });
  if (!args.training)
    for (int64_t c = 0; c < args.c_out; ++c)
      args.saved.rstd[c] =
          args.gamma == nullptr ? 1.0 : 1 / std::sqrt(double(args.running_var[c]) + args.eps);

  const auto make_scratch = [&] {
    Scratch<T> scratch;
    scratch.x.resize(args.n * args.c_in);
    for (Buffer<T>* nodes : {&scratch.neighbour, &scratch.own}) nodes->resize(args.n * pass.blocks.width);
    for (Buffer<T>* channels : {&scratch.scale, &scratch.shift}) channels->resize(pass.blocks.width);
    for (Buffer<double>* channels : {&scratch.sums, &scratch.squares}) channels->resize(pass.blocks.width);
    scratch.valid_neighbours.resize(args.k);
    scratch.valid_slots.resize(args.k);
    return scratch;
  };
  parallel.items(args.batch * pass.blocks.count, make_scratch, [&](int64_t item, Scratch<T>& scratch) {
    run_block(pass, item / pass.blocks.count, item % pass.blocks.count, scratch);
  });

  if (!args.training) return;
  finish_statistics(args.batch, args.c_out, pass.edges.data(), pass.sums.data(), pass.squares.data(), args.gamma,
                    args.eps, args.saved.offset, args.saved.rstd, args.momentum, args.running_mean,
                    args.running_var);
  Buffer<T> scale(args.c_out), shift(args.batch * args.c_out);
  for (int64_t c = 0; c < args.c_out; ++c) scale[c] = T(scale_of(args.gamma, args.saved.rstd, c));
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t c = 0; c < args.c_out; ++c)
      shift[b * args.c_out + c] =
          T(shift_of(args.gamma, args.beta, args.saved.rstd, args.saved.offset + b * args.c_out, c));
  activate(args.batch, args.n, args.c_out, pass.pending, scale.data(), shift.data(),
           args.saved.out_degree, T(args.negative_slope), args.out, parallel);
}

}  // namespace

void edge_conv_forward(const EdgeConvForwardArgs<float>& args, const Parallel& parallel) {
  forward(args, parallel);
}
void edge_conv_forward(const EdgeConvForwardArgs<double>& args, const Parallel& parallel) {
  forward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
