#include "edge_conv2.h"

namespace crosspoint::CROSSPOINT_ISA {
namespace {

// In signed, centred values, with z2 = scale2 h2 + shift2, g = grad * leaky'(z2) at the winners and E edges, the
// gradient of h2 is
//     scale2 ([the edge wins] g - mean_term - slope_term h2),
// the last two only where the batch made the statistics. Since h2 = W a, for a = a1 less the pivot and W the signed
// rows of weight2, what reaches a from the last two is -(q + Q a) with
//     q = W' scale2 mean_term,  Q = W' diag(scale2 slope_term) W,
// and what they give weight2 follows from the sums of a and of a a': neither needs h2. The winners' part is
// c_out rows of W a node. The first norm's dense terms are known once all edges have been seen; summed by source
// and by target they need only the node maps.

// Work is cut in groups of clouds times parts of their nodes: each sums its own gradients of the weights, and each
// part its own gradient of u, since edges lead anywhere.
template <class T>
struct Plan {
  explicit Plan(const EdgeConv2BackwardArgs<T>& args)
      : groups(std::min<int64_t>(args.batch, kItems)),
        parts(std::min((kItems + groups - 1) / groups, (args.n + kChunkNodes - 1) / kChunkNodes)),
        edges(args.batch),
        scale(args.c_out),
        shift(args.batch * args.c_out),
        slope_term(args.c_out),
        mean_term(args.batch * args.c_out),
        sum_g(args.batch * args.c_out) {
    const EdgeConv2Layer<T>& layer = args.second;
    for (int64_t c = 0; c < args.c_out; ++c) {
      scale[c] = T(scale_of(layer.gamma, args.saved.rstd2, c));
      slope_term[c] = 0;
    }
    for (int64_t b = 0; b < args.batch; ++b) {
      edges[b] = 0;
      for (int64_t i = b * args.n; i < (b + 1) * args.n; ++i) edges[b] += args.saved.out_degree[i];
      all_edges += edges[b];
      for (int64_t c = 0; c < args.c_out; ++c) {
        shift[b * args.c_out + c] =
            T(shift_of(layer.gamma, layer.beta, args.saved.rstd2, args.saved.offset2 + b * args.c_out, c));
        mean_term[b * args.c_out + c] = 0;
      }
    }
  }

  int64_t items() const { return groups * parts; }
  int64_t first_cloud(int64_t item, int64_t batch) const { return item / parts * batch / groups; }
  int64_t last_cloud(int64_t item, int64_t batch) const { return (item / parts + 1) * batch / groups; }
  int64_t first_node(int64_t item, int64_t n) const { return item % parts * n / parts; }
  int64_t last_node(int64_t item, int64_t n) const { return (item % parts + 1) * n / parts; }

