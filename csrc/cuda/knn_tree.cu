// Points go by a curve through cells that hold about as many points each along every axis, whatever the cloud
// looks like; consecutive ones make leaves, and boxes around boxes lead to them. A warp takes a query: the leaves
// around it bound its distances, and only boxes that come nearer are opened. The distance to a box takes the same
// operations in the same order as the distance to a point, each of them monotone under rounding, so that it never
// exceeds the computed distance to a point inside: nothing is missed. A box also knows its lowest index, so that
// of many points at one distance only the first are looked at.
#include "cuda/knn_tree.h"

#include "common/curve.h"
#include "cuda/knn_select.h"
#include "cuda/radix_sort.h"

namespace crosspoint::cuda {
namespace {

constexpr int kAxes = 3;
constexpr int kSample = 1024;  // points whose coordinates divide an axis
constexpr int kAxisBits = 10;
constexpr int kFewBits = 8;                     // of an axis, for clouds of up to
constexpr int64_t kFewBitsPoints = 128 * 1024;  // so many points: it saves a pass of the sort
constexpr int kTreeThreads = 128;
constexpr int kNearLeaves = 8;  // that bound the distances
constexpr int32_t kNoPoint = INT32_MAX;

// Boxes of each level, leaves first; every level above them has the room that the first of them takes.
struct TreeLayout {
  int64_t points;  // of a cloud, padded to whole leaves
  int leaves, parents, levels, boxes;

  explicit TreeLayout(int64_t candidates) : points((candidates + kWarp - 1) / kWarp * kWarp), levels(1) {
    while (count(levels - 1) > kWarp) ++levels;
    leaves = count(0);
    parents = count(1);
    boxes = offset(levels);
  }

  __host__ __device__ int count(int level) const { return static_cast<int>((points - 1) >> 5 * (level + 1)) + 1; }
  __host__ __device__ int offset(int level) const { return level == 0 ? 0 : leaves + (level - 1) * parents; }
};

struct Tree {
  TreeLayout layout;
  int bits;          // of an axis
  Sort sort;         // codes of points, and their indices
  float* divisions;  // (batch, axis, kSample), ascending
  float4* points;    // (batch, layout.points): coordinates, and the index as bits; NaN and kNoPoint beyond the last
  float* boxes;      // (batch, 2 * kAxes, layout.boxes): lower corners, upper corners
  int32_t* lowest;   // (batch, layout.boxes): index

  __device__ __forceinline__ int64_t box(int64_t b, int level, int i) const {
    return b * layout.boxes + layout.offset(level) + i;
  }
  __device__ __forceinline__ float* side(int64_t b, int side, int level, int i) const {
    return boxes + (b * 2 * kAxes + side) * layout.boxes + layout.offset(level) + i;
  }
};

Tree plan(const KnnArgs<float>& a, Pieces& pieces) {
  const int bits = a.candidates <= kFewBitsPoints ? kFewBits : kAxisBits;
  const TreeLayout layout(a.candidates);
  return {layout,
          bits,
          plan_sort(segments(a.lengths_points, a.batch, a.candidates), kAxes * bits, pieces),
          pieces.take<float>(a.batch * kAxes * kSample),
          pieces.take<float4>(a.batch * layout.points),
          pieces.take<float>(a.batch * 2 * kAxes * layout.boxes),
          pieces.take<int32_t>(a.batch * layout.boxes)};
}

// Sorted coordinates of a sample of each cloud, axis by axis.
__global__ void __launch_bounds__(kSample) tree_divide(Search<float> search, Tree tree) {
  CROSSPOINT_SHARED(sample, float[kAxes * kSample]);
  const int64_t b = blockIdx.x;
  const int n = search.valid_points(b), channels = static_cast<int>(search.args.channels);
  const int64_t j = int64_t(threadIdx.x) * n / kSample;
  for (int axis = 0; axis < kAxes; ++axis)
    sample[axis * kSample + threadIdx.x] =
        n > 0 && axis < channels ? comparable(search.points(b)[j * channels + axis]) : 0.f;
  for (int run = 2; run <= kSample; run *= 2)
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < kAxes * kSample / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const float x = sample[low], y = sample[high];
        if ((y < x) != ((low & run & (kSample - 1)) != 0)) {
          sample[low] = y;
          sample[high] = x;
        }
      }
    }
  __syncthreads();
  for (int axis = 0; axis < kAxes; ++axis)
    tree.divisions[(b * kAxes + axis) * kSample + threadIdx.x] = sample[axis * kSample + threadIdx.x];
}

