// What both passes of the two-layer EdgeConv share: lists of edges, the first layer on them, and its node maps.
#pragma once

#include "crosspoint/edge_conv2.h"
#include "edge_conv.h"
#include "graph.h"

namespace crosspoint::CROSSPOINT_ISA {

// Sums over edges are cut after so many nodes; that depends on the shapes alone, so that threads do not show.
inline constexpr int64_t kChunkNodes = 64;

// The edges of a few consecutive nodes of one cloud, node after node, without the missing ones: the rows of a tile.
struct EdgeList {
  explicit EdgeList(int64_t k)
      : k(k),
        most_nodes(std::max<int64_t>(1, 96 / k)),
        start(most_nodes + 1),
        neighbour(most_nodes * k),
        row(most_nodes * k) {}

  // `first` is the first node's row of idx.
  void fill(const int64_t* first, int64_t count) {
    nodes = count;
    rows = 0;
    for (int64_t i = 0; i < count; ++i) {
      start[i] = rows;
      for (int64_t s = 0; s < k; ++s) {
        row[i * k + s] = static_cast<int32_t>(rows);
        if (const int64_t j = first[i * k + s]; j >= 0) neighbour[rows++] = static_cast<int32_t>(j);
      }
    }
    start[count] = rows;
  }

  int64_t k, most_nodes, nodes = 0, rows = 0;
  Buffer<int64_t> start;      // of each node's rows
  Buffer<int32_t> neighbour;  // of each row
  Buffer<int32_t> row;        // (nodes, k): of each slot that has an edge
};

// Calls f(first node, number of nodes) for what an EdgeList holds at a time of the nodes [begin, end).
template <class F>
void over_tiles(const EdgeList& edges, int64_t begin, int64_t end, F&& f) {
  for (int64_t i = begin; i < end; i += edges.most_nodes) f(i, std::min(edges.most_nodes, end - i));
}

// Sums of h and h^2 over the rows of a tile, added to `sums` and `squares`.
template <class T>
void add_statistics(int64_t rows, const T* h, int64_t width, double* sums, double* squares) {
  constexpr int64_t L = lanes<T>;
  for (int64_t c = 0; c < width; c += L)
    for (int64_t r0 = 0; r0 < rows; r0 += kStatisticsRows) {
      Vec<T> sum{}, square{};
      for (int64_t r = r0; r < std::min(rows, r0 + kStatisticsRows); ++r) {
        const Vec<T> value = load(h + r * width + c);
        sum += value;
        square += value * value;
      }
      for (int64_t l = 0; l < L; ++l) {
        sums[c + l] += sum[l];
        squares[c + l] += square[l];
      }
    }
}

// The first layer over nodes: the centred h1 of edge (i, j) is u_j + v_i.
template <class T>
struct NodeMaps {
  template <class Args>
  explicit NodeMaps(const Args& args)
      : nodes(args.batch * args.n), width(round_up(args.c_mid, lanes<T>)), u(nodes * width), v(nodes * width) {}

  // A x_j and (B - A) x_i of the centred clouds, as yet without norm.
  template <class Args>
  void multiply(const Args& args, const Parallel& parallel) {
    const int64_t n = args.n, c_in = args.c_in, c_mid = args.c_mid, chunks = (n + kRows - 1) / kRows;
    Buffer<T> neighbour(c_in * width), own(c_in * width);
    const T* weight = args.first.weight;
    pack_columns(c_in, c_mid, neighbour.data(), [&](int64_t p, int64_t c) { return weight[c * 2 * c_in + p]; });
    pack_columns(c_in, c_mid, own.data(), [&](int64_t p, int64_t c) {
      return weight[c * 2 * c_in + c_in + p] - weight[c * 2 * c_in + p];
    });
    const auto make_scratch = [&] { return Buffer<T>(kRows * c_in); };
    parallel.items(args.batch * chunks, make_scratch, [&](int64_t item, Buffer<T>& x) {
      const int64_t b = item / chunks, begin = item % chunks * kRows, first = b * n + begin;
      const int64_t rows = std::min(kRows, n - begin);
      centre_cloud(rows, c_in, args.x + first * c_in, args.saved.centre + b * c_in,
                   args.saved.out_degree + first, args.saved.in_degree + first, x.data());
      const T *left = x.data(), *a = neighbour.data(), *d = own.data();
      multiply_packed(rows, width, &left, c_in, &a, c_in, 1, u.data() + first * width, width, false);
      multiply_packed(rows, width, &left, c_in, &d, c_in, 1, v.data() + first * width, width, false);
    });
  }

