// Up to 8 channels and clouds that fit shared memory. A warp takes some queries at a time. Its lanes split the
// cloud into groups; the n-th smallest of the groups' minima bounds the n-th distance, about 1.5 n points are
// within it, and these alone are ranked. Where they do not fit the list (duplicates), the warp goes through the
// cloud in order of index instead.
#pragma once

#include "cuda/knn_select.h"

namespace crosspoint::cuda {

inline constexpr int kCloudWarps = 4;
inline constexpr int kChunk = 1024;        // points that a warp goes through at a time: 32 of each lane
inline constexpr int kKeptQueries = 2;     // queries at a time where the distances stay in registers: one chunk
inline constexpr int kStreamedQueries = 4;  // where they are computed twice
inline constexpr int kCloudBlockQueries = 16;
inline constexpr int kCloudPad = 256;  // the cloud is padded to as many points
inline constexpr int kAtOnce = 4;      // points of a lane that it loads together
inline constexpr int64_t kMostCloudBytes = 96 << 10;

// One cloud in shared memory, (C, stride): NaN after the last point, zeros where the points have fewer channels. Points
// j, j + 32, j + 64 and j + 96 of each 128 lie side by side, for a lane to load at once.
template <int C>
struct SharedCloud {
  const float* values;
  int stride;

  __device__ __forceinline__ static int place(int j) { return (j & ~127) | (j & 31) << 2 | (j >> 5 & 3); }

  __device__ __forceinline__ float distance(int j, const float (&query)[C]) const {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) sum = add_square(sum, values[c * stride + place(j)], query[c]);
    return sum;
  }

  // Of the four points that the lane loads with point j; infinite where they are not `here`.
  template <int Q>
  __device__ __forceinline__ void distances(bool here, int j, const float (&query)[Q][C],
                                            float (&sums)[Q][kAtOnce]) const {
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) sums[q][e] = here ? 0.f : infinity<float>();
    if (!here) return;
    const float4* points = reinterpret_cast<const float4*>(values + place(j));
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float4 x = points[c * (stride / kAtOnce)];
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        sums[q][0] = add_square(sums[q][0], x.x, query[q][c]);
        sums[q][1] = add_square(sums[q][1], x.y, query[q][c]);
        sums[q][2] = add_square(sums[q][2], x.z, query[q][c]);
        sums[q][3] = add_square(sums[q][3], x.w, query[q][c]);
      }
    }
  }
};

// The list of one query by going through the whole cloud; sorted, at most `wanted`.
template <int C>
__device__ __forceinline__ int list_in_order(const SharedCloud<C>& cloud, int n, const float (&query)[C], int32_t own,
                                             int wanted, NeighbourKey<float>* keys, int room) {
  using Key = NeighbourKey<float>;
  KeyList<Key> list{keys, 0, Key::last()};
  for (int begin = 0; begin < n; begin += kWarp) {
    const int j = begin + lane_id();
    const bool exists = j < n && j != own;
    list.offer(exists, Key::of(exists ? comparable(cloud.distance(j, query)) : 0.f, j));
    if (list.count + kWarp <= room && (list.count < wanted || list.limit < Key::last())) continue;
    list.settle(wanted);
    if (list.limit.distance() == 0) return wanted;  // what comes later has a higher index and is no nearer
  }
  list.settle(wanted);
  return list.count;
}

template <int C>
size_t cloud_shared(int64_t stride, int queries, int room) {
  return shared_bytes<float>(C * stride) + shared_bytes<NeighbourKey<float>>(kCloudWarps * queries * room);
}