constexpr int kCodeThreads = 512;

__global__ void __launch_bounds__(kCodeThreads) tree_encode(Search<float> search, Tree tree) {
  CROSSPOINT_SHARED(divisions, float[kAxes * kSample]);
  const int64_t cloud = blockIdx.x / tree.sort.segments.tiles;
  const int channels = static_cast<int>(search.args.channels);
  for (int i = threadIdx.x; i < kAxes * kSample; i += blockDim.x)
    divisions[i] = tree.divisions[cloud * kAxes * kSample + i];
  __syncthreads();
  make_pairs(tree.sort, [&](int64_t b, int j) {
    uint32_t code = 0;
    for (int axis = 0; axis < channels; ++axis) {
      const float x = search.points(b)[int64_t(j) * channels + axis];
      int below = 0;  // divisions that are less than x, at most kSample - 1
#pragma unroll
      for (int step = kSample / 2; step > 0; step /= 2)
        if (divisions[axis * kSample + below + step - 1] < x) below += step;
      code |= spread(static_cast<uint32_t>(below) >> (kAxisBits - tree.bits)) << axis;
    }
    return code;
  });
}

// The box around what the lanes hold.
__device__ __forceinline__ void write_box(const Tree& tree, int64_t b, int level, int i, float (&low)[kAxes],
                                          float (&high)[kAxes], int32_t lowest) {
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      low[axis] = fminf(low[axis], __shfl_xor_sync(kAllLanes, low[axis], step));
      high[axis] = fmaxf(high[axis], __shfl_xor_sync(kAllLanes, high[axis], step));
    }
    if (lane_id() == 0) {
      *tree.side(b, axis, level, i) = low[axis];
      *tree.side(b, kAxes + axis, level, i) = high[axis];
    }
  }
  lowest = __reduce_min_sync(kAllLanes, lowest);
  if (lane_id() == 0) tree.lowest[tree.box(b, level, i)] = lowest;
}

__global__ void __launch_bounds__(kTreeThreads) tree_plant(Search<float> search, Tree tree) {
  const int leaves = tree.layout.leaves, channels = static_cast<int>(search.args.channels);
  const int64_t warp = blockIdx.x * int64_t(kTreeThreads / kWarp) + threadIdx.x / kWarp;
  if (warp >= search.args.batch * leaves) return;
  const int64_t b = warp / leaves;
  const int leaf = static_cast<int>(warp % leaves), place = leaf * kWarp + lane_id();
  const bool exists = place < search.valid_points(b);
  const int32_t j = exists ? tree.sort.pairs.values[b * search.args.candidates + place] : kNoPoint;
  float at[kAxes], low[kAxes], high[kAxes];
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    at[axis] = !exists ? missing<float> : axis < channels ? search.points(b)[int64_t(j) * channels + axis] : 0.f;
    low[axis] = fminf(at[axis], infinity<float>());  // NaN is at infinity and widens no box
    high[axis] = fmaxf(at[axis], -infinity<float>());
  }
  tree.points[b * tree.layout.points + place] = make_float4(at[0], at[1], at[2], __int_as_float(j));
  write_box(tree, b, 0, leaf, low, high, j);
}

__global__ void __launch_bounds__(kTreeThreads) tree_grow(Tree tree, int level, int64_t batch) {
  const int boxes = tree.layout.count(level), below = tree.layout.count(level - 1);
  const int64_t warp = blockIdx.x * int64_t(kTreeThreads / kWarp) + threadIdx.x / kWarp;
  if (warp >= batch * boxes) return;
  const int64_t b = warp / boxes;
  const int box = static_cast<int>(warp % boxes), child = box * kWarp + lane_id();
  float low[kAxes], high[kAxes];
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    low[axis] = child < below ? *tree.side(b, axis, level - 1, child) : infinity<float>();
    high[axis] = child < below ? *tree.side(b, kAxes + axis, level - 1, child) : -infinity<float>();
  }
  write_box(tree, b, level, box, low, high, child < below ? tree.lowest[tree.box(b, level - 1, child)] : kNoPoint);
}

