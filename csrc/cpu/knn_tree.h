// Few coordinates, many points: points in the order of a space-filling curve, in leaves under a hierarchy of
// boxes. Leaves that cannot hold one of the k nearest are left out. The distance to a box takes the same
// operations in the same order as the distance to a point, each of them monotone under rounding, so that it
// never exceeds the computed distance to any point inside: what is left out is left out exactly.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "crosspoint/knn.h"
#include "knn_distance.h"

namespace crosspoint::CROSSPOINT_ISA {

inline constexpr int64_t kAxes = 3;
inline constexpr int64_t kLeaf = 32;         // points of a leaf, queries of a group
inline constexpr int64_t kFan = 16;          // boxes under a box
inline constexpr int64_t kLevels = 8;        // enough for 32 * 16^7 points
inline constexpr int64_t kTreeLeast = 2048;  // points from which the hierarchy pays
inline constexpr int64_t kTreeMostNeighbours = 64;

// Offsets into the workspaces of one cloud: values, and indices.
struct TreeLayout {
  int64_t leaves[kLevels];  // boxes of each level, leaves first
  int64_t levels;
  int64_t points, boxes[kLevels],
      values;                     // (leaf, axis, kLeaf); per level (2, kAxes, boxes), lower corners first
  int64_t ids, queries, indices;  // the points' order; the queries' order, where they are another set

  TreeLayout(int64_t n, int64_t m, bool other_set) {
    leaves[0] = std::max<int64_t>(1, (n + kLeaf - 1) / kLeaf);
    points = 0;
    int64_t at = leaves[0] * kAxes * kLeaf;
    for (levels = 0; levels < kLevels; ++levels) {
      if (levels > 0) leaves[levels] = (leaves[levels - 1] + kFan - 1) / kFan;
      boxes[levels] = at;
      at += 2 * kAxes * round_up(leaves[levels], kFan);
      if (leaves[levels] <= kFan) break;
    }
    ++levels;
    values = at;
    ids = 0;
    queries = leaves[0] * kLeaf;
    indices = queries + (other_set ? m : 0);
  }

  int64_t stride(int64_t level) const { return round_up(leaves[level], kFan); }
};

// ---- order

struct Placed {
  uint32_t code;
  int32_t index;
};

// Spreads 10 bits to every third place.
inline uint32_t spread(uint32_t x) {
  x = (x | x << 16) & 0x030000ff;
  x = (x | x << 8) & 0x0300f00f;
  x = (x | x << 4) & 0x030c30c3;
  return (x | x << 2) & 0x09249249;
}

template <class T>
struct Frame {
  T low[kAxes], scale[kAxes];

  Frame(const T* points, int64_t n, int64_t channels) {
    for (int64_t c = 0; c < kAxes; ++c) {
      T least = 0, most = 0;
      if (c < channels && n > 0) {
        least = most = points[c];
        for (int64_t i = 1; i < n; ++i) {
          const T x = points[i * channels + c];
          least = x < least ? x : least;
          most = x > most ? x : most;
        }
      }
      low[c] = least;
      const T extent = most - least;
      scale[c] = extent > 0 ? std::min(T(1024) / extent, std::numeric_limits<T>::max()) : T(0);
    }
  }

  uint32_t code(const T* point, int64_t channels) const {
    uint32_t code = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T cell = (point[c] - low[c]) * scale[c];
      const T kept = cell > 0 ? (cell < 1023 ? cell : T(1023)) : T(0);  // 0 for NaN
      code |= spread(static_cast<uint32_t>(kept)) << c;
    }
    return code;
  }
};

// Sorts what came in order of index by (code, index); `spare` is as large.
inline void sort_placed(Placed* placed, Placed* spare, int64_t n) {
  constexpr int bits = 10, size = 1 << bits;
  Buffer<int32_t> start(3 * size);
  std::fill_n(start.data(), 3 * size, 0);
  for (int64_t i = 0; i < n; ++i)
    for (int pass = 0; pass < 3; ++pass) ++start[pass * size + (placed[i].code >> pass * bits & (size - 1))];
  for (int pass = 0; pass < 3; ++pass) {
    int32_t* next = start.data() + pass * size;
    for (int32_t digit = 0, total = 0; digit < size; ++digit) {
      const int32_t count = next[digit];
      next[digit] = total;
      total += count;
    }
    for (int64_t i = 0; i < n; ++i) spare[next[placed[i].code >> pass * bits & (size - 1)]++] = placed[i];
    std::swap(placed, spare);
  }
  std::copy_n(placed, n, spare);  // an odd number of passes: the result is where the spare was
}