  static constexpr int64_t kItems = 16;
  int64_t groups, parts, all_edges = 0;
  Buffer<int64_t> edges;            // (batch)
  Buffer<T> scale, shift;           // (c_out), (batch, c_out), of the second norm
  Buffer<double> slope_term;        // (c_out)
  Buffer<double> mean_term, sum_g;  // (batch, c_out); sum_g: of g over the nodes
};

template <class T>
T routed(T winner, T grad, T scale, T shift, T slope) {
  return winner * scale + shift > T(0) ? grad : grad * slope;
}

// Sums of g, from them gamma2's and beta2's gradient, and from those the dense terms of h2's.
template <class T>
void second_norm(const EdgeConv2BackwardArgs<T>& args, Plan<T>& plan, const Parallel& parallel) {
  const int64_t n = args.n, c_out = args.c_out, chunks = (n + kChunkNodes - 1) / kChunkNodes;
  const T slope = T(args.negative_slope);
  Buffer<double> partial(args.batch * chunks * 2 * c_out);
  parallel.ranges(args.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      double *sum_g = partial.data() + item * 2 * c_out, *sum_gh = sum_g + c_out;
      std::fill(sum_g, sum_g + 2 * c_out, 0.0);
      const T* shift = plan.shift.data() + item / chunks * c_out;
      const int64_t first = item / chunks * n + item % chunks * kChunkNodes;
      const int64_t last = std::min(first + kChunkNodes, (item / chunks + 1) * n);
      for (int64_t i = first; i < last; ++i) {
        if (args.saved.out_degree[i] == 0) continue;
        const T *winner = args.saved.winner + i * c_out, *grad = args.grad + i * c_out;
        for (int64_t c = 0; c < c_out; ++c) {
          const double g = routed(winner[c], grad[c], plan.scale[c], shift[c], slope);
          sum_g[c] += g;
          sum_gh[c] += g * winner[c];
        }
      }
    }
  });
  const double edges = std::max<int64_t>(plan.all_edges, 1);
  for (int64_t c = 0; c < c_out; ++c) {
    double beta = 0, gamma = 0;
    for (int64_t b = 0; b < args.batch; ++b) {
      double sum_g = 0, sum_gh = 0;
      for (int64_t item = b * chunks; item < (b + 1) * chunks; ++item) {
        sum_g += partial[item * 2 * c_out + c];
        sum_gh += partial[item * 2 * c_out + c_out + c];
      }
      plan.sum_g[b * c_out + c] = sum_g;
      beta += sum_g;
      gamma += sum_gh + args.saved.offset2[b * c_out + c] * sum_g;
    }
    if (args.second.gamma == nullptr) continue;
    gamma *= args.saved.rstd2[c];
    args.grad_gamma2[c] = T(sign_of(args.second.gamma, c) * gamma);
    args.grad_beta2[c] = T(beta);
    if (!args.training) continue;
    if (args.slope_term != nullptr) {
      plan.slope_term[c] = args.slope_term[c];
      for (int64_t b = 0; b < args.batch; ++b) plan.mean_term[b * c_out + c] = args.mean_term[b * c_out + c];
      continue;
    }
    plan.slope_term[c] = gamma * args.saved.rstd2[c] / edges;
    for (int64_t b = 0; b < args.batch; ++b)
      plan.mean_term[b * c_out + c] = beta / edges + plan.slope_term[c] * args.saved.offset2[b * c_out + c];
  }
}

// W, and of the dense terms q and the packed -Q.
template <class T>
struct SecondWeight {
  SecondWeight(const EdgeConv2BackwardArgs<T>& args, const Plan<T>& plan, int64_t width)
      : rows(args.c_out * width), q(args.batch * width), negative_q(args.training ? args.c_mid * width : 0) {
    const int64_t c_mid = args.c_mid, c_out = args.c_out;
    const EdgeConv2Layer<T>& layer = args.second;
    for (int64_t c = 0; c < c_out; ++c)
      for (int64_t p = 0; p < width; ++p)
        rows[c * width + p] = p < c_mid ? sign_of(layer.gamma, c) * layer.weight[c * c_mid + p] : T(0);
    std::fill(q.data(), q.data() + args.batch * width, T(0));
    if (!args.training) return;
    Buffer<double> product(c_mid * c_mid), sum(c_mid);
    std::fill(product.data(), product.data() + c_mid * c_mid, 0.0);
    for (int64_t c = 0; c < c_out; ++c) {
      const T* row = rows.data() + c * width;
      const double scale = plan.scale[c];
      for (int64_t p = 0; p < c_mid; ++p) {
        const double left = scale * plan.slope_term[c] * row[p];
        for (int64_t o = 0; o < c_mid; ++o) product[p * c_mid + o] += left * row[o];
      }
    }
    for (int64_t b = 0; b < args.batch; ++b) {
      std::fill(sum.data(), sum.data() + c_mid, 0.0);
      for (int64_t c = 0; c < c_out; ++c) {
        const double factor = plan.scale[c] * plan.mean_term[b * c_out + c];
        for (int64_t p = 0; p < c_mid; ++p) sum[p] += factor * rows[c * width + p];
      }
      for (int64_t p = 0; p < c_mid; ++p) q[b * width + p] = T(sum[p]);
    }
    pack_columns(c_mid, c_mid, negative_q.data(), [&](int64_t p, int64_t o) { return T(-product[p * c_mid + o]); });
  }

  Buffer<T> rows;        // (c_out, width)
  Buffer<T> q;           // (batch, width)
  Buffer<T> negative_q;  // empty unless training
};

// What a work item sums over its edges.
template <class T>
struct Sums {
  Sums(const Plan<T>& plan, const EdgeConv2BackwardArgs<T>& args, int64_t width)
      : items(plan.items()),
        winners(items * args.c_out * width),
        squares(args.training ? items * args.c_mid * width : 0),
        a(plan.parts * args.batch * width),
        dz(items * width),
        dz_h(items * width) {}