// The first key that a point in the box may have; last() where there is no box.
__device__ __forceinline__ NeighbourKey<float> first_key(const Tree& tree, int64_t b, int level, int i,
                                                         const float (&query)[kAxes], bool comparable_query) {
  using Key = NeighbourKey<float>;
  if (i >= tree.layout.count(level)) return Key::last();
  const int32_t lowest = tree.lowest[tree.box(b, level, i)];
  if (lowest == kNoPoint) return Key::last();
  float sum = 0;
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    const float under = *tree.side(b, axis, level, i) - query[axis];
    const float over = query[axis] - *tree.side(b, kAxes + axis, level, i);
    sum = add_square(sum, fmaxf(fmaxf(under, over), 0.f), 0.f);
  }
  return Key::of(comparable_query ? comparable(sum) : infinity<float>(), lowest);
}

__global__ void __launch_bounds__(kTreeThreads, 6) knn_tree(Search<float> search, Tree tree, int room) {
  using Key = NeighbourKey<float>;
  SharedArena arena;
  Key* keys = arena.take<Key>(kTreeThreads / kWarp * room) + threadIdx.x / kWarp * room;
  const KnnArgs<float>& a = search.args;
  const int channels = static_cast<int>(a.channels), lane = lane_id();
  const int wanted = static_cast<int>(a.k - search.leading()), top = tree.layout.levels - 1;
  const bool own_set = a.self != Self::other_set;
  const int64_t warps = gridDim.x * int64_t(kTreeThreads / kWarp);

  for (int64_t w = blockIdx.x * int64_t(kTreeThreads / kWarp) + threadIdx.x / kWarp; w < a.batch * a.queries;
       w += warps) {
    const int64_t b = w / a.queries, place = w % a.queries;
    const bool exists = place < search.valid_queries(b);
    const int n = search.valid_points(b), leaves = (n + kWarp - 1) / kWarp;
    // In the order of the curve, where the queries are the points: neighbouring warps then open the same boxes.
    const int64_t i = exists && own_set ? tree.sort.pairs.values[b * a.candidates + place] : place;
    const Row<float> row = search.row(b, i);
    const int leading = exists ? static_cast<int>(search.leading()) : 0;
    if (leading == 1 && lane == 0) row.write(0, Key::of(0.f, static_cast<int32_t>(i)));
    if (!exists || n == 0 || wanted == 0) {
      for (int64_t at = leading + lane; at < a.k; at += kWarp) row.write_missing(at);
      continue;
    }
    float query[kAxes];
    load_query(search.query(b, i), channels, query);
    const bool comparable_query = query[0] == query[0] && query[1] == query[1] && query[2] == query[2];
    const int32_t own = search.own(i);
    const float4* points = tree.points + b * tree.layout.points + lane;
    const auto key_of = [&](float4 point) {
      float sum = add_square(0.f, point.x, query[0]);
      sum = add_square(sum, point.y, query[1]);
      sum = add_square(sum, point.z, query[2]);
      return Key::of(comparable(sum), __float_as_int(point.w));
    };

    int leaf = static_cast<int>(place / kWarp);
    if (!own_set) {
      leaf = 0;
      for (int level = top; level >= 0; --level) {
        const unsigned far =
            static_cast<unsigned>(first_key(tree, b, level, leaf * kWarp + lane, query, comparable_query).bits >> 32);
        const unsigned nearest = __reduce_min_sync(kAllLanes, far);
        leaf = leaf * kWarp + __ffs(__ballot_sync(kAllLanes, far == nearest)) - 1;
      }
    }
    const int near = leaves < kNearLeaves ? leaves : kNearLeaves;
    int begin = leaf - kNearLeaves / 2;
    begin = begin < 0 ? 0 : begin > leaves - near ? leaves - near : begin;
    float minima[kNearLeaves];
#pragma unroll
    for (int l = 0; l < kNearLeaves; ++l)
      minima[l] = l < near ? key_of(points[(begin + l) * kWarp]).distance() : infinity<float>();
    // A point counts as its own neighbour here; it is left out below.
    const float bound = nth_of_groups(minima, wanted + own_set, keys);
    KeyList<Key> list{keys, 0, Key::of(bound, kNoPoint)};

    // Lane l holds which boxes of level l are still to be opened, of the 32 under box `node` of level l + 1.
    unsigned pending = 0;
    Key nearest = Key::last();
    int level = top, node = 0;
    for (bool fresh = true; level <= top;) {
      if (fresh) {
        nearest = first_key(tree, b, level, node * kWarp + lane, query, comparable_query);
        const unsigned open = __ballot_sync(kAllLanes, nearest < list.limit);
        if (lane == level) pending = open;
        fresh = false;
      }
      const unsigned open = __shfl_sync(kAllLanes, pending, level);
      if (open == 0) {
        ++level;
        node /= kWarp;
        continue;
      }
      const int next = __ffs(open) - 1, child = node * kWarp + next;
      if (lane == level) pending = open & (open - 1);
      if (level > 0) {
        node = child;
        --level;
        fresh = true;
        continue;
      }
      // What was found since may have put the leaf out of reach.
      const Key far = {__shfl_sync(kAllLanes, nearest.bits, next)};
      if (!(far < list.limit)) continue;
      const Key key = key_of(points[int64_t(child) * kWarp]);
      list.offer(key.index() != kNoPoint && key.index() != own, key);
      if (list.count + kWarp > room) list.settle(wanted);
    }
    __syncwarp();
    if (list.count <= 2 * kWarp) {
      write_ranked(keys, list.count, wanted, row, leading);
    } else {
      list.settle(wanted);
      for (int at = lane; at < list.count && at < wanted; at += kWarp) row.write(leading + at, keys[at]);
    }
    for (int at = list.count + lane; at < wanted; at += kWarp) row.write_missing(leading + at);
    __syncwarp();
  }
}

