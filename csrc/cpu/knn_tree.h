// Few coordinates, many points: points in the order of a space-filling curve, in leaves under a hierarchy of
// boxes. Leaves that cannot hold one of the k nearest are left out. The distance to a box takes the same
// operations in the same order as the distance to a point, each of them monotone under rounding, so that it
// never exceeds the computed distance to any point inside: what is left out is left out exactly.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/curve.h"
#include "crosspoint/knn.h"
#include "knn_distance.h"

namespace crosspoint::CROSSPOINT_ISA {

inline constexpr int64_t kAxes = 3;
inline constexpr int64_t kLeaf = 32;   // points of a leaf, queries of a group
inline constexpr int64_t kFan = 16;    // boxes under a box
inline constexpr int64_t kLevels = 8;  // enough for 32 * 16^7 points
inline constexpr int64_t kTreeMostNeighbours = 64;
inline constexpr int64_t kTreeLeast = 2048;             // points from which the hierarchy pays: as many,
inline constexpr int64_t kTreeLeastPerNeighbour = 128;  // and as many for each neighbour
inline constexpr int64_t kCellPoints =
    512;  // about as many, or up to twice, go by halving instead of the curve

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

// Cubic cells over the cloud, 1024 to a side.
template <class T>
struct Frame {
  T low[kAxes], scale = 0;

  Frame(const T* points, int64_t n, int64_t channels) {
    T extent = 0;
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
      extent = std::max(extent, most - least);
    }
    if (extent > 0) scale = std::min(T(1024) / extent, std::numeric_limits<T>::max());
  }

  uint32_t code(const T* point, int64_t channels) const {
    uint32_t code = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T cell = (point[c] - low[c]) * scale;
      const T kept = cell > 0 ? (cell < 1023 ? cell : T(1023)) : T(0);  // 0 for NaN
      code |= spread(static_cast<uint32_t>(kept)) << c;
    }
    return code;
  }
};

template <class T>
struct Place {
  T at[kAxes];
  int32_t index;
};

// Halves points along the longest side of their box until a leaf holds them or they coincide. Halves end
// where leaves do, given that the first point stands in place `begin` of the whole.
template <class T>
inline void halve(Place<T>* first, int64_t n, int64_t begin) {
  while (n > kLeaf) {
    T low[kAxes], high[kAxes];
    for (int64_t c = 0; c < kAxes; ++c) low[c] = high[c] = first[0].at[c];
    for (int64_t i = 1; i < n; ++i)
      for (int64_t c = 0; c < kAxes; ++c) {
        low[c] = std::min(low[c], first[i].at[c]);
        high[c] = std::max(high[c], first[i].at[c]);
      }
    int64_t axis = 0;
    for (int64_t c = 1; c < kAxes; ++c)
      if (high[c] - low[c] > high[axis] - low[axis]) axis = c;
    const int64_t half = round_up(begin + n / 2, kLeaf) - begin;
    if (!(high[axis] > low[axis]) || half >= n) return;
    std::nth_element(first, first + half, first + n, [axis](const Place<T>& a, const Place<T>& b) {
      return precedes(a.at[axis], a.index, b.at[axis], b.index);
    });
    halve(first + half, n - half, begin + half);
    n = half;
  }
}

// Writes an order of the points in which neighbours are close to each other: by the curve through coarse
// cells, then by halving what is in a cell.
template <class T>
inline void order_points(const T* points, int64_t n, int64_t channels, const Frame<T>& frame,
                         const Parallel& parallel, int32_t* ids) {
  int bits = 0;
  while (bits < 12 && n >> (bits + 1) >= kCellPoints) ++bits;
  const int64_t cells = int64_t(1) << bits;
  Buffer<int32_t> cell(n), start(cells + 1);
  std::fill_n(start.data(), cells + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    cell[i] = static_cast<int32_t>(frame.code(points + i * channels, channels) >> (30 - bits));
    ++start[cell[i] + 1];
  }
  for (int64_t c = 0; c < cells; ++c) start[c + 1] += start[c];
  Buffer<Place<T>> places(n);
  {
    Buffer<int32_t> next(cells);
    std::copy_n(start.data(), cells, next.data());
    for (int64_t i = 0; i < n; ++i) {
      Place<T>& place = places[next[cell[i]]++];
      for (int64_t c = 0; c < kAxes; ++c) place.at[c] = c < channels ? points[i * channels + c] : T(0);
      place.index = static_cast<int32_t>(i);
    }
  }
  parallel.items(
      cells, [] { return 0; },
      [&](int64_t c, int) {
        halve(places.data() + start[c], start[c + 1] - start[c], start[c]);
        for (int64_t i = start[c]; i < start[c + 1]; ++i) ids[i] = places[i].index;
      });
}