  int64_t items;
  Buffer<T> winners;        // (items, c_out, width): scale2 g a at the winners
  Buffer<T> squares;        // (items, c_mid, width): a a'
  Buffer<double> a;         // (parts, batch, width)
  Buffer<double> dz, dz_h;  // (items, width): of z1's gradient, alone and times the normed h1
};

template <class T>
struct Scratch {
  Scratch(const EdgeConv2BackwardArgs<T>& args, int64_t width)
      : edges(args.k), a(edges.most_nodes * args.k * width), da(edges.most_nodes * args.k * width), g(args.c_out) {}

  EdgeList edges;
  Buffer<T> a, da;  // (rows, width): a, and its gradient
  Buffer<T> g;      // (c_out), scale2 g of a node
};

// The winners' part of a's gradient, and of weight2's, for one node; `first` is the first of its rows in the tile.
template <class T, class Slot>
void add_winners(const EdgeConv2BackwardArgs<T>& args, const Plan<T>& plan, const T* weight, int64_t width,
                 int64_t node, const int32_t* row_of_slot, Scratch<T>& scratch, T* sum) {
  const int64_t c_out = args.c_out;
  const T slope = T(args.negative_slope);
  const T *winner = args.saved.winner + node * c_out, *grad = args.grad + node * c_out;
  const Slot* slot = static_cast<const Slot*>(args.saved.slot) + node * c_out;
  const T *scale = plan.scale.data(), *shift = plan.shift.data() + node / args.n * c_out;
  T* g = scratch.g.data();
  for (int64_t c = 0; c < c_out; ++c) g[c] = scale[c] * routed(winner[c], grad[c], scale[c], shift[c], slope);
  for (int64_t c = 0; c < c_out; ++c) {
    const int64_t row = row_of_slot[slot[c]];
    const Vec<T> factor = splat(g[c]);
    const T *a = scratch.a.data() + row * width, *w = weight + c * width;
    T *da = scratch.da.data() + row * width, *to = sum + c * width;
    for (int64_t p = 0; p < width; p += lanes<T>) {
      store(da + p, load(da + p) + factor * load(w + p));
      store(to + p, load(to + p) + factor * load(a + p));
    }
  }
}

// One tile: gradients of z1 on its edges, summed by source into `own` and by target into `neighbour`.
template <class T>
void scatter_tile(const EdgeList& edges, const Activation<T>& activation, int64_t b, const T* u, const T* v,
                  const T* q, T slope, const T* da, T* neighbour, T* own, double* sum, double* sum_h) {
  constexpr int64_t L = lanes<T>;
  const int64_t width = activation.width;
  for (int64_t c = 0; c < width; c += L) {
    const Vec<T> gain = load(activation.gain.data() + c), shift = load(activation.shift.data() + b * width + c),
                 offset = load(activation.offset.data() + b * width + c), constant = load(q + b * width + c);
    for (int64_t i = 0; i < edges.nodes; ++i) {
      const Vec<T> node = load(v + i * width + c);
      Vec<T> total{}, total_h{};
      for (int64_t r = edges.start[i]; r < edges.start[i + 1]; ++r) {
        const int64_t at = edges.neighbour[r] * width + c;
        const Vec<T> h = load(u + at) + node, g = load(da + r * width + c) - constant;
        const Vec<T> dz = h * gain + shift > T(0) ? g : g * slope;
        store(neighbour + at, load(neighbour + at) + dz);
        total += dz;
        total_h += dz * (h + offset);
      }
      store(own + i * width + c, total);
      for (int64_t l = 0; l < L; ++l) {
        sum[c + l] += total[l];
        sum_h[c + l] += total_h[l];
      }
    }
  }
}

