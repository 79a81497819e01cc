// Points are centred and split in two bfloat16 values, x = hi + lo; hi hi' + hi lo' + lo hi' on the tensor cores
// gives scores with a proven error (common/knn_bound.h). Blocks of 32 queries keep the scores of a chunk of points
// in shared memory: minima of groups bound the k-th score, the points within the bound are listed, cut again by the
// k-th of their own scores, and those whose scores are too close to tell their order are compared by direct
// differences. Rows whose candidates do not fit the list, and clouds that are not finite, go through all points.
#include "cuda/knn_filter.h"

#include "common/knn_bound.h"
#include "cuda/knn_select.h"
#include "cuda/mma.h"
#include "cuda/workspace.h"

namespace crosspoint::cuda {
namespace {

constexpr int kDepth = 16;    // channels of one product
constexpr int kColumns = 8;   // points of one product
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kQueries = 32;  // of a block: two tiles of 16
constexpr int kRows = kQueries / kWarps;        // rows that a warp selects from
constexpr int kStep = kWarps * kColumns;        // points of one tile of each warp
constexpr int kMostTiles = 8;                   // tiles of a warp in a chunk
constexpr int kMostCentred = 256;               // points that the centre is the mean of
constexpr int kTeam = 8;                        // lanes that sum one distance
constexpr unsigned kPackRows = 4;               // rows of a warp of filter_pack
constexpr int kPackThreads = 128;

// Where point j of a chunk stands: the warp that multiplies it, its tile there, its column. Columns are dealt so
// that each thread holds points from all over the chunk, and stores its scores without bank conflicts.
struct Column {
  int warp, tile, column;
};
__host__ __device__ inline Column column_of(int j) {
  const int place = j % (kStep / 2), step = j / (kStep / 2);  // two steps make a tile
  return {place / 4, step / 2, place % 4 * 2 + step % 2};
}

struct Filter {
  int products, tiles;           // along the channels; of a warp in a chunk
  int64_t chunks, blocks;        // of a cloud: chunks of points, blocks of queries
  float* centres;                // (batch, channels)
  uint32_t* most;                // (batch, 4): the points' largest norm2, lost2 and low2, as bits; NaN above all
  uint4* points;                 // (batch, chunk, warp, product, tile, lane): hi, hi, lo, lo as mma_bf16 wants them
  uint4* queries;                // (batch, block, product, half of the block, part, lane)
  float* half_norms;             // (batch, chunk, point); +inf beyond the last
  SplitSize* sizes;                   // (batch, block, query)