  // From there on the h1 of an edge is in units of its deviation.
  void scale(const double* rstd, int64_t c_mid, const Parallel& parallel) {
    Buffer<T> factor(width);
    for (int64_t c = 0; c < width; ++c) factor[c] = c < c_mid ? T(rstd[c]) : T(0);
    parallel.ranges(nodes, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t c = 0; c < width; c += lanes<T>) {
          T *to_u = u.data() + i * width + c, *to_v = v.data() + i * width + c;
          store(to_u, load(to_u) * load(factor.data() + c));
          store(to_v, load(to_v) * load(factor.data() + c));
        }
    });
  }

  static constexpr int64_t kRows = 256;
  int64_t nodes, width;
  Buffer<T> u, v;  // (batch, n, width), zeros beyond c_mid
};

// The first norm and activation: a1 less the cloud's pivot, leaky(gain h + shift) - pivot for a centred h in units
// of its deviation, without a difference of large numbers.
template <class T>
struct Activation {
  template <class Args>
  Activation(const Args& args, int64_t width)
      : width(width),
        gain(width),
        low_gain(width),
        offset(args.batch * width),
        shift(args.batch * width),
        above(args.batch * width),
        below(args.batch * width),
        pivot(args.batch * args.c_mid) {
    const double slope = args.negative_slope;
    const int64_t c_mid = args.c_mid;
    const T *gamma = args.first.gamma, *beta = args.first.beta;
    for (int64_t c = 0; c < width; ++c) {
      const double g = c >= c_mid ? 0.0 : gamma != nullptr ? double(gamma[c]) : 1.0;
      gain[c] = T(g), low_gain[c] = T(slope * g);
      for (int64_t b = 0; b < args.batch; ++b) {
        const double o = c >= c_mid ? 0.0 : args.saved.offset1[b * c_mid + c] * args.saved.rstd1[c];
        const double z = c >= c_mid ? 0.0 : g * o + (beta != nullptr ? double(beta[c]) : 0.0);
        const double a = z > 0 ? z : slope * z;
        offset[b * width + c] = T(o), shift[b * width + c] = T(z);
        above[b * width + c] = T(z - a), below[b * width + c] = T(slope * z - a);
        if (c < c_mid) pivot[b * c_mid + c] = a;
      }
    }
  }

  // The rows of a tile of cloud b, (edges.rows, width); u of the cloud, v from the tile's first node on.
  void rows(const EdgeList& edges, int64_t b, const T* u, const T* v, T* a) const {
    for (int64_t c = 0; c < width; c += lanes<T>) {
      const Vec<T> g = load(gain.data() + c), s = load(shift.data() + b * width + c),
                   low = load(low_gain.data() + c), up = load(above.data() + b * width + c),
                   down = load(below.data() + b * width + c);
      for (int64_t i = 0; i < edges.nodes; ++i) {
        const Vec<T> own = load(v + i * width + c);
        for (int64_t r = edges.start[i]; r < edges.start[i + 1]; ++r) {
          const Vec<T> h = load(u + edges.neighbour[r] * width + c) + own;
          store(a + r * width + c, h * g + s > T(0) ? h * g + up : h * low + down);
        }
      }
    }
  }

  int64_t width;
  Buffer<T> gain, low_gain;              // (width), zeros beyond c_mid, as in the rest
  Buffer<T> offset, shift, above, below;  // (batch, width)
  Buffer<double> pivot;                  // (batch, c_mid)
};

}  // namespace crosspoint::CROSSPOINT_ISA