// ---- the cloud

template <class T>
struct TreeCloud {
  const T* points;     // the leaves
  const T* values;     // the workspace that the layout's offsets count from
  const int32_t* ids;  // which point stands where in the leaves
  const int32_t* queries;
  TreeLayout layout;  // of this cloud's own size
  bool usable;        // every coordinate is finite

  const T* boxes(int64_t level) const { return values + layout.boxes[level]; }
};

// The boxes around kFan boxes each of the level below.
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
                               const Parallel& parallel, T* values, int32_t* indices) {
  const TreeLayout layout(n, m, query != nullptr);
  TreeCloud<T> cloud{values + layout.points,   values, indices + layout.ids,
                     indices + layout.queries, layout, false};
  cloud.usable = all_finite(points, n * channels) && (query == nullptr || all_finite(query, m * channels));
  if (!cloud.usable) return cloud;
  const Frame<T> frame(points, n, channels);
  int32_t* ids = indices + layout.ids;
  order_points(points, n, channels, frame, parallel, ids);
  if (query != nullptr) order_points(query, m, channels, frame, parallel, indices + layout.queries);
  T* boxes = values + layout.boxes[0];
  const int64_t stride = layout.stride(0);
  parallel.ranges(layout.leaves[0], 64, [&](int64_t begin, int64_t end) {
    for (int64_t leaf = begin; leaf < end; ++leaf)
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
        std::fill(line + here, line + kLeaf, missing<T>);
        boxes[c * stride + leaf] = low;
        boxes[(kAxes + c) * stride + leaf] = high;
      }
  });
  for (int64_t level = 1; level < layout.levels; ++level)
    bound_boxes(values + layout.boxes[level - 1], layout.stride(level - 1), layout.leaves[level - 1],
                values + layout.boxes[level], layout.stride(level));
  return cloud;
}

// ---- search

template <class T>
struct Box {
  T low[kAxes], high[kAxes];