  __host__ __device__ int chunk() const { return tiles * kStep; }
};

Filter plan(const KnnArgs<float>& a, Pieces& pieces) {
  Filter f{};
  f.products = static_cast<int>((a.channels + kDepth - 1) / kDepth);
  f.tiles = a.k < 44 ? kMostTiles : kMostTiles / 2;  // longer lists take the room of half the scores
  f.chunks = (a.candidates + f.chunk() - 1) / f.chunk();
  f.blocks = (a.queries + kQueries - 1) / kQueries;
  f.centres = pieces.take<float>(a.batch * a.channels);
  f.most = pieces.take<uint32_t>(a.batch * 4);
  f.points = pieces.take<uint4>(a.batch * f.chunks * f.chunk() / kColumns * f.products * kWarp);
  f.queries = pieces.take<uint4>(a.batch * f.blocks * 2 * f.products * 2 * kWarp);
  f.half_norms = pieces.take<float>(a.batch * f.chunks * f.chunk());
  f.sizes = pieces.take<SplitSize>(a.batch * f.blocks * kQueries);
  return f;
}

// About the mean of each cloud: any centre would be right.
__global__ void __launch_bounds__(256) filter_centre(Search<float> search, Filter f, int parts) {
  CROSSPOINT_SHARED(sums, float[8][kWarp]);
  const int64_t b = blockIdx.x / parts, channels = search.args.channels;
  const int64_t c = blockIdx.x % parts * int64_t(kWarp) + lane_id();
  const int n = search.valid_points(b), taken = n < kMostCentred ? n : kMostCentred, warp = threadIdx.x / kWarp;
  if (blockIdx.x % parts == 0 && threadIdx.x < 4) f.most[b * 4 + threadIdx.x] = 0;
  float sum = 0;
  for (int i = warp; i < taken && c < channels; i += 8) sum += search.points(b)[int64_t(i) * n / taken * channels + c];
  sums[warp][lane_id()] = sum;
  __syncthreads();
  if (warp != 0 || c >= channels) return;
  for (int w = 1; w < 8; ++w) sum += sums[w][lane_id()];
  f.centres[b * channels + c] = taken > 0 ? sum / static_cast<float>(taken) : 0.f;
}

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Splits rows and writes them as points, as queries, or both: a warp takes kPackRows of them.
__global__ void __launch_bounds__(kPackThreads) filter_pack(Search<float> search, Filter f, bool as_points,
                                                            bool as_queries, int64_t rows) {
  const KnnArgs<float>& a = search.args;
  const int64_t per_cloud = (rows + kPackRows - 1) / kPackRows;
  const int64_t warp = blockIdx.x * int64_t(kPackThreads / kWarp) + threadIdx.x / kWarp;
  if (warp >= a.batch * per_cloud) return;
  const int64_t b = warp / per_cloud, first = warp % per_cloud * kPackRows;
  const int lane = lane_id(), product = lane / 8, pair = lane % 8;  // of each 4 products; 2 channels
  const int64_t valid = as_points ? search.valid_points(b) : search.valid_queries(b);
  float most[3] = {0, 0, 0};
  for (int64_t i = first; i < first + kPackRows && i < rows; ++i) {
    const float* row = as_points ? search.points(b) + i * a.channels : search.query(b, i);
    const Column at = column_of(static_cast<int>(i % f.chunk()));
    const int64_t strip = (b * f.chunks + i / f.chunk()) * kWarps + at.warp, block = b * f.blocks + i / kQueries;
    float norm2 = 0, lost2 = 0, low2 = 0;
    for (int p = product; p < f.products + product; p += 4) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t c = int64_t(p) * kDepth + pair * 2 + e;
        x[e] = i < valid && c < a.channels ? row[c] - f.centres[b * a.channels + c] : 0.f;
      }
      const uint32_t high = pack_bf16(x[0], x[1]);
      const float rest[2] = {x[0] - bf16_low(high), x[1] - bf16_high(high)};
      const uint32_t low = pack_bf16(rest[0], rest[1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float h = e == 0 ? bf16_low(high) : bf16_high(high), l = e == 0 ? bf16_low(low) : bf16_high(low);
        norm2 = add_square(norm2, h, -l);
        lost2 = add_square(lost2, rest[e], l);
        low2 = add_square(low2, l, 0.f);
      }
      if (p >= f.products) continue;
      // Pairs 0 to 3 are the first half of a fragment's depth, 4 to 7 the second.
      if (as_points && i < f.chunks * f.chunk()) {
        uint32_t* to = reinterpret_cast<uint32_t*>(f.points + ((strip * f.products + p) * f.tiles + at.tile) * kWarp +
                                                   at.column * 4 + pair % 4);
        to[pair / 4] = high;
        to[2 + pair / 4] = low;
      }
      if (as_queries && i < f.blocks * kQueries) {
        const int place = static_cast<int>(i % 8) * 4 + pair % 4, word = pair / 4 * 2 + static_cast<int>(i % 16 / 8);
        uint4* to = f.queries + ((block * f.products + p) * 2 + i % kQueries / 16) * 2 * kWarp + place;
        reinterpret_cast<uint32_t*>(to)[word] = high;
        reinterpret_cast<uint32_t*>(to + kWarp)[word] = low;
      }
    }
    norm2 = sum_of_warp(norm2);
    lost2 = sum_of_warp(lost2);
    low2 = sum_of_warp(low2);
    if (lane != 0) continue;
    if (as_points && i < f.chunks * f.chunk())
      f.half_norms[b * f.chunks * f.chunk() + i] = i < valid ? norm2 / 2 : infinity<float>();
    if (as_queries && i < f.blocks * kQueries) f.sizes[b * f.blocks * kQueries + i] = {norm2, lost2, low2, 0};
    // A NaN stays.
    most[0] = most[0] >= norm2 ? most[0] : norm2 == norm2 ? norm2 : infinity<float>();
    most[1] = most[1] >= lost2 ? most[1] : lost2 == lost2 ? lost2 : infinity<float>();
    most[2] = most[2] >= low2 ? most[2] : low2 == low2 ? low2 : infinity<float>();
  }
  if (lane == 0 && as_points)
    for (int m = 0; m < 3; ++m) atomicMax(&f.most[b * 4 + m], __float_as_uint(most[m]));
}

// What scores up to some number say of a query's points.
struct Trust {
  float beyond;  // given that k points have scores up to it: the first that none of the k nearest has; NaN: nothing
  float gap;     // scores up to it that differ by more are in the order of their distances
};

// Apart, for its double precision takes many registers.
__device__ __noinline__ Trust trust(const uint32_t* most_of_cloud, const SplitSize* size_of_query, int channels,
                                    float score) {
  const SplitSize most{__uint_as_float(most_of_cloud[0]), __uint_as_float(most_of_cloud[1]),
                       __uint_as_float(most_of_cloud[2]), 0};
  const SplitSize size = *size_of_query;
  constexpr float too_large = 3.4e38f / 64;
  if (!(most.norm2 < too_large && size.norm2 < too_large && score < infinity<float>()))
    return {missing<float>, infinity<float>()};
  const FilterBound bound = split_bound(size, most, channels);
  const float cut = static_cast<float>(filter_cut(bound, score, INFINITY));
  const float gap = static_cast<float>(filter_gap(bound, score) * (1 + 1e-6));  // more than float32 may round away
  const uint32_t bits = __float_as_uint(cut);
  return {__uint_as_float(cut == 0 ? 1u : cut > 0 ? bits + 1 : bits - 1), gap};
}

// The squared distance of a point to a query, summed by a team of lanes: channels in fours go round the team.
// The order of the sum is the same however the rows are loaded.
__device__ __forceinline__ float team_distance(const float* point, const float* query, int64_t channels, bool wide) {
  const int member = lane_id() % kTeam;
  float sum = 0;
  if (wide) {
    for (int64_t c = member * 4; c < channels; c += 4 * kTeam) {
      const float4 x = *reinterpret_cast<const float4*>(point + c), y = *reinterpret_cast<const float4*>(query + c);
      sum = add_square(sum, x.x, y.x);
      sum = add_square(sum, x.y, y.y);
      sum = add_square(sum, x.z, y.z);
      sum = add_square(sum, x.w, y.w);
    }
  } else {
    for (int64_t c0 = member * 4; c0 < channels; c0 += 4 * kTeam)
      for (int64_t c = c0; c < c0 + 4 && c < channels; ++c) sum = add_square(sum, point[c], query[c]);
  }
#pragma unroll
  for (int step = 1; step < kTeam; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return comparable(sum);
}

// One query and the rows it is compared with.
struct Directly {
  const float *points, *query;
  int64_t channels;
  bool wide;

  __device__ __forceinline__ float distance(int j) const {
    return team_distance(points + j * channels, query, channels, wide);
  }
};

// Puts the distances of the points in keys[0, count) in place of their scores.
__device__ __forceinline__ void compare_directly(const Directly& rows, NeighbourKey<float>* keys, int count) {
  for (int first = 0; first < count; first += kWarp / kTeam) {
    const int i = first + lane_id() / kTeam;
    const int32_t j = keys[i < count ? i : first].index();
    const float distance = rows.distance(j);
    __syncwarp();
    if (i < count && lane_id() % kTeam == 0) keys[i] = NeighbourKey<float>::of(distance, j);
  }
  __syncwarp();
}

// Writes the first `wanted` of `count` points, at most 64, that are listed by score and may be among the nearest.
// Places between which the scores do not decide make runs; only these are compared, unless distances are asked
// for. The list has room for 128 keys.
__device__ __forceinline__ void write_decided(const Directly& rows, NeighbourKey<float>* keys, int count, int wanted,
                                              float gap, Row<float> row, int64_t at) {
  using Key = NeighbourKey<float>;
  using Places = unsigned long long;
  const int lane = lane_id();
  Places open = 0;  // bit i: places i and i + 1 may be the other way round
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int i = part * kWarp + lane;
    const bool close = i + 1 < count && !(keys[i + 1].score() - keys[i].score() > gap);
    open |= Places{__ballot_sync(kAllLanes, close)} << part * kWarp;
  }
  const Places compared = row.dist2 != nullptr ? ~Places{0} >> (2 * kWarp - count) : open | open << 1;
  Key* listed = keys + 2 * kWarp;  // those that are compared: their places and indices
  for (int i = lane; i < count; i += kWarp)
    if (compared >> i & 1)
      listed[__popcll(compared & ((Places{1} << i) - 1))] = {int64_t(i) << 32 | keys[i].index()};
  __syncwarp();
  const int total = __popcll(compared);
  for (int first = 0; first < total; first += kWarp / kTeam) {
    const int t = first + lane / kTeam;
    const Key one = listed[t < total ? t : first];
    const float distance = rows.distance(one.index());
    if (t < total && lane % kTeam == 0) keys[one.bits >> 32] = Key::of(distance, one.index());
  }
  __syncwarp();
  for (int i = lane; i < count; i += kWarp) {
    const Places before = ~open & ((Places{1} << i) - 1);
    const int begin = 2 * kWarp - __clzll(static_cast<long long>(before));
    const int end = i + __ffsll(static_cast<long long>(~open >> i));
    const Key key = keys[i];
    int place = begin;
    for (int other = begin; other < end; ++other) place += keys[other] < key;
    if (place < wanted) row.write(at + place, key);
  }
}

// Lists the nearest by going through all points; returns how many, sorted.
__device__ __forceinline__ int list_all(const Directly& rows, int n, int32_t own, int wanted, NeighbourKey<float>* keys,
                                        int room) {
  using Key = NeighbourKey<float>;
  KeyList<Key> list{keys, 0, Key::last()};
  for (int first = 0; first < n; first += kWarp / kTeam) {
    const int j = first + lane_id() / kTeam;
    const float distance = rows.distance(j < n ? j : first);
    list.offer(j < n && j != own && lane_id() % kTeam == 0, Key::of(distance, j));
    if (list.count + kWarp <= room && (list.count < wanted || list.limit < Key::last())) continue;
    list.settle(wanted);
    if (list.limit.distance() == 0) break;  // what comes later has a higher index and is no nearer
  }
  list.settle(wanted);
  return list.count;
}

// most_tiles is f.tiles.
template <int most_tiles>
__global__ void __launch_bounds__(kThreads, 1) knn_filter(Search<float> search, Filter f, int room, bool wide) {
  using Key = NeighbourKey<float>;
  constexpr int chunk_size = most_tiles * kStep, stride = chunk_size + 4;
  constexpr int sets = most_tiles == kMostTiles ? 2 : 8;  // of a lane's minima: 64 groups, or 256
  const KnnArgs<float>& a = search.args;
  const int warp = threadIdx.x / kWarp, lane = lane_id();
  SharedArena arena;
  float* scores = arena.take<float>(kQueries * stride);  // (query, point of the chunk)
  Key* lists = arena.take<Key>(kQueries * room);
  const int b = blockIdx.x / static_cast<int>(f.blocks), block = blockIdx.x % static_cast<int>(f.blocks);
  const int first = block * kQueries;
  const int wanted = static_cast<int>(a.k - search.leading()), nth = wanted + (a.self == Self::other_set ? 0 : 1);
  const int valid = static_cast<int>(search.valid_queries(b)) - first;  // of the block's queries, or more
  const int n = valid > 0 && wanted > 0 ? search.valid_points(b) : 0;
  const int chunks = (n + chunk_size - 1) / chunk_size, channels = static_cast<int>(a.channels);
  const uint32_t* most = f.most + b * int64_t(4);
  const SplitSize* sizes = f.sizes + (b * f.blocks + block) * kQueries;

  CROSSPOINT_SHARED(beyond, float[kQueries]);  // of each query: the first score that is out of the bound
  CROSSPOINT_SHARED(count, int[kQueries]);     // of its list; -1: it does not fit, or scores say nothing
  // The scores of one chunk serve both passes.
  for (int turn = 0; turn < (chunks > 1 ? 2 * chunks : chunks); ++turn) {
    const int chunk = turn < chunks ? turn : turn - chunks, begin = chunk * chunk_size;
    const int tiles = (n - begin + kStep - 1) / kStep < most_tiles ? (n - begin + kStep - 1) / kStep : most_tiles;
    {
      float sum[2][most_tiles][4] = {};
      const uint4* left = f.queries + (b * f.blocks + block) * f.products * 4 * kWarp + lane;
      const uint4* right =
          f.points + ((b * f.chunks + chunk) * kWarps + warp) * f.products * most_tiles * int64_t(kWarp) + lane;
#pragma unroll 1
      for (int p = 0; p < f.products; ++p, left += 4 * kWarp, right += most_tiles * kWarp) {
        uint32_t high[2][4], low[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint4 h = left[2 * m * kWarp];
          const uint4 l = left[(2 * m + 1) * kWarp];
          high[m][0] = h.x, high[m][1] = h.y, high[m][2] = h.z, high[m][3] = h.w;
          low[m][0] = l.x, low[m][1] = l.y, low[m][2] = l.z, low[m][3] = l.w;
        }
        uint4 next = right[0];
#pragma unroll
        for (int t = 0; t < most_tiles; ++t) {
          if (t >= tiles) continue;
          const uint4 y = next;
          __syncwarp();  // keeps the compiler from loading more than one tile ahead: registers
          if (t + 1 < most_tiles && t + 1 < tiles) next = right[(t + 1) % most_tiles * kWarp];
          const uint32_t y_high[2] = {y.x, y.y}, y_low[2] = {y.z, y.w};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma_bf16(sum[m][t], low[m], y_high);
            mma_bf16(sum[m][t], high[m], y_low);
            mma_bf16(sum[m][t], high[m], y_high);
          }
        }
      }
      const float* half_norms = f.half_norms + (b * f.chunks + chunk) * chunk_size;
#pragma unroll
      for (int t = 0; t < most_tiles; ++t) {
        if (t >= tiles) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = (2 * t + e) * (kStep / 2) + warp * 4 + lane % 4;
          const float half_norm = half_norms[j];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            scores[(m * 16 + lane / 4) * stride + j] = half_norm - sum[m][t][e];
            scores[(m * 16 + 8 + lane / 4) * stride + j] = half_norm - sum[m][t][2 + e];
          }
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int q = warp * kRows; q < (warp + 1) * kRows; ++q) {
      const float4* row = reinterpret_cast<const float4*>(scores + q * stride) + lane;
      Key* list = lists + q * room;
      const int itself = a.self == Self::other_set ? -1 : first + q - begin;
      if (turn < chunks) {
        // Until the last chunk is seen the minima wait where the list will be.
        float* waiting = reinterpret_cast<float*>(list) + lane;
        float minima[8];
#pragma unroll
        for (int g = 0; g < 8; ++g) minima[g] = g < sets && turn > 0 ? waiting[g % sets * kWarp] : infinity<float>();
#pragma unroll
        for (int t = 0; t < most_tiles; ++t) {
          if (t >= tiles) continue;
          const float4 s = row[t * kWarp];
          float& low = minima[2 * t % sets];
          float& high = minima[(2 * t + 1) % sets];
          low = fminf(low, fminf(s.x, s.y));
          high = fminf(high, fminf(s.z, s.w));
        }
        if (turn < chunks - 1) {
#pragma unroll
          for (int g = 0; g < sets; ++g) waiting[g * kWarp] = minima[g];
          continue;
        }
        const float score = nth_of_groups(minima, nth, list);
        const float limit = trust(most, sizes + q, channels, score).beyond;
        if (lane == 0) {
          count[q] = q < valid && limit == limit ? 0 : -1;
          beyond[q] = limit;
        }
        __syncwarp();
        if (chunks > 1) continue;
      }
      if (count[q] < 0) continue;
      uint32_t word = 0;  // bit 31 - 4 t - e: whether point 128 t + 4 lane + e of the chunk is within the bound
#pragma unroll
      for (int t = 0; t < kMostTiles; ++t) {
        float4 s = make_float4(infinity<float>(), infinity<float>(), infinity<float>(), infinity<float>());
        if (t < tiles) s = row[t * kWarp];
        word = __funnelshift_l(__float_as_uint(s.x - beyond[q]), word, 1);
        word = __funnelshift_l(__float_as_uint(s.y - beyond[q]), word, 1);
        word = __funnelshift_l(__float_as_uint(s.z - beyond[q]), word, 1);
        word = __funnelshift_l(__float_as_uint(s.w - beyond[q]), word, 1);
      }
      if (itself >= 0 && itself < chunk_size && itself / 4 % kWarp == lane)
        word &= ~(0x80000000u >> (itself / kStep * 4 + itself % 4));
      const int before = count[q];
      int total;
      int place = sum_before(__popc(word), total) + before;
      const bool fits = before + total <= room;
      for (; fits && word != 0; ++place) {
        const int bit = __clz(word), j = bit / 4 * kStep + lane * 4 + bit % 4;
        word &= ~(0x80000000u >> bit);
        list[place] = Key::of_score(scores[q * stride + j], begin + j);
      }
      __syncwarp();
      if (lane == 0) count[q] = fits ? before + total : -1;
      __syncwarp();
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int q = warp * kRows; n > 0 && q < (warp + 1) * kRows; ++q) {
    const int64_t i = first + q;
    if (q >= valid) continue;
    Key* list = lists + q * room;
    const Directly rows{search.points(b), search.query(b, i), a.channels, wide};
    const Row<float> row = search.row(b, i);
    int listed = count[q];
    if (listed >= wanted) {
      // The wanted-th of their own scores is a better bound.
      sort_keys(list, listed);
      const Trust trusted = trust(most, sizes + q, channels, list[wanted - 1].score());
      int kept = wanted;
      while (kept < listed && list[kept].score() < trusted.beyond) ++kept;
      listed = kept;
      __syncwarp();
      if (listed <= 2 * kWarp) {
        write_decided(rows, list, listed, wanted, trusted.gap, row, search.leading());
        continue;
      }
      compare_directly(rows, list, listed);
      sort_keys(list, listed);
    } else {
      listed = list_all(rows, n, search.own(i), wanted, list, room);
    }
    for (int place = lane; place < wanted; place += kWarp) {
      if (place < listed)
        row.write(search.leading() + place, list[place]);
      else
        row.write_missing(search.leading() + place);
    }
  }
  search.write_rest(b, first, first + kQueries, n > 0 ? wanted : 0);
}

int room_of(const KnnArgs<float>& a) { return a.k < 44 ? 128 : kListRoom; }

constexpr size_t filter_shared(int tiles, int room) {
  return shared_bytes<float>(kQueries * (tiles * kStep + 4)) + shared_bytes<NeighbourKey<float>>(kQueries * room);
}
constexpr size_t kLeastShared = 163 << 10;  // what a block may have on sm_80
static_assert(filter_shared(kMostTiles, 128) <= kLeastShared && filter_shared(kMostTiles / 2, 256) <= kLeastShared);

}  // namespace

