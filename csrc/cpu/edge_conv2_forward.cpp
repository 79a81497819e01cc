#include "edge_conv2.h"
#include "winners.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// Sums by chunk of nodes, (batch, chunks, 2, width), to sums by cloud, (batch, channels) each.
inline void reduce_chunks(int64_t batch, int64_t chunks, const double* partial, int64_t width, int64_t channels,
                          double* sums, double* squares) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, square = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double* part = partial + (b * chunks + chunk) * 2 * width;
        sum += part[c];
        square += part[width + c];
      }
      sums[b * channels + c] = sum;
      squares[b * channels + c] = square;
    }
}

// The statistics of h1, from its sums over the edges of every cloud.
template <class T>
void first_statistics(const EdgeConv2ForwardArgs<T>& args, const NodeMaps<T>& maps, const int64_t* cloud_edges,
                      const Parallel& parallel) {
  const int64_t n = args.n, k = args.k, c_mid = args.c_mid, width = maps.width;
  const int64_t chunks = (n + kChunkNodes - 1) / kChunkNodes;
  Buffer<double> partial(args.batch * chunks * 2 * width);
  struct Scratch {
    EdgeList edges;
    Buffer<T> h;
  };
  const auto make_scratch = [&] {
    EdgeList edges(k);
    Buffer<T> h(edges.most_nodes * k * width);
    return Scratch{std::move(edges), std::move(h)};
  };
  parallel.items(args.batch * chunks, make_scratch, [&](int64_t item, Scratch& scratch) {
    const int64_t b = item / chunks, begin = item % chunks * kChunkNodes;
    double* sums = partial.data() + item * 2 * width;
    std::fill(sums, sums + 2 * width, 0.0);
    over_tiles(scratch.edges, begin, std::min(n, begin + kChunkNodes), [&](int64_t first, int64_t count) {
      EdgeList& edges = scratch.edges;
      edges.fill(args.idx + (b * n + first) * k, count);
      for (int64_t i = 0; i < count; ++i) {
        const T* own = maps.v.data() + (b * n + first + i) * width;
        for (int64_t r = edges.start[i]; r < edges.start[i + 1]; ++r) {
          const T* row = maps.u.data() + (b * n + edges.neighbour[r]) * width;
          for (int64_t c = 0; c < width; c += lanes<T>)
            store(scratch.h.data() + r * width + c, load(row + c) + load(own + c));
        }
      }
      add_statistics(edges.rows, scratch.h.data(), width, sums, sums + width);
    });
  });

  Buffer<double> sums(args.batch * c_mid), squares(args.batch * c_mid);
  reduce_chunks(args.batch, chunks, partial.data(), width, c_mid, sums.data(), squares.data());
  finish_statistics<T>(args.batch, c_mid, cloud_edges, sums.data(), squares.data(), nullptr, args.eps,
                       args.saved.offset1, args.saved.rstd1, args.momentum, args.first.running_mean,
                       args.first.running_var);
}

// The largest h2 of each of the tile's nodes and its slot, for V vectors of channels from c; `node` is the first
// one. Not inlined: its accumulators need the registers.
template <int V, bool Exact, class T>
__attribute__((noinline)) void find_winners(const EdgeConv2ForwardArgs<T>& args, const EdgeList& edges,
                                            int64_t node, const T* h, int64_t width, const T* dead,
                                            int64_t c, T* winners) {
  constexpr int64_t L = lanes<T>;
  const int64_t k = args.k, rest = args.c_out - c;
  Vec<T> all_tie[V];
  for (int v = 0; v < V; ++v) all_tie[v] = load(dead + c + v * L);
  for (int64_t i = 0; i < edges.nodes; ++i) {
    const int64_t* neighbours = args.idx + (node + i) * k;
    const T* row = h + edges.start[i] * width + c;
    Vec<T> most[V] = {};
    Mask<T> slot[V] = {};
    bool first = true;
    for (int64_t s = 0; s < k; ++s) {
      if (neighbours[s] < 0) continue;
      const Mask<T> here = Mask<T>{} + static_cast<int32_t>(s);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<T> value = load(row + v * L);
        const Mask<T> wins = first ? ~Mask<T>{} : beats<Exact, T>(value, most[v], all_tie[v]);
        most[v] = wins ? value : most[v];
        slot[v] = wins ? here : slot[v];
      }
      first = false;
      row += width;
    }
    const int64_t at = (node + i) * args.c_out + c;
    for (int v = 0; v < V; ++v) {
      store_part(winners + at + v * L, most[v], rest - v * L);
      if (args.saved.slot != nullptr)
        store_slots<T>(args.saved.slot, args.saved.slot_bytes, at + v * L, slot[v], rest - v * L);
    }
  }
}

