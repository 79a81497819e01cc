#include <cmath>

#include "edge_conv.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

template <class T>
using Mask = decltype(Vec<T>{} > Vec<T>{});

// The graph of every cloud turned around: the nodes whose edges lead to node j are from[start[j]] ... from[start[j + 1] - 1], ascending.
struct ReverseGraph {
  Buffer<int64_t> start;  // (batch, n + 1)
  Buffer<int32_t> from;   // (batch, n k)
};

void reverse_cloud(int64_t n, int64_t k, const int64_t* idx, const int32_t* in_degree, int64_t* start, int32_t* from) {
  start[0] = 0;
  for (int64_t j = 0; j < n; ++j) start[j + 1] = start[j] + in_degree[j];
  // start[j] walks through j's range while that is filled, and so ends where the next one begins.
  for (int64_t i = 0; i < n; ++i)
    for (int64_t s = 0; s < k; ++s)
      if (const int64_t j = idx[i * k + s]; j >= 0) from[start[j]++] = static_cast<int32_t>(i);
  for (int64_t j = n; j > 0; --j) start[j] = start[j - 1];
  start[0] = 0;
}

// Degrees of one cloud; returns its number of edges.
int64_t count_degrees(int64_t n, int64_t k, const int64_t* idx, int32_t* out_degree, int32_t* in_degree) {
  for (int64_t j = 0; j < n; ++j) in_degree[j] = 0;
  int64_t edges = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t degree = 0;
    for (int64_t s = 0; s < k; ++s)
      if (const int64_t j = idx[i * k + s]; j >= 0) {
        ++in_degree[j];
        ++degree;
      }
    out_degree[i] = degree;
    edges += degree;
  }
  return edges;
}

// About the mean of the nodes that have edges. Any constant would be right: this one keeps rounding small far from the origin, and
// its few bits keep x - centre exact for points on a lattice, so that their ties stay ties.
template <class T>
void choose_centre(int64_t n, int64_t c_in, const T* x, const int32_t* out_degree, T* centre) {
  Buffer<double> sum(c_in), square(c_in);
  for (int64_t c = 0; c < c_in; ++c) sum[c] = square[c] = 0;
  int64_t nodes = 0;
  for (int64_t i = 0; i < n; ++i, x += c_in) {
    if (out_degree[i] == 0) continue;
    ++nodes;
    for (int64_t c = 0; c < c_in; ++c) {
      const double value = x[c];
      sum[c] += value;
      square[c] += value * value;
    }
  }
  for (int64_t c = 0; c < c_in; ++c) {
    const double count = std::max<int64_t>(nodes, 1), mean = sum[c] / count, spread = std::sqrt(square[c] / count - mean * mean);
    double rounded = mean;
    if (spread > 0 && std::isfinite(spread)) {
      int exponent;
      std::frexp(spread, &exponent);
      const double grid = std::ldexp(1.0, exponent - 2);  // between a quarter and half of the spread
      rounded = std::nearbyint(mean / grid) * grid;
    }
    centre[c] = std::isfinite(rounded) ? T(rounded) : T(0);
  }
}

// One channel block of one cloud.
template <class T>
struct Block {
  const EdgeConvForwardArgs<T>& args;
  int64_t cloud, first, channels, width;  // width: stride of neighbour and own
  const int64_t* idx;
  const int32_t* out_degree;
  const int32_t* in_degree;
  const T* neighbour;   // A x_j of every node
  const T* own;         // (B - A) x_i
  const T* dead;        // per channel, 1 where gamma = 0
  const T* scale;       // per channel; null if the statistics are not known yet
  const T* shift;
  T* pending;           // (n, c_out) of this cloud: where h of the winners goes, or null
  double* sums;         // per channel of the block: sum of h, of h^2; null unless training
  double* squares;
  const int32_t* slots;  // 0, 1, ..., k - 1
  int64_t* valid_neighbours;  // room for one node's list
  int32_t* valid_slots;

  int64_t position(int64_t i, int64_t c) const { return i * args.c_out + first + c; }
};

template <class T>
Mask<T> is_nan(Vec<T> v) {
  return v != v;
}

template <class T>
Mask<T> is_finite(Vec<T> v) {
  return v - v == Vec<T>{};
}

// Where v beats the m that came before it. Exact: a NaN wins and stays, and where gamma = 0 all values tie unless 0 * v is NaN.
template <bool Exact, class T>
inline Mask<T> beats(Vec<T> v, Vec<T> m, [[maybe_unused]] Vec<T> dead) {
  if constexpr (!Exact) return v > m;
  const Mask<T> alive = dead == Vec<T>{};
  return (alive & ((v > m) | (is_nan<T>(v) & ~is_nan<T>(m)))) | (~alive & (~is_finite<T>(v) & is_finite<T>(m)));
}