// Halves points that share a cell of the frame, along their longest side, until a leaf holds them or they
// coincide.
template <class T>
inline void split_cell(const T* points, int64_t channels, Placed* first, int64_t n) {
  while (n > kLeaf) {
    int64_t axis = 0;
    T longest = 0;
    for (int64_t c = 0; c < channels; ++c) {
      T least = points[first[0].index * channels + c], most = least;
      for (int64_t i = 1; i < n; ++i) {
        const T x = points[first[i].index * channels + c];
        least = x < least ? x : least;
        most = x > most ? x : most;
      }
      if (most - least > longest) {
        longest = most - least;
        axis = c;
      }
    }
    if (!(longest > 0)) return;
    const int64_t half = round_up(n / 2, kLeaf);
    std::nth_element(first, first + half, first + n, [=](const Placed& a, const Placed& b) {
      return precedes(points[a.index * channels + axis], a.index, points[b.index * channels + axis], b.index);
    });
    split_cell(points, channels, first + half, n - half);
    n = half;
  }
}

template <class T>
inline void place(const T* points, int64_t n, int64_t channels, const Frame<T>& frame, int32_t* ids) {
  Buffer<Placed> placed(2 * n);
  for (int64_t i = 0; i < n; ++i)
    placed[i] = {frame.code(points + i * channels, channels), static_cast<int32_t>(i)};
  sort_placed(placed.data(), placed.data() + n, n);
  for (int64_t begin = 0, end; begin < n; begin = end) {
    for (end = begin + 1; end < n && placed[end].code == placed[begin].code;) ++end;
    split_cell(points, channels, placed.data() + begin, end - begin);
  }
  for (int64_t i = 0; i < n; ++i) ids[i] = placed[i].index;
}

// ---- the cloud

template <class T>
struct TreeCloud {
  const T* points;     // the leaves
  const T* values;     // the workspace that the layout's offsets count from
  const int32_t* ids;  // which point stands where in the leaves
  const int32_t* queries;
  TreeLayout layout;  // of this cloud's own size
  Frame<T> frame;
  bool usable;  // every coordinate is finite
};

template <class T>
inline bool all_finite(const T* x, int64_t n) {
  Vec<T> sum = {};  // 0 * x is NaN where x is not finite
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) sum += load(x + i) * splat(T(0));
  T rest = 0;
  for (; i < n; ++i) rest += x[i] * T(0);
  for (int lane = 0; lane < lanes<T>; ++lane) rest += sum[lane];
  return rest == T(0);
}

// Bounds of `count` boxes by kFan each.
template <class T>
inline void bound_boxes(const T* below, int64_t stride_below, int64_t count_below, T* boxes, int64_t stride) {
  for (int64_t b = 0; b * kFan < count_below; ++b)
    for (int64_t c = 0; c < kAxes; ++c) {
      T low = infinity<T>, high = -infinity<T>;
      for (int64_t i = b * kFan; i < std::min(count_below, (b + 1) * kFan); ++i) {
        low = std::min(low, below[c * stride_below + i]);
        high = std::max(high, below[(kAxes + c) * stride_below + i]);
      }
      boxes[c * stride + b] = low;
      boxes[(kAxes + c) * stride + b] = high;
    }
}

// `query` is null where the queries are the points.
template <class T>
inline TreeCloud<T> plant_tree(const T* points, int64_t n, const T* query, int64_t m, int64_t channels,
                               T* values, int32_t* indices) {
  const TreeLayout layout(n, m, query != nullptr);
  const Frame<T> frame(points, n, channels);
  TreeCloud<T> cloud{
      values + layout.points, values, indices + layout.ids, indices + layout.queries, layout, frame, false};
  cloud.usable = all_finite(points, n * channels) && (query == nullptr || all_finite(query, m * channels));
  if (!cloud.usable) return cloud;
  int32_t* ids = indices + layout.ids;
  place(points, n, channels, frame, ids);
  if (query != nullptr) place(query, m, channels, frame, indices + layout.queries);
  T* boxes = values + layout.boxes[0];
  const int64_t stride = layout.stride(0);
  for (int64_t leaf = 0; leaf < layout.leaves[0]; ++leaf)
    for (int64_t c = 0; c < kAxes; ++c) {
      T* line = values + layout.points + (leaf * kAxes + c) * kLeaf;
      T low = infinity<T>, high = -infinity<T>;
      const int64_t here = std::min(kLeaf, n - leaf * kLeaf);
      for (int64_t i = 0; i < here; ++i) {
        const T x = c < channels ? points[ids[leaf * kLeaf + i] * channels + c] : T(0);
        line[i] = x;
        low = std::min(low, x);
        high = std::max(high, x);
      }
      std::fill(line + std::max<int64_t>(here, 0), line + kLeaf, missing<T>);
      boxes[c * stride + leaf] = low;
      boxes[(kAxes + c) * stride + leaf] = high;
    }
  for (int64_t level = 1; level < layout.levels; ++level)
    bound_boxes(values + layout.boxes[level - 1], layout.stride(level - 1), layout.leaves[level - 1],
                values + layout.boxes[level], layout.stride(level));
  return cloud;
}

