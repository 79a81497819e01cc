// Gathers by slices: a block for a slice of a cloud's channels (and a part of its nodes), four channels a thread.
#pragma once

#include "cuda/rows.h"

namespace crosspoint::cuda {

inline constexpr int kSliceThreads = 512;
template <class T>
inline constexpr int kSliceBlocks = sizeof(T) == 4 ? 2 : 1;  // of a multiprocessor, as far as registers go
inline constexpr int64_t kMostShared = 96 << 10;  // leaves room for two blocks, and fits every chip since sm_80
inline constexpr int64_t kWidest = 16;            // channels of a slice: 64 kB of a cloud of 1,024 nodes
inline constexpr int64_t kEnoughBlocks = 256;     // about two on each multiprocessor

struct Slices {
  int64_t batch, n, channels, width, parts;  // width: channels of a slice, a multiple of four
  bool shared;                               // the slice of all nodes in shared memory, else read where it is

  __host__ __device__ int64_t count() const { return (channels + width - 1) / width; }
  __host__ __device__ int64_t pieces() const { return batch * count() * parts; }
};

template <class T>
Slices slices_of(int64_t batch, int64_t n, int64_t channels) {
  Slices s{batch, n, channels, kWidest, 1, true};
  while (s.width > kFour && (channels <= s.width / 2 || n * s.width * int64_t(sizeof(T)) > kMostShared))
    s.width /= 2;
  s.shared = n * s.width * int64_t(sizeof(T)) <= kMostShared;
  if (!s.shared) s.width = channels <= kFour ? kFour : channels <= 2 * kFour ? 2 * kFour : kWidest;
  const int64_t at_once = kSliceThreads / (s.width / kFour), most = (n + at_once - 1) / at_once;
  const int64_t wanted = (kEnoughBlocks + s.pieces() - 1) / s.pieces();
  s.parts = !s.shared ? most : wanted < most ? wanted : most;
  return s;
}

// One piece of a gather: which cloud, channels and nodes, and the rows to gather.
template <class T, bool shared>
struct Piece {
  int64_t b, first, last;  // nodes [first, last)
  int64_t c;               // this thread's first channel
  int count;               // of its four channels, those that exist
  int node;                // this thread's place among those that work on a node each
  int at_once;
  const T* rows;
  int64_t stride;
  bool whole;

  // `table` has `row_stride` elements a node; the slice's columns of all nodes are copied to `space`. The whole block
  // calls.
  __device__ Piece(const Slices& s, int64_t piece, const T* table, int64_t row_stride, bool fours, T* space) {
    const int per_node = static_cast<int>(s.width / kFour), slices = static_cast<int>(s.count());
    const int64_t part = piece % s.parts, slice = piece / s.parts % slices;
    b = piece / s.parts / slices;
    at_once = kSliceThreads / per_node;
    node = threadIdx.x / per_node;
    const int mine = threadIdx.x % per_node * kFour;
    c = slice * s.width + mine;
    count = part_of_four(s.channels - c);
    first = part * s.n / s.parts;
    last = (part + 1) * s.n / s.parts;
    table += b * s.n * row_stride + c;
    if constexpr (shared) {
      __syncthreads();  // the piece before is done with the space
      for (int64_t j = node; j < s.n; j += at_once)
        values_at<kFour>(space + j * s.width + mine) = load_four<T>(table + j * row_stride, count, fours);
      __syncthreads();
      rows = space + mine, stride = s.width, whole = true;
    } else {
      rows = table, stride = row_stride, whole = fours;
    }
  }

  __device__ __forceinline__ Four<T> row(int64_t j) const {
    if constexpr (shared) return values_at<kFour>(rows + j * stride);
    return load_four<T>(rows + j * stride, count, whole);
  }
};

// Launches kernel(args, slices, fours): the one with its slices in shared memory, or that which reads rows where they are.
template <class T, class Args>
cudaError_t launch_slices(void (*shared)(Args, Slices, bool), void (*direct)(Args, Slices, bool), const Args& args,
                          const Slices& s, cudaStream_t stream) {
  const size_t bytes = s.shared ? shared_bytes<T>(s.n * s.width) : 0;
  return launch(s.shared ? shared : direct, grid_for(s.pieces()), dim3(kSliceThreads), bytes, stream, args, s, by_fours(s.channels));
}

}  // namespace crosspoint::cuda