// `kept`: clouds of one chunk, whose distances stay in registers between the passes.
template <int C, bool kept>
__global__ void __launch_bounds__(kCloudWarps* kWarp, C == 3 && !kept ? 4 : 3)
    knn_cloud(Search<float> search, int stride, int room, int64_t blocks_per_cloud, int64_t blocks) {
  using Key = NeighbourKey<float>;
  constexpr int Q = kept ? kKeptQueries : kStreamedQueries;
  constexpr int steps = kChunk / kWarp, guarded = kCloudPad / kWarp;  // steps of a chunk; between looks at its end
  const KnnArgs<float>& a = search.args;
  const int channels = static_cast<int>(a.channels), lane = lane_id();
  SharedArena arena;
  float* values = arena.take<float>(C * stride);
  Key* keys = arena.take<Key>(kCloudWarps * Q * room) + threadIdx.x / kWarp * Q * room;
  const SharedCloud<C> cloud{values, stride};
  const int wanted = static_cast<int>(a.k - search.leading());

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t b = block / blocks_per_cloud, first = block % blocks_per_cloud * kCloudBlockQueries;
    const int64_t all = search.valid_queries(b);
    const int valid = static_cast<int>(all - first < kCloudBlockQueries ? all - first : kCloudBlockQueries);
    const int n = valid > 0 && wanted > 0 ? search.valid_points(b) : 0;
    const int padded = (n + kCloudPad - 1) / kCloudPad * kCloudPad;
    const float* points = search.points(b);
    __syncthreads();
    for (int j = threadIdx.x; j < padded; j += blockDim.x)
#pragma unroll
      for (int c = 0; c < C; ++c)
        values[c * stride + cloud.place(j)] = j >= n ? missing<float> : c < channels ? points[int64_t(j) * channels + c] : 0.f;
    __syncthreads();

    for (int q0 = threadIdx.x / kWarp * Q; n > 0 && q0 < valid; q0 += kCloudWarps * Q) {
      float query[Q][C], minima[Q][8];
      float kept_distance[kept ? Q : 1][kept ? steps : 1];
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        load_query(search.query(b, first + (q0 + q < valid ? q0 + q : q0)), channels, query[q]);
#pragma unroll
        for (int i = 0; i < 8; ++i) minima[q][i] = infinity<float>();
      }
      for (int begin = 0; begin < n; begin += kChunk) {
#pragma unroll(kept ? steps / guarded : 1)
        for (int i0 = 0; i0 < steps; i0 += guarded) {
          const bool here = begin + i0 * kWarp < padded;
#pragma unroll
          for (int i = 0; i < guarded; i += kAtOnce) {
            float d[Q][kAtOnce];
            cloud.distances(here, begin + (i0 + i) * kWarp + lane, query, d);
#pragma unroll
            for (int q = 0; q < Q; ++q)
#pragma unroll
              for (int e = 0; e < kAtOnce; ++e) {
                if constexpr (kept) kept_distance[q][i0 + i + e] = d[q][e];
                minima[q][i + e] = fminf(minima[q][i + e], d[q][e]);
              }
          }
        }
      }

      // A point counts as its own neighbour in the minima; it is taken out of the words of bits below.
      const int nth = wanted + (a.self == Self::other_set ? 0 : 1);
      float beyond[Q];  // the first number after the bound
      int count[Q];     // of the list; -1: it does not fit
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const float bound = nth_of_groups(minima[q], nth, keys);
        beyond[q] = __uint_as_float(__float_as_uint(bound) + 1);
        count[q] = bound < infinity<float>() ? 0 : -1;
      }
      for (int begin = 0; begin < n; begin += kChunk) {
        uint32_t words[Q] = {};  // bit 31 - i: whether this lane's point i of the chunk is within the bound
#pragma unroll(kept ? steps / guarded : 1)
        for (int i0 = 0; i0 < steps; i0 += guarded) {
          [[maybe_unused]] const bool here = begin + i0 * kWarp < padded;
#pragma unroll
          for (int i = 0; i < guarded; i += kAtOnce) {
            float d[Q][kAtOnce];
            if constexpr (!kept) cloud.distances(here, begin + (i0 + i) * kWarp + lane, query, d);
#pragma unroll
            for (int q = 0; q < Q; ++q)
#pragma unroll
              for (int e = 0; e < kAtOnce; ++e) {
                if constexpr (kept) d[q][e] = kept_distance[q][i0 + i + e];
                words[q] = __funnelshift_l(__float_as_uint(d[q][e] - beyond[q]), words[q], 1);
              }
          }
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const int own = search.own(first + q0 + q) - begin;
          if (own >= 0 && own < kChunk && own % kWarp == lane) words[q] &= ~(0x80000000u >> own / kWarp);
          int total;
          int place = sum_before(__popc(words[q]), total) + count[q];
          if (count[q] < 0 || count[q] + total > room) {
            count[q] = -1;
            continue;
          }
          count[q] += total;
          for (uint32_t word = words[q]; word != 0; ++place) {
            const int i = __clz(word), j = begin + i * kWarp + lane;
            word &= ~(0x80000000u >> i);
            keys[q * room + place] = Key::of(comparable(cloud.distance(j, query[q])), j);
          }
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int q = 0; q < Q && q0 + q < valid; ++q) {
        int listed = count[0];
#pragma unroll
        for (int other = 1; other < Q; ++other) listed = q == other ? count[other] : listed;
        const int64_t i = first + q0 + q;
        const Row<float> row = search.row(b, i);
        Key* list = keys + q * room;
        if (listed >= wanted && listed <= 2 * kWarp) {
          write_ranked(list, listed, wanted, row, search.leading());
          continue;
        }
        if (listed >= wanted) {
          sort_keys(list, listed);
        } else {
          float again[C];
          load_query(search.query(b, i), channels, again);
          listed = list_in_order(cloud, n, again, search.own(i), wanted, list, room);
        }
        for (int place = lane; place < wanted; place += kWarp) {
          if (place < listed)
            row.write(search.leading() + place, list[place]);
          else
            row.write_missing(search.leading() + place);
        }
      }
      __syncwarp();
    }
    search.write_rest(b, first, first + kCloudBlockQueries, n > 0 ? wanted : 0);
  }
}

}  // namespace crosspoint::cuda
