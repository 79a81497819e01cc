// What the forward and the backward of nt_xent share: normalised views in blocks, tiles of similarities,
// and the order in which the tiles are visited.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/contrast.h"
#include "crosspoint/nt_xent.h"
#include "exp2.h"
#include "gemm.h"

namespace crosspoint::CROSSPOINT_ISA {

inline constexpr int64_t tile = 96;  // rows of a block: a multiple of every Tile::rows and Tile::columns

template <class T>
inline void fill(T* out, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

// Summed in double, in an order that no instruction set changes.
template <class T>
inline double dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t lanes = 16;
  double partial[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t l = 0; l < lanes; ++l) partial[l] += double(a[i + l]) * double(b[i + l]);
  for (int64_t l = 0; i < n; ++i, ++l) partial[l] += double(a[i]) * double(b[i]);
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) partial[l] += partial[l + half];
  return partial[0];
}

// A scratch tile on a worker's stack; zeros, so that what lies beyond the last row is never undefined.
template <class T>
struct ScratchTile {
  alignas(64) T data[tile * tile] = {};
};

// Both views (or the one set), normalised, cut into blocks of `tile` rows: block b of view v is node
// v * blocks + b. A block is either all rows ("own") or none, so the columns are cut where the rows begin
// and end.
template <class T>
class Views {
 public:
  Views(const ContrastInput<T>& input, const Parallel& parallel)
      : Views(input.z2 == nullptr ? 1 : 2, input.samples, input.channels, input.first_row, input.rows) {
    normalise(parallel, [&](int64_t view, int64_t sample) {
      return (view == 0 ? input.z1 : input.z2) + sample * input.channels;
    });
  }
  // One set: the rows, then the columns that visit them.
  Views(const ContrastVisit<T>& input, const Parallel& parallel)
      : Views(1, input.rows + input.columns, input.channels, 0, input.rows) {
    normalise(parallel, [&](int64_t, int64_t sample) {
      return sample < input.rows ? input.z + sample * input.channels
                                 : input.visiting + (sample - input.rows) * input.channels;
    });
  }

  int64_t views() const { return views_; }
  int64_t blocks() const { return blocks_; }  // of a view
  int64_t nodes() const { return views_ * blocks_; }
  int64_t own_blocks() const { return own_end_ - own_begin_; }
  int64_t own_nodes() const { return views_ * own_blocks(); }
  // The i-th own block of the first view, and the i-th own node: those of the first view, then the second's.
  int64_t own_block(int64_t i) const { return own_begin_ + i; }
  int64_t own_node(int64_t i) const { return i / own_blocks() * blocks_ + own_block(i % own_blocks()); }
  bool own(int64_t node) const { return node % blocks_ >= own_begin_ && node % blocks_ < own_end_; }
  int64_t view(int64_t node) const { return node / blocks_; }
  int64_t channels() const { return channels_; }
  int64_t stride() const { return stride_; }
  int64_t samples() const { return samples_; }
  // First sample of a node, and number of its samples.
  int64_t first(int64_t node) const {
    const int64_t block = node % blocks_;
    if (block < own_begin_) return block * tile;
    if (block < own_end_) return first_row_ + (block - own_begin_) * tile;
    return end_row_ + (block - own_end_) * tile;
  }
  int64_t count(int64_t node) const {
    const int64_t block = node % blocks_;
    const int64_t end = block < own_begin_ ? first_row_ : block < own_end_ ? end_row_ : samples_;
    return std::min(tile, end - first(node));
  }
  // Where the rows of an own node stand among the rows of its view.
  int64_t first_row(int64_t node) const { return first(node) - first_row_; }
  // The rows of a node: count x channels, `stride` apart, zeros beyond the last channel.
  const T* rows(int64_t node) const { return rows_.data() + node * tile * stride_; }
  // Their lengths before normalisation.
  const double* norms(int64_t node) const { return norms_.data() + node * tile; }
  // channels x tile, zeros beyond the last row.
  const T* transposed(int64_t node) const { return transposed_.data() + node * tile * channels_; }

  // Cosine of row i of node a with row j of node b.
  double cosine(int64_t a, int64_t i, int64_t b, int64_t j) const {
    return dot(rows(a) + i * stride_, rows(b) + j * stride_, channels_);
  }