// The gradients of z1, from the second layer's, for the nodes of one work item.
template <class T>
void edge_pass(const EdgeConv2BackwardArgs<T>& args, const Plan<T>& plan, const NodeMaps<T>& maps,
               const Activation<T>& activation, const SecondWeight<T>& weight, int64_t item, Sums<T>& sums,
               Scratch<T>& scratch, T* neighbour, T* own) {
  const int64_t n = args.n, k = args.k, c_mid = args.c_mid, c_out = args.c_out, width = maps.width;
  T* winners = sums.winners.data() + item * c_out * width;
  T* squares = args.training ? sums.squares.data() + item * c_mid * width : nullptr;
  double *sum_dz = sums.dz.data() + item * width, *sum_dz_h = sums.dz_h.data() + item * width;
  std::fill(winners, winners + c_out * width, T(0));
  if (args.training) std::fill(squares, squares + c_mid * width, T(0));
  for (double* sum : {sum_dz, sum_dz_h}) std::fill(sum, sum + width, 0.0);

  for (int64_t b = plan.first_cloud(item, args.batch); b < plan.last_cloud(item, args.batch); ++b) {
    T* targets = neighbour + b * n * width;
    const T* u = maps.u.data() + b * n * width;
    double* sum_a = sums.a.data() + (item % plan.parts * args.batch + b) * width;
    std::fill(targets, targets + n * width, T(0));
    std::fill(sum_a, sum_a + width, 0.0);
    over_tiles(scratch.edges, plan.first_node(item, n), plan.last_node(item, n), [&](int64_t first, int64_t count) {
      EdgeList& edges = scratch.edges;
      const int64_t node = b * n + first;
      const T* v = maps.v.data() + node * width;
      T *a = scratch.a.data(), *da = scratch.da.data();
      edges.fill(args.idx + node * k, count);
      activation.rows(edges, b, u, v, a);
      if (args.training) {
        const T *left = a, *right = weight.negative_q.data();
        multiply_packed(edges.rows, width, &left, width, &right, c_mid, 1, da, width, false);
        multiply_transposed(edges.rows, a, width, c_mid, a, width, width, squares, width);
        for (int64_t r = 0; r < edges.rows; ++r)
          for (int64_t p = 0; p < width; ++p) sum_a[p] += a[r * width + p];
      } else {
        std::fill(da, da + edges.rows * width, T(0));
      }
      for (int64_t i = 0; i < count; ++i) {
        if (edges.start[i] == edges.start[i + 1]) continue;
        const auto add = args.saved.slot_bytes == 1 ? add_winners<T, uint8_t> : add_winners<T, int32_t>;
        add(args, plan, weight.rows.data(), width, node + i, edges.row.data() + i * k, scratch, winners);
      }
      scatter_tile(edges, activation, b, u, v, weight.q.data(), T(args.negative_slope), da, targets,
                   own + node * width, sum_dz, sum_dz_h);
    });
  }
}

// The first norm's dense terms: every edge loses mean + slope h, at its source and at its target, where the mean is
// the cloud's. A thread owns one vector of channels of a cloud.
template <class T>
void subtract_dense(const EdgeConv2BackwardArgs<T>& args, const NodeMaps<T>& maps, const T* mean, const T* slope,
                    T* neighbour, T* own, const Parallel& parallel) {
  constexpr int64_t L = lanes<T>;
  const int64_t n = args.n, k = args.k, width = maps.width, blocks = width / L;
  parallel.ranges(args.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, c = item % blocks * L;
      const T *u = maps.u.data() + b * n * width + c, *v = maps.v.data() + b * n * width + c;
      T *targets = neighbour + b * n * width + c, *sources = own + b * n * width + c;
      const Vec<T> m = load(mean + b * width + c), s = load(slope + c);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t* neighbours = args.idx + (b * n + i) * k;
        const Vec<T> node = load(v + i * width);
        Vec<T> total{};
        for (int64_t e = 0; e < k; ++e) {
          const int64_t j = neighbours[e];
          if (j < 0) continue;
          const Vec<T> dense = m + s * (load(u + j * width) + node);
          store(targets + j * width, load(targets + j * width) - dense);
          total += dense;
        }
        store(sources + i * width, load(sources + i * width) - total);
      }
    }
  });
}

