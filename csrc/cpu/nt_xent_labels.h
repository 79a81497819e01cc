// The positives of rows with labels: how many, which where there is one, and which entries of a tile.
#pragma once

#include "nt_xent_tiles.h"

namespace crosspoint::CROSSPOINT_ISA {

// An integer as wide as T, so that labels are compared as entries are added.
template <class T>
struct SameWidth;
template <>
struct SameWidth<float> {
  using type = int32_t;
};
template <>
struct SameWidth<double> {
  using type = int64_t;
};

template <class T>
class Labels {
 public:
  using Int = typename SameWidth<T>::type;

  // Of a single set; without labels, empty.
  Labels(const ContrastInput<T>& input, const Views<T>& views, const Parallel& parallel) {
    if (input.labels == nullptr) return;
    const int64_t nodes = views.nodes();
    labels_.resize(nodes * tile);
    counts_.resize(nodes * tile);
    partners_.resize(nodes * tile);
    for (int64_t node = 0; node < nodes; ++node) {
      Int* target = labels_.data() + node * tile;
      for (int64_t i = 0; i < views.count(node); ++i) target[i] = Int(input.labels[views.first(node) + i]);
      fill(target + views.count(node), tile - views.count(node), Int(-1));
    }
    parallel.ranges(views.own_nodes(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t own = begin; own < end; ++own) {
        const int64_t node = views.own_node(own);
        for (int64_t i = 0; i < views.count(node); ++i) count(node * tile + i, nodes * tile);
      }
    });
  }

  const Int* of(int64_t node) const { return labels_.data() + node * tile; }
  // Of row i of an own node: its positives, and where the last of them stands, as node * tile + row.
  int64_t count(int64_t node, int64_t i) const { return counts_[node * tile + i]; }
  int64_t partner(int64_t node, int64_t i) const { return partners_[node * tile + i]; }

 private:
  void count(int64_t row, int64_t size) {
    constexpr int64_t L = lanes<T>;
    const Vec<Int> own = splat(labels_[row]);
    Vec<Int> found{}, place{}, here;
    for (int64_t l = 0; l < L; ++l) here[l] = Int(l);
    for (int64_t j = 0; j < size; j += L) {
      const Vec<Int> same = Vec<Int>(load(labels_.data() + j) == own) & Vec<Int>(here != splat(Int(row)));
      found -= same;
      place = max(place, Vec<Int>(here & same));
      here += splat(Int(L));
    }
    int64_t count = 0, partner = 0;
    for (int64_t l = 0; l < L; ++l) {
      count += found[l];
      partner = std::max(partner, int64_t(place[l]));
    }
    counts_[row] = count;
    partners_[row] = partner;
  }

  Buffer<Int> labels_;
  Buffer<int64_t> counts_, partners_;
};

// The rows that the loss averages: those that have a positive.
template <class T>
inline int64_t rows_with_positives(const T* row_lse, int64_t rows) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) count += row_lse[i] != std::numeric_limits<T>::infinity();
  return count;
}

// What the positives of one tile add to the sums of its rows and columns.
template <class T>
struct PositiveTile {
  ScratchTile<T> entries;
  T row_total[tile];
  alignas(64) T column_total[tile];

  // Moves the positives out of x, leaving `lowest` there and here wherever the other has the entry; whether
  // there are any.
  template <class Int>
  bool take(T* x, int64_t rows, int64_t columns, const Int* row_labels, const Int* column_labels) {
    constexpr int64_t L = lanes<T>;
    const Vec<T> lowest = splat(std::numeric_limits<T>::lowest());
    Vec<Int> any{};
    for (int64_t j = 0; j < columns; j += L) store(column_total + j, Vec<T>{});
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<Int> label = splat(row_labels[i]);
      Vec<T> total{};
      for (int64_t j = 0; j < columns; j += L) {
        const Vec<T> entry = load(x + i * tile + j);
        // A row itself is excluded already.
        const Vec<Int> positive = Vec<Int>(load(column_labels + j) == label) & Vec<Int>(entry != lowest);
        const Vec<T> kept = positive ? entry : Vec<T>{};
        any |= positive;
        total += kept;
        store(column_total + j, load(column_total + j) + kept);
        store(entries.data + i * tile + j, positive ? entry : lowest);
        store(x + i * tile + j, positive ? lowest : entry);
      }
      row_total[i] = 0;
      for (int64_t l = 0; l < L; ++l) row_total[i] += total[l];
    }
    bool found = false;
    for (int64_t l = 0; l < L; ++l) found = found || any[l] != 0;
    return found;
  }
};

}  // namespace crosspoint::CROSSPOINT_ISA