  // Cosines of the rows of node a with the rows of node b, times `scale`.
  void similarities(int64_t a, int64_t b, T scale, T* out) const {
    constexpr int64_t R = Tile<T>::rows, W = Tile<T>::columns;
    const T *left = transposed(a), *right = transposed(b);
    const int64_t rows = count(a), columns = count(b);
    for (int64_t j = 0; j < columns; j += W) {
      // Of a symmetric tile, only what reaches the upper triangle.
      const int64_t last = a == b ? std::min(rows, j + W) : rows;
      for (int64_t i = 0; i < last; i += R) {
        Vec<T> acc[R][Tile<T>::vectors];
        clear<T>(acc);
        multiply_tile<1>(channels_, left + i, tile, right + j, tile, acc);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) acc[r][0] *= splat(scale), acc[r][1] *= splat(scale);
        store_tile<T>(acc, out + i * tile + j, tile, R, W, false);
      }
    }
    if (a == b)
      for (int64_t i = 1; i < rows; ++i)
        for (int64_t j = 0; j < i; ++j) out[i * tile + j] = out[j * tile + i];
  }

 private:
  Views(int64_t views, int64_t samples, int64_t channels, int64_t first_row, int64_t rows)
      : views_(views),
        samples_(samples),
        channels_(channels),
        first_row_(first_row),
        end_row_(first_row + rows),
        own_begin_(blocks_of(first_row_)),
        own_end_(own_begin_ + blocks_of(rows)),
        blocks_(own_end_ + blocks_of(samples_ - end_row_)),
        stride_((channels_ + Tile<T>::columns - 1) / Tile<T>::columns * Tile<T>::columns),
        rows_(nodes() * tile * stride_),
        transposed_(nodes() * tile * channels_),
        norms_(nodes() * tile) {}

  static int64_t blocks_of(int64_t samples) { return (samples + tile - 1) / tile; }

  // source(view, sample): its row.
  template <class F>
  void normalise(const Parallel& parallel, F&& source) {
    parallel.ranges(nodes(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t node = begin; node < end; ++node)
        normalise_node(node, [&](int64_t i) { return source(view(node), first(node) + i); });
    });
  }

  template <class F>
  void normalise_node(int64_t node, F&& source_of) {
    for (int64_t i = 0; i < count(node); ++i) {
      const T* source = source_of(i);
      T* target = rows_.data() + (node * tile + i) * stride_;
      const double norm = std::sqrt(dot(source, source, channels_));
      const double inverse = 1 / std::max(norm, shortest);
      for (int64_t c = 0; c < channels_; ++c) target[c] = T(source[c] * inverse);
      fill(target + channels_, stride_ - channels_, T(0));
      norms_[node * tile + i] = norm;
    }
    pack_panel(Strided<T>{rows(node), stride_, 1}, count(node), channels_, tile,
               transposed_.data() + node * tile * channels_);
  }

  int64_t views_, samples_, channels_, first_row_, end_row_, own_begin_, own_end_, blocks_, stride_;
  Buffer<T> rows_;
  Buffer<T> transposed_;
  Buffer<double> norms_;
};

// The tiles of own rows against own columns, as tasks: all tiles of a group of own nodes with another group
// (or with itself), in rounds. A group is in exactly one task of a round: the tasks of a round touch different
// rows, and a row sees its tiles in the same order whatever the number of threads.
class Rounds {
 public:
  Rounds(int64_t blocks, int64_t views, bool within_views)
      : nodes_(blocks * views),
        // Larger groups re-use a node while it is in the cache, smaller ones occupy more threads.
        members_(std::max<int64_t>(1, std::min<int64_t>(4, nodes_ / 20))),
        within_views_(within_views),
        // Across views, groups keep to a view; within them, round r pairs a with b where a + b = r modulo the
        // number of groups, which is even.
        groups_of_view_((blocks + members_ - 1) / members_),
        groups_(within_views ? ((nodes_ + members_ - 1) / members_ + 1) / 2 * 2 : 2 * groups_of_view_),
        blocks_(blocks),
        done_(groups_) {
    fill(done_.data(), groups_, int64_t(0));
  }