template <class T>
inline void store_slots(void* slots, int slot_bytes, int64_t position, Mask<T> slot, int64_t valid) {
  using Lane = std::remove_reference_t<decltype(slot[0])>;
  if (slot_bytes == 1) {
    typedef uint8_t Bytes __attribute__((vector_size(lanes<T>)));
    const Bytes bytes = __builtin_convertvector(slot, Bytes);
    std::memcpy(static_cast<uint8_t*>(slots) + position, &bytes, std::min<int64_t>(valid, lanes<T>));
  } else {
    Lane line[lanes<T>];
    std::memcpy(line, &slot, sizeof slot);
    int32_t* target = static_cast<int32_t*>(slots) + position;
    for (int64_t l = 0; l < std::min<int64_t>(valid, lanes<T>); ++l) target[l] = static_cast<int32_t>(line[l]);
  }
}

// Maximum, slot and sum over the edges of every node, for V vectors of channels from column c of the block.
template <int V, bool Exact, class T>
void gather(const Block<T>& block, int64_t c) {
  constexpr int64_t L = lanes<T>;
  const EdgeConvForwardArgs<T>& args = block.args;
  const EdgeConvSaved<T>& saved = args.saved;
  const int64_t n = args.n, k = args.k, valid = block.channels - c;
  const int64_t base = block.cloud * n;
  const T slope = T(args.negative_slope);
  Vec<T> dead[V], scale[V] = {}, shift[V] = {};
  for (int v = 0; v < V; ++v) {
    dead[v] = load(block.dead + c + v * L);
    if (block.scale != nullptr) scale[v] = load(block.scale + c + v * L), shift[v] = load(block.shift + c + v * L);
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
          store_part(args.out + node + v * L, degree > 0 ? (z > T(0) ? z : z * slope) : Vec<T>{}, rest);
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
void gather_reverse(const Block<T>& block, const int64_t* start, const int32_t* from, int64_t c) {
  constexpr int64_t L = lanes<T>;
  for (int64_t j = 0; j < block.args.n; ++j) {
    Vec<T> sum[V];
    for (int v = 0; v < V; ++v) sum[v] = T(block.in_degree[j]) * load(block.neighbour + j * block.width + c + v * L);
    for (int64_t e = start[j]; e < start[j + 1]; ++e) {
      const T* row = block.own + from[e] * block.width + c;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[v] += load(row + v * L);
    }
    T* target = block.args.saved.in_sum + block.position(block.cloud * block.args.n + j, c);
    for (int v = 0; v < V; ++v) store_part(target + v * L, sum[v], block.channels - c - v * L);
  }
}

// Calls f(number of vectors as a constant, first column) over the block's columns.
template <class T, class F>
void over_columns(int64_t columns, F&& f) {
  constexpr int64_t L = lanes<T>;
  constexpr int most = vector_bytes == 64 ? 4 : 2;
  int64_t c = 0;
  for (; c + most * L <= columns; c += most * L) f(std::integral_constant<int, most>{}, c);
  if constexpr (most > 2)
    for (; c + 2 * L <= columns; c += 2 * L) f(std::integral_constant<int, 2>{}, c);
  for (; c < columns; c += L) f(std::integral_constant<int, 1>{}, c);
}

template <class T>
bool all_finite(const T* p, int64_t size) {
  Vec<T> zero{};
  int64_t i = 0;
  for (; i + lanes<T> <= size; i += lanes<T>) {
    const Vec<T> v = load(p + i);
    zero += v - v;
  }
  T sum = sum_lanes<T>(zero);
  for (; i < size; ++i) sum += p[i] - p[i];
  return sum == T(0);
}

// A and B - A of every channel block, signed, as packed right operands.
template <class T>
struct PackedWeights {
  PackedWeights(const EdgeConvForwardArgs<T>& args, const ChannelBlocks<T>& blocks, const Parallel& parallel)
      : block_size(args.c_in * blocks.width), neighbour(blocks.count * block_size), own(blocks.count * block_size) {
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

template <class T>
struct Scratch {
  Buffer<T> x, neighbour, own, scale, shift;
  Buffer<int64_t> valid_neighbours;
  Buffer<int32_t> valid_slots;
  int64_t cloud = -1;  // whose nodes x holds
};

// Per-cloud sums over edges become batch statistics: within-cloud and between-cloud scatter are added, so that clouds far
// from each other or from the origin cancel nothing. Replaces `offset` = mean of the centre's own h by that - mean.
template <class T>
void finish_statistics(const EdgeConvForwardArgs<T>& args, const int64_t* edges, const double* sums, const double* squares) {
  const int64_t batch = args.batch, c_out = args.c_out;
  int64_t count = 0;
  for (int64_t b = 0; b < batch; ++b) count += edges[b];
  Buffer<double> mean(c_out), var(c_out);
  for (int64_t c = 0; c < c_out; ++c) mean[c] = var[c] = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < c_out; ++c) mean[c] += sums[b * c_out + c] + edges[b] * args.saved.offset[b * c_out + c];
  for (int64_t c = 0; c < c_out; ++c) mean[c] /= std::max<int64_t>(count, 1);
  for (int64_t b = 0; b < batch; ++b) {
    const double cloud_edges = std::max<int64_t>(edges[b], 1);
    for (int64_t c = 0; c < c_out; ++c) {
      double& offset = args.saved.offset[b * c_out + c];
      offset -= mean[c];
      if (edges[b] == 0) continue;
      const double own = sums[b * c_out + c] / cloud_edges, scatter = squares[b * c_out + c] - own * sums[b * c_out + c];
      const double between = own + offset;
      var[c] += (scatter < 0 ? 0 : scatter) + cloud_edges * between * between;
    }
  }
  for (int64_t c = 0; c < c_out; ++c) {
    var[c] /= std::max<int64_t>(count, 1);
    args.saved.rstd[c] = 1 / std::sqrt(var[c] + args.eps);
    if (args.running_mean == nullptr || count == 0) continue;
    const double unbiased = var[c] * (count / double(std::max<int64_t>(count - 1, 1)));
    const double signed_mean = sign_of(args.gamma, c) * mean[c];
    args.running_mean[c] += T(args.momentum * (signed_mean - args.running_mean[c]));
    args.running_var[c] += T(args.momentum * (unbiased - args.running_var[c]));
  }
}

// out = leaky(scale * pending + shift), and 0 for nodes without an edge.
template <class T>
void activate(const EdgeConvForwardArgs<T>& args, const T* pending, const Parallel& parallel) {
  const int64_t n = args.n, c_out = args.c_out;
  Buffer<T> scale(c_out), shift(args.batch * c_out);
  for (int64_t c = 0; c < c_out; ++c) scale[c] = T(scale_of(args.gamma, args.saved.rstd, c));
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t c = 0; c < c_out; ++c)
      shift[b * c_out + c] = T(shift_of(args.gamma, args.beta, args.saved.rstd, args.saved.offset + b * c_out, c));
  const T slope = T(args.negative_slope);
  parallel.ranges(args.batch * n, std::max<int64_t>(1, 16384 / c_out), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = pending + i * c_out;
      const T* move = shift.data() + i / n * c_out;
      T* to = args.out + i * c_out;
      const bool exists = args.saved.out_degree[i] > 0;
      for (int64_t c = 0; c < c_out; ++c) {
        const T z = from[c] * scale[c] + move[c];
        to[c] = exists ? (z > T(0) ? z : z * slope) : T(0);
      }
    }
  });
}