bool filter_supports(const KnnArgs<float>& a) {
  const int64_t rows = (a.candidates > a.queries ? a.candidates : a.queries) + kMostTiles * kStep;
  return a.channels >= 1 && a.channels <= INT32_MAX / 2 && a.k <= kMostListed && a.candidates <= INT32_MAX / 2 &&
         a.queries <= INT32_MAX / 2 && a.batch * rows / (kPackRows * kPackThreads / kWarp) < INT32_MAX && a.batch * a.channels < INT32_MAX;
}

size_t filter_workspace(const KnnArgs<float>& a) {
  Pieces pieces(nullptr);
  plan(a, pieces);
  return pieces.used();
}

cudaError_t search_filter(const KnnArgs<float>& a, void* workspace, cudaStream_t stream) {
  Pieces pieces(workspace);
  const Filter f = plan(a, pieces);
  const Search<float> search{a};
  const int parts = static_cast<int>((a.channels + kWarp - 1) / kWarp);
  cudaError_t status = launch(filter_centre, dim3(static_cast<unsigned>(a.batch * parts)), dim3(256), 0, stream, search,
                              f, parts);
  const auto pack = [&](bool as_points, bool as_queries, int64_t rows) {
    if (status != cudaSuccess) return;
    const int64_t warps = a.batch * ((rows + kPackRows - 1) / kPackRows), of_block = kPackThreads / kWarp;
    status = launch(filter_pack, dim3(static_cast<unsigned>((warps + of_block - 1) / of_block)), dim3(kPackThreads), 0,
                    stream, search, f, as_points, as_queries, rows);
  };
  const int64_t points = (a.candidates + kStep - 1) / kStep * kStep, queries = f.blocks * kQueries;
  if (a.self == Self::other_set) {
    pack(true, false, points);
    pack(false, true, queries);
  } else {
    pack(true, true, points > queries ? points : queries);
  }
  if (status == cudaSuccess)
    status = launch(f.tiles == kMostTiles ? knn_filter<kMostTiles> : knn_filter<kMostTiles / 2>, dim3(static_cast<unsigned>(a.batch * f.blocks)), dim3(kThreads),
                    filter_shared(f.tiles, room_of(a)), stream, search, f, room_of(a),
                    a.channels % 4 == 0 && reinterpret_cast<uintptr_t>(a.query) % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(a.points) % 16 == 0);
  return status;
}

}  // namespace crosspoint::cuda