// weight2's gradient: the winners' part, less the dense terms', plus what the pivots left out, the sum of h2's gradient
// over each cloud times its pivot.
template <class T>
void finish_second_weight(const EdgeConv2BackwardArgs<T>& args, const Plan<T>& plan, const Sums<T>& sums,
                          const SecondWeight<T>& weight, const Activation<T>& activation, const Parallel& parallel) {
  const int64_t batch = args.batch, c_mid = args.c_mid, c_out = args.c_out, width = activation.width;
  Buffer<double> a(batch * c_mid), squares(c_mid * c_mid);
  for (int64_t p = 0; p < c_mid && args.training; ++p) {
    for (int64_t b = 0; b < batch; ++b) {
      a[b * c_mid + p] = 0;
      for (int64_t part = 0; part < plan.parts; ++part)
        a[b * c_mid + p] += sums.a[(part * batch + b) * width + p];
    }
    for (int64_t o = 0; o < c_mid; ++o) {
      double total = 0;
      for (int64_t item = 0; item < sums.items; ++item) total += sums.squares[(item * c_mid + p) * width + o];
      squares[p * c_mid + o] = total;
    }
  }
  parallel.ranges(c_out, 8, [&](int64_t begin, int64_t end) {
    Buffer<double> total(c_mid);
    for (int64_t c = begin; c < end; ++c) {
      const T* row = weight.rows.data() + c * width;
      const double scale = plan.scale[c], slope = plan.slope_term[c];
      for (int64_t p = 0; p < c_mid; ++p) {
        total[p] = 0;
        for (int64_t item = 0; item < sums.items; ++item) total[p] += sums.winners[(item * c_out + c) * width + p];
      }
      for (int64_t b = 0; b < batch; ++b) {
        double sum = plan.sum_g[b * c_out + c];  // of h2's gradient over the cloud, but for scale
        if (args.training) {
          const double mean = plan.mean_term[b * c_out + c];
          sum -= plan.edges[b] * mean;
          for (int64_t p = 0; p < c_mid; ++p) {
            sum -= slope * row[p] * a[b * c_mid + p];
            total[p] -= scale * mean * a[b * c_mid + p];
          }
        }
        for (int64_t p = 0; p < c_mid; ++p) total[p] += scale * sum * activation.pivot[b * c_mid + p];
      }
      for (int64_t p = 0; p < c_mid && args.training; ++p)
        for (int64_t o = 0; o < c_mid; ++o) total[o] -= scale * slope * row[p] * squares[p * c_mid + o];
      for (int64_t p = 0; p < c_mid; ++p)
        args.grad_weight2[c * c_mid + p] = T(sign_of(args.second.gamma, c) * total[p]);
    }
  });
}

// x's and weight1's gradient from those of u and v as yet without `factor`, gamma1 over the deviation.
template <class T>
void first_product(const EdgeConv2BackwardArgs<T>& args, const Plan<T>& plan, const T* neighbour, const T* own,
                   int64_t width, const double* factor, const Parallel& parallel) {
  const int64_t batch = args.batch, n = args.n, c_in = args.c_in, c_mid = args.c_mid;
  if (args.grad_x != nullptr) {
    Buffer<T> a(width * packed_columns<T>(c_in)), d(width * packed_columns<T>(c_in));
    const T* weight = args.first.weight;
    pack_columns(width, c_in, a.data(), [&](int64_t c, int64_t p) {
      return c < c_mid ? T(factor[c]) * weight[c * 2 * c_in + p] : T(0);
    });
    pack_columns(width, c_in, d.data(), [&](int64_t c, int64_t p) {
      return c < c_mid ? T(factor[c]) * (weight[c * 2 * c_in + c_in + p] - weight[c * 2 * c_in + p]) : T(0);
    });
    const int64_t chunks = (batch * n + kChunkNodes - 1) / kChunkNodes;
    parallel.ranges(chunks, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kChunkNodes, rows = std::min(batch * n, end * kChunkNodes) - first;
      const T *left[] = {neighbour + first * width, own + first * width}, *right[] = {a.data(), d.data()};
      multiply_packed(rows, c_in, left, width, right, width, 2, args.grad_x + first * c_in, c_in, false);
    });
  }
  if (args.grad_weight1 == nullptr) return;
  const int64_t items = plan.items();
  Buffer<T> partial(items * 2 * c_in * width);
  Buffer<double> part_sums(plan.parts * batch * width), sums(batch * width);
  const auto make_scratch = [&] { return Buffer<T>(n * c_in); };
  parallel.items(items, make_scratch, [&](int64_t item, Buffer<T>& x) {
    T* to = partial.data() + item * 2 * c_in * width;
    std::fill(to, to + 2 * c_in * width, T(0));
    const int64_t begin = plan.first_node(item, n), rows = plan.last_node(item, n) - begin;
    for (int64_t b = plan.first_cloud(item, batch); b < plan.last_cloud(item, batch); ++b) {
      const int64_t first = b * n + begin;
      centre_cloud(rows, c_in, args.x + first * c_in, args.saved.centre + b * c_in, args.saved.out_degree + first,
                   args.saved.in_degree + first, x.data());
      multiply_transposed(rows, x.data(), c_in, c_in, neighbour + first * width, width, width, to, width);
      multiply_transposed(rows, x.data(), c_in, c_in, own + first * width, width, width, to + c_in * width, width);
      double* sum = part_sums.data() + (item % plan.parts * batch + b) * width;
      std::fill(sum, sum + width, 0.0);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < width; ++c) sum[c] += own[(first + i) * width + c];
    }
  });
  for (int64_t i = 0; i < batch * width; ++i) {
    sums[i] = 0;
    for (int64_t part = 0; part < plan.parts; ++part) sums[i] += part_sums[part * batch * width + i];
  }
  finish_weight(batch, c_in, c_mid, width, items, partial.data(), sums.data(), args.saved.centre,
                args.training && !args.first_known, factor, args.grad_weight1, parallel);
}