template <class T>
void forward(const EdgeConvForwardArgs<T>& args, const Parallel& parallel) {
  const int64_t batch = args.batch, n = args.n, k = args.k, c_in = args.c_in, c_out = args.c_out;
  const EdgeConvSaved<T>& saved = args.saved;
  const ChannelBlocks<T> blocks(batch, n, c_out);
  const PackedWeights<T> weights(args, blocks, parallel);
  T* pending = saved.winner != nullptr ? saved.winner : args.training ? args.out : nullptr;

  Buffer<int64_t> edges(batch);
  ReverseGraph reverse;
  if (saved.in_sum != nullptr) {
    reverse.start.resize(batch * (n + 1));
    reverse.from.resize(batch * n * k);
  }
  parallel.ranges(batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* idx = args.idx + b * n * k;
      int32_t* in_degree = saved.in_degree + b * n;
      edges[b] = count_degrees(n, k, idx, saved.out_degree + b * n, in_degree);
      choose_centre(n, c_in, args.x + b * n * c_in, saved.out_degree + b * n, saved.centre + b * c_in);
      if (saved.in_sum != nullptr)
        reverse_cloud(n, k, idx, in_degree, reverse.start.data() + b * (n + 1), reverse.from.data() + b * n * k);
    }
  });

  if (!args.training)
    for (int64_t c = 0; c < c_out; ++c)
      saved.rstd[c] = args.gamma == nullptr ? 1.0 : 1 / std::sqrt(double(args.running_var[c]) + args.eps);
  Buffer<double> sums(batch * c_out + blocks.width), squares(batch * c_out + blocks.width);
  Buffer<T> dead(blocks.count * blocks.width);
  for (int64_t c = 0; c < blocks.count * blocks.width; ++c)
    dead[c] = c < c_out && args.gamma != nullptr && args.gamma[c] == T(0) ? T(1) : T(0);
  Buffer<int32_t> slots(k);
  for (int64_t s = 0; s < k; ++s) slots[s] = static_cast<int32_t>(s);

  const auto make_scratch = [&] {
    Scratch<T> scratch;
    scratch.x.resize(n * c_in);
    scratch.neighbour.resize(n * blocks.width);
    scratch.own.resize(n * blocks.width);
    scratch.scale.resize(blocks.width);
    scratch.shift.resize(blocks.width);
    scratch.valid_neighbours.resize(k);
    scratch.valid_slots.resize(k);
    return scratch;
  };
  parallel.items(batch * blocks.count, make_scratch, [&](int64_t item, Scratch<T>& scratch) {
    const int64_t b = item / blocks.count, which = item % blocks.count;
    const int64_t first = blocks.first(which), channels = blocks.channels(which), width = blocks.padded(which);
    const int32_t* out_degree = saved.out_degree + b * n;
    const int32_t* in_degree = saved.in_degree + b * n;
    const T* centre = saved.centre + b * c_in;
    if (scratch.cloud != b) {
      centre_cloud(n, c_in, args.x + b * n * c_in, centre, out_degree, in_degree, scratch.x.data());
      scratch.cloud = b;
    }
    const T* x = scratch.x.data();
    const T* packed_neighbour = weights.neighbour.data() + which * weights.block_size;
    const T* packed_own = weights.own.data() + which * weights.block_size;
    multiply_packed(n, width, &x, c_in, &packed_neighbour, c_in, 1, scratch.neighbour.data(), width, false);
    multiply_packed(n, width, &x, c_in, &packed_own, c_in, 1, scratch.own.data(), width, false);

    // h of an edge from the centre to itself, which centring took away.
    double* offset = saved.offset + b * c_out + first;
    for (int64_t c = 0; c < channels; ++c) {
      const T* row = args.weight + (first + c) * 2 * c_in + c_in;
      double h = 0;
      for (int64_t p = 0; p < c_in; ++p) h += double(row[p]) * centre[p];
      if (!args.training && args.gamma != nullptr) h -= args.running_mean[first + c];
      offset[c] = sign_of(args.gamma, first + c) * h;
    }
    if (!args.training)
      for (int64_t c = 0; c < width; ++c) {
        scratch.scale[c] = c < channels ? T(scale_of(args.gamma, saved.rstd, first + c)) : T(0);
        scratch.shift[c] =
            c < channels ? T(shift_of(args.gamma, args.beta, saved.rstd, saved.offset + b * c_out, first + c)) : T(0);
      }

    // Sums go to a block of their own first: the last vector may reach past the last channel.
    double block_sums[2][64];
    for (int64_t c = 0; c < width; ++c) block_sums[0][c] = block_sums[1][c] = 0;
    const Block<T> block{args,
                         b,
                         first,
                         channels,
                         width,
                         args.idx + b * n * k,
                         out_degree,
                         in_degree,
                         scratch.neighbour.data(),
                         scratch.own.data(),
                         dead.data() + first,
                         args.training ? nullptr : scratch.scale.data(),
                         args.training ? nullptr : scratch.shift.data(),
                         pending == nullptr ? nullptr : pending + b * n * c_out,
                         args.training ? block_sums[0] : nullptr,
                         args.training ? block_sums[1] : nullptr,
                         slots.data(),
                         scratch.valid_neighbours.data(),
                         scratch.valid_slots.data()};
    bool exact = !all_finite(block.neighbour, n * width);
    for (int64_t c = 0; c < channels; ++c) exact |= dead[first + c] != T(0);
    over_columns<T>(width, [&](auto vectors, int64_t c) {
      if (exact)
        gather<vectors.value, true>(block, c);
      else
        gather<vectors.value, false>(block, c);
      if (saved.in_sum != nullptr)
        gather_reverse<vectors.value>(block, reverse.start.data() + b * (n + 1), reverse.from.data() + b * n * k, c);
    });
    for (int64_t c = 0; c < channels && args.training; ++c) {
      sums[b * c_out + first + c] = block_sums[0][c];
      squares[b * c_out + first + c] = block_sums[1][c];
    }
  });

  if (!args.training) return;
  finish_statistics(args, edges.data(), sums.data(), squares.data());
  activate(args, pending, parallel);
}

}  // namespace

void edge_conv_forward(const EdgeConvForwardArgs<float>& args, const Parallel& parallel) { forward(args, parallel); }
void edge_conv_forward(const EdgeConvForwardArgs<double>& args, const Parallel& parallel) { forward(args, parallel); }

}  // namespace crosspoint::CROSSPOINT_ISA