// The second layer, tile by tile: winners of every node, and the statistics.
template <class T>
void second_layer(const EdgeConv2ForwardArgs<T>& args, const NodeMaps<T>& maps, T* winners, const int64_t* cloud_edges,
                  const Parallel& parallel) {
  const int64_t n = args.n, k = args.k, c_mid = args.c_mid, c_out = args.c_out;
  const int64_t width1 = maps.width, width2 = round_up(c_out, lanes<T>);
  const int64_t chunks = (n + kChunkNodes - 1) / kChunkNodes;
  const EdgeConv2Layer<T>& layer = args.second;
  const Activation<T> activation(args, width1);
  Buffer<T> weight(c_mid * width2), dead(width2);
  pack_columns(c_mid, c_out, weight.data(), [&](int64_t p, int64_t c) {
    return sign_of(layer.gamma, c) * layer.weight[c * c_mid + p];
  });
  bool any_dead = false;
  for (int64_t c = 0; c < width2; ++c) {
    dead[c] = c < c_out && layer.gamma != nullptr && layer.gamma[c] == T(0) ? T(1) : T(0);
    any_dead |= dead[c] != T(0);
  }

  Buffer<double> partial(args.training ? args.batch * chunks * 2 * width2 : 0);
  struct Scratch {
    EdgeList edges;
    Buffer<T> a, h;
  };
  const auto make_scratch = [&] {
    EdgeList edges(k);
    const int64_t rows = edges.most_nodes * k;
    return Scratch{std::move(edges), Buffer<T>(rows * width1), Buffer<T>(rows * width2)};
  };
  parallel.items(args.batch * chunks, make_scratch, [&](int64_t item, Scratch& scratch) {
    const int64_t b = item / chunks, begin = item % chunks * kChunkNodes;
    double* sums = partial.data() + item * 2 * width2;
    if (args.training) std::fill(sums, sums + 2 * width2, 0.0);
    over_tiles(scratch.edges, begin, std::min(n, begin + kChunkNodes), [&](int64_t first, int64_t count) {
      EdgeList& edges = scratch.edges;
      const int64_t node = b * n + first;
      const T *a = scratch.a.data(), *right = weight.data();
      T* h = scratch.h.data();
      edges.fill(args.idx + node * k, count);
      activation.rows(edges, b, maps.u.data() + b * n * width1, maps.v.data() + node * width1, scratch.a.data());
      multiply_packed(edges.rows, width2, &a, width1, &right, c_mid, 1, h, width2, false);
      if (args.training) add_statistics(edges.rows, h, width2, sums, sums + width2);
      const bool exact = any_dead || !all_finite(h, edges.rows * width2);
      over_columns<T>(width2, [&](auto vectors, int64_t c) {
        constexpr int V = vectors.value;
        if (exact)
          find_winners<V, true>(args, edges, node, h, width2, dead.data(), c, winners);
        else
          find_winners<V, false>(args, edges, node, h, width2, dead.data(), c, winners);
      });
    });
  });

  const bool known = !args.training && layer.gamma != nullptr;
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t c = 0; c < c_out; ++c) {
      double h = 0;  // of the pivot
      for (int64_t p = 0; p < c_mid; ++p)
        h += double(layer.weight[c * c_mid + p]) * activation.pivot[b * c_mid + p];
      args.saved.offset2[b * c_out + c] = sign_of(layer.gamma, c) * (known ? h - layer.running_mean[c] : h);
    }
  if (!args.training) return;
  Buffer<double> sums(args.batch * c_out), squares(args.batch * c_out);
  reduce_chunks(args.batch, chunks, partial.data(), width2, c_out, sums.data(), squares.data());
  finish_statistics(args.batch, c_out, cloud_edges, sums.data(), squares.data(), layer.gamma, args.eps,
                    args.saved.offset2, args.saved.rstd2, args.momentum, layer.running_mean,
                    layer.running_var);
}

template <class T>
void forward(const EdgeConv2ForwardArgs<T>& args, const Parallel& parallel) {
  const int64_t batch = args.batch, n = args.n, k = args.k, c_in = args.c_in, c_mid = args.c_mid,
                c_out = args.c_out;
  const EdgeConv2Saved<T>& saved = args.saved;
  const bool measured = args.training && !args.first_known;  // the first norm's statistics
  const bool known = !measured && args.first.gamma != nullptr;
  Buffer<int64_t> edges(batch);
  parallel.ranges(batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      T* centre = saved.centre + b * c_in;
      edges[b] = count_degrees(n, k, args.idx + b * n * k, saved.out_degree + b * n, saved.in_degree + b * n);
      choose_centre(n, c_in, args.x + b * n * c_in, saved.out_degree + b * n, centre);
      for (int64_t c = 0; c < c_mid; ++c) {
        const double h = centre_h(c_in, args.first.weight + c * 2 * c_in, centre);
        saved.offset1[b * c_mid + c] = known ? h - args.first.running_mean[c] : h;
      }
    }
  });
  for (int64_t c = 0; c < c_mid && !measured; ++c)
    saved.rstd1[c] = known ? 1 / std::sqrt(double(args.first.running_var[c]) + args.eps) : 1.0;
  for (int64_t c = 0; c < c_out && !args.training; ++c)
    saved.rstd2[c] = known ? 1 / std::sqrt(double(args.second.running_var[c]) + args.eps) : 1.0;

  NodeMaps<T> maps(args);
  maps.multiply(args, parallel);
  if (measured) first_statistics(args, maps, edges.data(), parallel);
  maps.scale(saved.rstd1, c_mid, parallel);
  T* winners = saved.winner != nullptr ? saved.winner : args.out;
  second_layer(args, maps, winners, edges.data(), parallel);

  Buffer<T> scale(c_out), shift(batch * c_out);
  for (int64_t c = 0; c < c_out; ++c) scale[c] = T(scale_of(args.second.gamma, saved.rstd2, c));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < c_out; ++c)
      shift[b * c_out + c] =
          T(shift_of(args.second.gamma, args.second.beta, saved.rstd2, saved.offset2 + b * c_out, c));
  activate(batch, n, c_out, winners, scale.data(), shift.data(), saved.out_degree,
           T(args.negative_slope), args.out, parallel);
}

}  // namespace

void edge_conv2_forward(const EdgeConv2ForwardArgs<float>& args, const Parallel& parallel) {
  forward(args, parallel);
}
void edge_conv2_forward(const EdgeConv2ForwardArgs<double>& args, const Parallel& parallel) {
  forward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