// ---- search

template <class T>
struct Box {
  T low[kAxes], high[kAxes];
};

// Which of the kFan boxes at `boxes` come as near to `from` as `bound`; their squared distances are left in
// `dist2`.
template <class T>
inline uint64_t near_boxes(const T* boxes, int64_t stride, const Box<T>& from, T bound, T* dist2) {
  uint64_t near = 0;
  for (int64_t v = 0; v < kFan; v += lanes<T>) {
    Vec<T> sum = {};
#pragma GCC unroll 3
    for (int64_t c = 0; c < kAxes; ++c) {
      const Vec<T> before = load(boxes + c * stride + v) - splat(from.high[c]);
      const Vec<T> after = splat(from.low[c]) - load(boxes + (kAxes + c) * stride + v);
      sum = add_square<T>(sum, max(max(before, after), Vec<T>{}));
    }
    store(dist2 + v, sum);
    near |= lanes_up_to(dist2 + v, bound) << v;
  }
  return near;
}

// Searches groups of queries of one cloud; one per thread.
template <class T>
class TreeSearch {
 public:
  TreeSearch(int64_t k, int64_t channels, int64_t candidates)
      : k_(k),
        channels_(channels),
        first_leaves_(std::max<int64_t>(3, 2 * (k + 1) / kLeaf + 2)),
        nearest_(k, kBatch * kLeaf),
        row_(std::max(kBatch, first_leaves_) * kLeaf),
        list_((candidates + kLeaf - 1) / kLeaf),
        list_stride_(round_up((candidates + kLeaf - 1) / kLeaf, kFan)),
        list_boxes_(2 * kAxes * list_stride_) {}

  // The queries in places [first, first + count) of their order, count <= kLeaf; idx and dist2 are the
  // cloud's.
  void run(const T* query, const TreeCloud<T>& cloud, int64_t first, int64_t count, Self self, int64_t* idx,
           T* dist2) {
    const bool own_set = self != Self::other_set;
    const int32_t* order = (own_set ? cloud.ids : cloud.queries) + first;
    Box<T> from[kLeaf], all;
    for (int64_t c = 0; c < kAxes; ++c) {
      all.low[c] = infinity<T>;
      all.high[c] = -infinity<T>;
      for (int64_t q = 0; q < count; ++q) {
        const T x = c < channels_ ? query[order[q] * channels_ + c] : T(0);
        from[q].low[c] = from[q].high[c] = x;
        all.low[c] = std::min(all.low[c], x);
        all.high[c] = std::max(all.high[c], x);
      }
    }
    const int64_t own_leaf =
        own_set ? first / kLeaf : nearest_leaf(query + order[count / 2] * channels_, cloud);
    T limit[kLeaf], furthest = 0;
    for (int64_t q = 0; q < count; ++q) {
      limit[q] = first_bound(cloud, own_leaf, from[q], k_ + (self == Self::left_out));
      furthest = std::max(furthest, limit[q]);
    }
    listed_ = 0;
    const int64_t top = cloud.layout.levels - 1;
    list_leaves(cloud, top, 0, all, furthest);
    for (int64_t i = 0; i < listed_; ++i)
      for (int64_t side = 0; side < 2 * kAxes; ++side)
        list_boxes_[side * list_stride_ + i] =
            cloud.values[cloud.layout.boxes[0] + side * cloud.layout.stride(0) + list_[i]];
    for (int64_t q = 0; q < count; ++q) {
      search_list(cloud, from[q], limit[q], own_set ? own_leaf : -1, q, self);
      nearest_.write(idx + order[q] * k_, dist2 == nullptr ? nullptr : dist2 + order[q] * k_);
    }
  }

 private:
  static constexpr int64_t kBatch = 16;  // leaves whose distances are looked through together