  // For every pair (a, b) of own nodes, a <= b where the matrix is symmetric: compute(a, b, scratch) at any
  // time, then merge(a, b, scratch) when a and b have finished their earlier rounds; only merge may write to
  // what belongs to the rows of a and b.
  template <class MakeScratch, class Compute, class Merge>
  void run(const Parallel& parallel, MakeScratch&& make_scratch, Compute&& compute, Merge&& merge) {
    const int64_t half = groups_ / 2;
    const int64_t slots = within_views_ ? half + 1 : half, rounds = within_views_ ? groups_ : half;
    parallel.items(rounds * slots, make_scratch, [&](int64_t position, auto& scratch) {
      const int64_t round = position / slots, slot = position % slots;
      int64_t first = slot, second = half + (slot + round) % half;
      if (within_views_) {
        if (round % 2 == 1 && slot == half) return;
        const int64_t a = ((round + 1) / 2 + slot) % groups_, b = (round / 2 - slot + groups_) % groups_;
        first = std::min(a, b), second = std::max(a, b);
      }
      bool waiting = true;
      for (int64_t i = 0; i < size(first); ++i) {
        const int64_t from = first == second ? i : 0, a = node(first, i);
        for (int64_t j = from; j < size(second); ++j) {
          // There and back, so that the last node of a line is the first of the next.
          const int64_t b = node(second, i % 2 == 0 ? j : size(second) - 1 - j + from);
          compute(a, b, scratch);
          if (waiting) wait(round, first, second);
          waiting = false;
          merge(a, b, scratch);
        }
      }
      if (waiting) wait(round, first, second);  // there are no tiles with the empty group that makes them even
      __atomic_store_n(done_.data() + first, round + 1, __ATOMIC_RELEASE);
      __atomic_store_n(done_.data() + second, round + 1, __ATOMIC_RELEASE);
    });
  }

 private:
  // Groups of nodes, numbered as own nodes; across views, those of the second view start anew.
  int64_t start(int64_t group) const {
    const bool second_view = !within_views_ && group >= groups_of_view_;
    return second_view ? blocks_ + (group - groups_of_view_) * members_ : group * members_;
  }
  int64_t size(int64_t group) const {
    const int64_t end = within_views_ || group >= groups_of_view_ ? nodes_ : blocks_;
    return std::max<int64_t>(0, std::min(members_, end - start(group)));
  }
  int64_t node(int64_t group, int64_t i) const { return start(group) + i; }

  // Tasks are handed out in order, so those that this waits for are already running.
  void wait(int64_t round, int64_t first, int64_t second) const {
    for (int64_t group : {first, second})
      for (int spins = 0; __atomic_load_n(done_.data() + group, __ATOMIC_ACQUIRE) < round; ++spins)
        if (spins > 256) sched_yield();
  }

  int64_t nodes_, members_;
  bool within_views_;
  int64_t groups_of_view_, groups_, blocks_;
  Buffer<int64_t> done_;
};

// Tiles of own rows with the columns that are no rows: compute and merge as for visit_tiles. Several rows at a time re-use a column while it is in the cache.
template <class T, class MakeScratch, class Compute, class Merge>
void visit_other_columns(const Views<T>& views, bool within_views, const Parallel& parallel,
                         MakeScratch&& make_scratch, Compute&& compute, Merge&& merge) {
  const int64_t own = views.own_nodes();
  if (views.own_blocks() == views.blocks()) return;
  const int64_t members = std::max<int64_t>(1, std::min<int64_t>(4, own / 20));
  parallel.items((own + members - 1) / members, make_scratch, [&](int64_t group, auto& scratch) {
    const int64_t begin = group * members, end = std::min(own, begin + members);
    for (int64_t b = 0; b < views.nodes(); ++b) {
      if (views.own(b)) continue;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t a = views.own_node(i);
        if (!within_views && views.view(a) == views.view(b)) continue;
        compute(a, b, scratch);
        merge(a, b, false, scratch);
      }
    }
  });
}

// All tiles of own rows: compute(a, b, scratch), then merge(a, b, mutual, scratch), which adds the tile to the
// rows of a and, if mutual, to those of b too, whose tile with a is not visited.
template <class T, class MakeScratch, class Compute, class Merge>
void visit_tiles(const Views<T>& views, bool within_views, const Parallel& parallel,
                 MakeScratch&& make_scratch, Compute&& compute, Merge&& merge) {
  const int64_t own = views.own_nodes();
  if (own == 0) return;
  Rounds(views.own_blocks(), views.views(), within_views)
      .run(
          parallel, make_scratch,
          [&](int64_t a, int64_t b, auto& scratch) {
            compute(views.own_node(a), views.own_node(b), scratch);
          },
          [&](int64_t a, int64_t b, auto& scratch) {
            merge(views.own_node(a), views.own_node(b), a != b, scratch);
          });
  visit_other_columns(views, within_views, parallel, make_scratch, compute, merge);
}

}  // namespace crosspoint::CROSSPOINT_ISA