template <class T>
void backward(const EdgeConv2BackwardArgs<T>& args, const Parallel& parallel) {
  const int64_t c_mid = args.c_mid, nodes = args.batch * args.n;
  const bool norm = args.first.gamma != nullptr;
  Plan<T> plan(args);
  second_norm(args, plan, parallel);
  NodeMaps<T> maps(args);
  maps.multiply(args, parallel);
  maps.scale(args.saved.rstd1, c_mid, parallel);
  const int64_t width = maps.width;
  const Activation<T> activation(args, width);
  const SecondWeight<T> weight(args, plan, width);
  Sums<T> sums(plan, args, width);
  Buffer<T> neighbour(plan.parts * nodes * width), own(nodes * width);

  const auto make_scratch = [&] { return Scratch<T>(args, width); };
  parallel.items(sums.items, make_scratch, [&](int64_t item, Scratch<T>& scratch) {
    edge_pass(args, plan, maps, activation, weight, item, sums, scratch,
              neighbour.data() + item % plan.parts * nodes * width, own.data());
  });
  parallel.ranges(nodes * width, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < plan.parts; ++part) {
      const T* more = neighbour.data() + part * nodes * width;
      for (int64_t i = begin; i < end; ++i) neighbour[i] += more[i];
    }
  });
  if (args.grad_weight2 != nullptr) finish_second_weight(args, plan, sums, weight, activation, parallel);

  Buffer<double> factor(c_mid);
  Buffer<T> mean(args.batch * width), slope(width);
  const double edges = std::max<int64_t>(plan.all_edges, 1);
  for (int64_t c = 0; c < width; ++c) {
    double beta = 0, gamma = 0;
    for (int64_t item = 0; item < sums.items; ++item) {
      beta += sums.dz[item * width + c];
      gamma += sums.dz_h[item * width + c];
    }
    slope[c] = T(gamma / edges);
    for (int64_t b = 0; b < args.batch; ++b)
      mean[b * width + c] = T((beta + gamma * activation.offset[b * width + c]) / edges);
    if (c >= c_mid) continue;
    factor[c] = norm ? double(args.first.gamma[c]) * args.saved.rstd1[c] : 1.0;
    if (!norm) continue;
    args.grad_gamma1[c] = T(gamma);
    args.grad_beta1[c] = T(beta);
  }
  if (args.grad_x == nullptr && args.grad_weight1 == nullptr) return;
  if (args.training && !args.first_known)
    subtract_dense(args, maps, mean.data(), slope.data(), neighbour.data(), own.data(), parallel);
  first_product(args, plan, neighbour.data(), own.data(), width, factor.data(), parallel);
}

}  // namespace

void edge_conv2_backward(const EdgeConv2BackwardArgs<float>& args, const Parallel& parallel) {
  backward(args, parallel);
}
void edge_conv2_backward(const EdgeConv2BackwardArgs<double>& args, const Parallel& parallel) {
  backward(args, parallel);
}

}  // namespace crosspoint::CROSSPOINT_ISA