  // The last leaf that starts before the point, in the order of the curve.
  int64_t nearest_leaf(const T* point, const TreeCloud<T>& cloud) const {
    const uint32_t code = cloud.frame.code(point, channels_);
    int64_t low = 0, high = cloud.layout.leaves[0];
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      T start[kAxes];
      for (int64_t c = 0; c < kAxes; ++c) start[c] = cloud.points[(middle * kAxes + c) * kLeaf];
      (cloud.frame.code(start, channels_) <= code ? low : high) = middle;
    }
    return low;
  }

  // A bound of the count-th distance, from the leaves around one.
  T first_bound(const TreeCloud<T>& cloud, int64_t leaf, const Box<T>& from, int64_t count) {
    const int64_t leaves = cloud.layout.leaves[0], taken = std::min(leaves, first_leaves_);
    const int64_t begin = std::clamp<int64_t>(leaf - taken / 2, 0, leaves - taken);
    distances(cloud, begin, taken, from, row_.data());
    return bound_of_kth(row_.data(), taken * kLeaf, count);
  }

  void distances(const TreeCloud<T>& cloud, int64_t leaf, int64_t count, const Box<T>& from, T* out) const {
    const T* points = cloud.points + leaf * kAxes * kLeaf;
    for (int64_t i = 0; i < count; ++i, points += kAxes * kLeaf, out += kLeaf) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < kLeaf; v += lanes<T>) {
        Vec<T> sum = {};
#pragma GCC unroll 3
        for (int64_t c = 0; c < kAxes; ++c)
          sum = add_square<T>(sum, load(points + c * kLeaf + v) - splat(from.low[c]));
        store(out + v, sum);
      }
    }
  }

  void list_leaves(const TreeCloud<T>& cloud, int64_t level, int64_t first, const Box<T>& from, T bound) {
    const TreeLayout& layout = cloud.layout;
    T dist2[kFan];
    uint64_t near =
        near_boxes(cloud.values + layout.boxes[level] + first, layout.stride(level), from, bound, dist2);
    near &= (uint64_t(1) << std::min(kFan, layout.leaves[level] - first)) - 1;
    for (; near != 0; near &= near - 1) {
      const int64_t box = first + __builtin_ctzll(near);
      if (level == 0)
        list_[listed_++] = static_cast<int32_t>(box);
      else
        list_leaves(cloud, level - 1, box * kFan, from, bound);
    }
  }

  void search_list(const TreeCloud<T>& cloud, const Box<T>& from, T limit, int64_t own_leaf,
                   int64_t own_place, Self self) {
    int32_t batch[kBatch];
    int64_t batched = 0;
    const auto flush = [&] {
      nearest_.offer(
          row_.data(), batched * kLeaf,
          [&](int32_t p) { return cloud.ids[batch[p / kLeaf] * kLeaf + p % kLeaf]; }, limit);
      batched = 0;
      if (nearest_.last_index() >= 0) limit = std::min(limit, nearest_.last_value());
    };
    nearest_.clear();
    for (int64_t i = 0; i < listed_; i += kFan) {
      T dist2[kFan];
      uint64_t near = near_boxes(list_boxes_.data() + i, list_stride_, from, limit, dist2);
      near &= (uint64_t(1) << std::min(kFan, listed_ - i)) - 1;
      for (; near != 0; near &= near - 1) {
        const int place = __builtin_ctzll(near);
        const int32_t leaf = list_[i + place];
        if (dist2[place] >= limit && !improves(cloud, leaf, dist2[place], limit)) continue;
        T* row = row_.data() + batched * kLeaf;
        distances(cloud, leaf, 1, from, row);
        if (leaf == own_leaf) row[own_place] = self == Self::first ? T(-1) : missing<T>;
        batch[batched++] = leaf;
        if (batched == kBatch) flush();
      }
    }
    flush();
  }

  // Whether a leaf as far as the k-th nearest holds a lower index than that one's: among many duplicates few
  // do.
  bool improves(const TreeCloud<T>& cloud, int32_t leaf, T dist2, T limit) const {
    if (dist2 > limit) return false;
    const int32_t last = nearest_.last_index();
    if (last < 0 || nearest_.last_value() > limit) return true;
    for (int64_t i = 0; i < kLeaf; ++i)
      if (cloud.ids[leaf * kLeaf + i] < last) return true;
    return false;
  }

  int64_t k_, channels_, first_leaves_;
  Nearest<T, false> nearest_;
  Buffer<T> row_;
  Buffer<int32_t> list_;
  int64_t listed_ = 0, list_stride_;
  Buffer<T> list_boxes_;
};

}  // namespace crosspoint::CROSSPOINT_ISA