  bool operator==(const Box& other) const {
    bool same = true;
    for (int64_t c = 0; c < kAxes; ++c) same = same && low[c] == other.low[c] && high[c] == other.high[c];
    return same;
  }
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
        nearest_(k + 1, kBatch * kLeaf),
        found_idx_(k + 1),
        found_dist2_(k + 1),
        row_(kBatch * kLeaf),
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
    // One neighbour more than asked for serves every query that stands in the same place, whichever it is
    // itself.
    const int64_t own_leaf = own_set ? first / kLeaf : nearest_leaf(cloud, all);
    T limit[kLeaf], furthest = 0;
    for (int64_t q = 0; q < count; q += lanes<T>)
      first_bounds(cloud, own_leaf, from + q, std::min<int64_t>(lanes<T>, count - q), k_ + own_set,
                   limit + q);
    for (int64_t q = 0; q < count; ++q) furthest = std::max(furthest, limit[q]);
    list_leaves(cloud, all, furthest);
    for (int64_t q = 0; q < count; ++q) {
      if (q == 0 || !(from[q] == from[q - 1])) {
        search_list(cloud, from[q], limit[q]);
        nearest_.write(found_idx_.data(), found_dist2_.data());
      }
      write(order[q], self, idx + order[q] * k_, dist2 == nullptr ? nullptr : dist2 + order[q] * k_);
    }
  }

 private:
  static constexpr int64_t kBatch = 16;  // leaves whose distances are looked through together

  // A leaf close to the box, found by going down to the closest box of each level.
  int64_t nearest_leaf(const TreeCloud<T>& cloud, const Box<T>& from) const {
    int64_t box = 0;
    for (int64_t level = cloud.layout.levels - 1, first = 0; level >= 0; --level, first = box * kFan) {
      T dist2[kFan];
      near_boxes(cloud.boxes(level) + first, cloud.layout.stride(level), from, T(0), dist2);
      box = first;
      for (int64_t i = first; i < std::min(first + kFan, cloud.layout.leaves[level]); ++i)
        if (dist2[i - first] < dist2[box - first]) box = i;
    }
    return box;
  }

  // Bounds of the nth distance of `count` queries, one to a lane, from the leaves around one: the points make
  // groups, and the nth smallest of the group minima is one.
  void first_bounds(const TreeCloud<T>& cloud, int64_t leaf, const Box<T>* from, int64_t count, int64_t nth,
                    T* bounds) const {
    const int64_t leaves = cloud.layout.leaves[0], taken = std::min(leaves, first_leaves_);
    const int64_t begin = std::clamp<int64_t>(leaf - taken / 2, 0, leaves - taken);
    alignas(64) T own[kAxes][lanes<T>];
    for (int64_t c = 0; c < kAxes; ++c)
      for (int64_t i = 0; i < lanes<T>; ++i) own[c][i] = from[std::min(i, count - 1)].low[c];
    const int64_t groups = nth <= 22 ? 32 : nth <= 44 ? 64 : 128;
    Vec<T> minima[128];
    for (int64_t g = 0; g < groups; ++g) minima[g] = splat(infinity<T>);
    const T* points = cloud.points + begin * kAxes * kLeaf;
    for (int64_t i = 0; i < taken; ++i, points += kAxes * kLeaf)
      for (int64_t p = 0; p < kLeaf; ++p) {
        Vec<T> sum = {};
#pragma GCC unroll 3
        for (int64_t c = 0; c < kAxes; ++c)
          sum = add_square<T>(sum, load(own[c]) - splat(points[c * kLeaf + p]));
        Vec<T>& group = minima[(i * kLeaf + p) & (groups - 1)];
        group = least<T>(sum, group);
      }
    sort_lanes(minima, groups);
    alignas(64) T found[lanes<T>];
    store(found, minima[nth - 1]);
    std::copy_n(found, count, bounds);
  }

  // Sorts n vectors, a power of two, lane by lane: Batcher's merge of odd and even.
  static void sort_lanes(Vec<T>* v, int64_t n) {
    for (int64_t p = 1; p < n; p *= 2)
      for (int64_t q = p; q >= 1; q /= 2)
        for (int64_t j = q % p; j + q < n; j += 2 * q)
          for (int64_t i = j; i < j + q && i + q < n; ++i)
            if (i / (2 * p) == (i + q) / (2 * p)) {
              const Vec<T> a = v[i], b = v[i + q];
              v[i] = min(a, b);
              v[i + q] = max(a, b);
            }
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

  // Lists the leaves whose boxes come as near to `from` as `bound`, and copies their boxes side by side.
  void list_leaves(const TreeCloud<T>& cloud, const Box<T>& from, T bound) {
    listed_ = 0;
    descend(cloud, cloud.layout.levels - 1, 0, from, bound);
    for (int64_t side = 0; side < 2 * kAxes; ++side) {
      const T* source = cloud.boxes(0) + side * cloud.layout.stride(0);
      for (int64_t i = 0; i < listed_; ++i) list_boxes_[side * list_stride_ + i] = source[list_[i]];
    }
  }

  void descend(const TreeCloud<T>& cloud, int64_t level, int64_t first, const Box<T>& from, T bound) {
    const TreeLayout& layout = cloud.layout;
    T dist2[kFan];
    uint64_t near = near_boxes(cloud.boxes(level) + first, layout.stride(level), from, bound, dist2);
    near &= (uint64_t(1) << std::min(kFan, layout.leaves[level] - first)) - 1;
    for (; near != 0; near &= near - 1) {
      const int64_t box = first + __builtin_ctzll(near);
      if (level == 0)
        list_[listed_++] = static_cast<int32_t>(box);
      else
        descend(cloud, level - 1, box * kFan, from, bound);
    }
  }

  void search_list(const TreeCloud<T>& cloud, const Box<T>& from, T limit) {
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
        distances(cloud, leaf, 1, from, row_.data() + batched * kLeaf);
        batch[batched++] = leaf;
        if (batched == kBatch) flush();
      }
    }
    flush();
  }

  // The row of one query, from what was found for its place.
  void write(int32_t own, Self self, int64_t* idx, T* dist2) const {
    int64_t written = 0;
    if (self == Self::first) idx[written++] = own;
    for (int64_t i = 0; written < k_; ++i) {
      idx[written] = found_idx_[i];
      if (dist2 != nullptr) dist2[written] = found_dist2_[i];
      written += self == Self::other_set || found_idx_[i] != own;
    }
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
  Buffer<int64_t> found_idx_;
  Buffer<T> found_dist2_;
  Buffer<T> row_;
  Buffer<int32_t> list_;
  int64_t listed_ = 0, list_stride_;
  Buffer<T> list_boxes_;
};

}  // namespace crosspoint::CROSSPOINT_ISA
