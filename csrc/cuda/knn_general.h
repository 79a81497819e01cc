// Any channels, points and k: tiles of points and of channels pass through shared memory, a thread sums the
// differences of 4 queries to 4 points at a time in registers. More than kMostListed neighbours take several
// rounds, each of which looks for those that come after the last one of the round before.
#pragma once

#include "cuda/knn_list.h"

namespace crosspoint::cuda {

inline constexpr int kGeneralWarps = 4;
inline constexpr int kGeneralOwn = 4;                             // queries of a warp, and points of a lane
inline constexpr int kGeneralQueries = kGeneralWarps * kGeneralOwn;  // of a block
inline constexpr int kGeneralTile = kGeneralOwn * kWarp;          // points of a tile
inline constexpr int kGeneralDepth = 16;                          // channels of a tile
inline constexpr int kGeneralStride = kGeneralTile + 2;           // keeps the transposed stores off each other's banks

template <class T>
size_t general_shared() {
  return shared_bytes<T>(kGeneralDepth * kGeneralStride) + shared_bytes<T>(kGeneralDepth * kGeneralQueries) +
         shared_bytes<NeighbourKey<T>>(kGeneralQueries * kListRoom);
}

template <class T>
__global__ void __launch_bounds__(kGeneralWarps* kWarp, sizeof(T) == 4 ? 3 : 2)
    knn_general(Search<T> search, int64_t blocks_per_cloud, int64_t blocks) {
  using Key = NeighbourKey<T>;
  constexpr int own = kGeneralOwn;
  const KnnArgs<T>& a = search.args;
  SharedArena arena;
  T* points = arena.take<T>(kGeneralDepth * kGeneralStride);    // (channel, point)
  T* queries = arena.take<T>(kGeneralDepth * kGeneralQueries);  // (channel, query)
  Key* keys = arena.take<Key>(kGeneralQueries * kListRoom);
  const int warp = threadIdx.x / kWarp, lane = lane_id();

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t b = block / blocks_per_cloud, first = block % blocks_per_cloud * kGeneralQueries;
    const int64_t valid = search.valid_queries(b);
    const int32_t n = first < valid ? search.valid_points(b) : 0;
    const T* cloud = search.points(b);
    const int64_t wanted = a.k - search.leading();  // neighbours of a row besides itself

    Key floor[own];
#pragma unroll
    for (int q = 0; q < own; ++q) floor[q] = Key::first();
    for (int64_t done = 0; done < wanted && done < n; done += kMostListed) {
      const int most = static_cast<int>(wanted - done < kMostListed ? wanted - done : kMostListed);
      KeyList<Key> list[own];
#pragma unroll
      for (int q = 0; q < own; ++q) list[q] = {keys + (warp * own + q) * kListRoom, 0, Key::last()};

      for (int32_t begin = 0; begin < n; begin += kGeneralTile) {
        const int here = n - begin < kGeneralTile ? n - begin : kGeneralTile;
        T sum[own][own] = {};
        for (int64_t c0 = 0; c0 < a.channels; c0 += kGeneralDepth) {
          const int depth = static_cast<int>(a.channels - c0 < kGeneralDepth ? a.channels - c0 : kGeneralDepth);
          __syncthreads();
          for (int i = threadIdx.x; i < here * depth; i += blockDim.x) {
            const int p = i / depth, c = i % depth;
            points[c * kGeneralStride + p] = cloud[(begin + int64_t(p)) * a.channels + c0 + c];
          }
          for (int i = threadIdx.x; i < kGeneralQueries * depth; i += blockDim.x) {
            const int q = i / depth, c = i % depth;
            queries[c * kGeneralQueries + q] = first + q < valid ? search.query(b, first + q)[c0 + c] : T(0);
          }
          for (int i = threadIdx.x; i < (kGeneralTile - here) * depth; i += blockDim.x)
            points[i % depth * kGeneralStride + here + i / depth] = T(0);
          __syncthreads();
          for (int c = 0; c < depth; ++c) {
            T x[own];
#pragma unroll
            for (int p = 0; p < own; ++p) x[p] = points[c * kGeneralStride + p * kWarp + lane];
#pragma unroll
            for (int q = 0; q < own; ++q) {
              const T y = queries[c * kGeneralQueries + warp * own + q];
#pragma unroll
              for (int p = 0; p < own; ++p) sum[q][p] = add_square(sum[q][p], x[p], y);
            }
          }
        }
#pragma unroll
        for (int q = 0; q < own; ++q) {
          const int32_t itself = search.own(first + warp * own + q);
#pragma unroll
          for (int p = 0; p < own; ++p) {
            const int32_t j = begin + p * kWarp + lane;
            const Key key = Key::of(comparable(sum[q][p]), j);
            list[q].offer(j < n && j != itself && floor[q] < key, key);
          }
        }
#pragma unroll
        for (int q = 0; q < own; ++q) {
          // The first limit comes early, later ones when the room is needed.
          const bool unlimited = !(list[q].limit < Key::last());
          if (list[q].count + kGeneralTile > kListRoom || (unlimited && list[q].count >= most)) list[q].settle(most);
        }
      }
#pragma unroll
      for (int q = 0; q < own; ++q) {
        const int64_t i = first + warp * own + q;
        list[q].settle(most);
        if (i < valid) {
          const Row<T> row = search.row(b, i);
          for (int place = lane; place < list[q].count; place += kWarp)
            row.write(search.leading() + done + place, list[q].keys[place]);
          for (int place = list[q].count + lane; place < most; place += kWarp)
            row.write_missing(search.leading() + done + place);
        }
        floor[q] = list[q].count > 0 ? list[q].keys[list[q].count - 1] : Key::last();
        __syncwarp();
      }
    }
    const int64_t rounds = ((wanted < n ? wanted : n) + kMostListed - 1) / kMostListed;
    search.write_rest(b, first, first + kGeneralQueries, rounds * kMostListed);
  }
}

}  // namespace crosspoint::cuda