unsigned blocks_of(int64_t warps) {
  constexpr int64_t warps_of_a_block = kTreeThreads / kWarp, most = 1 << 30;
  const int64_t blocks = (warps + warps_of_a_block - 1) / warps_of_a_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

}  // namespace

bool tree_supports(const KnnArgs<float>& a) {
  const int64_t tiles = (a.candidates + kSortTile - 1) / kSortTile;
  return a.channels >= 1 && a.channels <= kAxes && a.k <= kMostListed && a.candidates >= 1 &&
         a.candidates <= INT32_MAX / 2 && a.batch * (tiles + kDigits) <= INT32_MAX / kSortTile;
}

size_t tree_workspace(const KnnArgs<float>& a) {
  Pieces pieces(nullptr);
  plan(a, pieces);
  return pieces.used();
}

cudaError_t search_tree(const KnnArgs<float>& a, void* workspace, cudaStream_t stream) {
  Pieces pieces(workspace);
  Tree tree = plan(a, pieces);
  const Search<float> search{a};
  const int room = a.k < 44 ? 128 : kListRoom;
  const dim3 threads(kTreeThreads);
  cudaError_t status = launch(tree_divide, dim3(static_cast<unsigned>(a.batch)), dim3(kSample), 0, stream, search, tree);
  if (status == cudaSuccess)
    status = launch(tree_encode, dim3(static_cast<unsigned>(tree.sort.tiles())), dim3(kCodeThreads), 0, stream, search, tree);
  if (status == cudaSuccess) status = sort_pairs(tree.sort, stream);
  if (status == cudaSuccess)
    status = launch(tree_plant, dim3(blocks_of(a.batch * tree.layout.leaves)), threads, 0, stream, search, tree);
  for (int level = 1; level < tree.layout.levels && status == cudaSuccess; ++level)
    status = launch(tree_grow, dim3(blocks_of(a.batch * tree.layout.count(level))), threads, 0, stream, tree, level,
                    a.batch);
  if (status == cudaSuccess)
    status = launch(knn_tree, dim3(blocks_of(a.batch * a.queries)), threads,
                    shared_bytes<NeighbourKey<float>>(kTreeThreads / kWarp * room), stream, search, tree, room);
  return status;
}

}  // namespace crosspoint::cuda
