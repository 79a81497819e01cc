// One kernel per mistake, and its repaired twin (broken = false). Every twin reverses the 64 numbers of each of two
// blocks, or all 128 where blocks exchange them.
#include "cuda/wgmma.h"

using namespace crosspoint::cuda;

namespace {

constexpr int kThreads = 64, kBlocks = 2, kCount = kThreads * kBlocks;

struct Data {
  const int* x;
  int* y;
  int* scratch;      // kCount, unwritten
  unsigned* ticket;  // zero
};

__device__ int place() { return static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x); }
__device__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ int mirrored() { return kThreads - 1 - thread(); }

template <bool broken>
__global__ void missing_barrier(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  s[thread()] = d.x[place()];
  if (!broken) __syncthreads();
  d.y[place()] = s[mirrored()];
}

// The buffer is filled again while others still read it.
template <bool broken>
__global__ void missing_second_barrier(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  for (int round = 0; round < 2; ++round) {
    s[thread()] = round == 0 ? d.x[place()] : -1;
    __syncthreads();
    if (round == 0) d.y[place()] = s[mirrored()];
    if (!broken) __syncthreads();
  }
}

template <bool broken>
__global__ void missing_warp_barrier(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  s[thread()] = d.x[place()];
  if (!broken) __syncwarp();
  const int v = s[thread() ^ 31];
  __syncthreads();
  s[thread() ^ 32] = v;
  __syncthreads();
  d.y[place()] = s[thread()];
}

// A shuffle orders no memory.
template <bool broken>
__global__ void shuffle_for_a_barrier(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  s[thread()] = d.x[place()];
  (void)__shfl_sync(kAllLanes, 0, 0);
  if (!broken) __syncthreads();
  const int v = s[thread() ^ 31];
  __syncthreads();
  s[thread() ^ 32] = v;
  __syncthreads();
  d.y[place()] = s[thread()];
}

template <bool broken>
__global__ void mask_without_the_caller(Data d) {
  const int v = __shfl_xor_sync(broken ? 0x0000ffffu : kAllLanes, d.x[place()], 31);
  d.y[place() ^ 32] = v;
}

template <bool broken>
__global__ void mask_with_a_lane_elsewhere(Data d) {
  int v = d.x[place()];
  if (thread() % 32 < 16) {
    v = __shfl_xor_sync(broken ? kAllLanes : 0x0000ffffu, v, 15);
  } else {
    v = __shfl_xor_sync(0xffff0000u, v, 15);
  }
  d.y[place() ^ 48] = v;
}

template <bool broken>
__global__ void mask_with_a_lane_that_left(Data d) {
  if (broken && thread() == 40) return;
  d.y[place() ^ 32] = __shfl_xor_sync(kAllLanes, d.x[place()], 31);
}

template <bool broken>
__global__ void shuffle_from_outside_the_mask(Data d) {
  int v = d.x[place()];
  const unsigned mine = thread() % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const int with = __shfl_xor_sync(broken ? mine : kAllLanes, v, 31);
  d.y[place() ^ 32] = with;
}

template <bool broken>
__global__ void shared_overrun(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  CROSSPOINT_SHARED(other, int[kThreads]);
  s[broken ? thread() + 1 : thread()] = d.x[place()];
  other[thread()] = 0;
  __syncthreads();
  d.y[place()] = s[mirrored()] + other[thread()];
}

template <bool broken>
__global__ void shared_overrun_by_reading(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  s[thread()] = d.x[place()];
  __syncthreads();
  d.y[place()] = s[broken ? mirrored() + 1 : mirrored()];
}

template <bool broken>
__global__ void dynamic_shared_overrun(Data d) {
  SharedArena arena;
  int* s = arena.take<int>(kThreads);
  int* other = arena.take<int>(kThreads);
  s[thread()] = d.x[place()];
  other[broken ? thread() - 1 : thread()] = 0;
  __syncthreads();
  d.y[place()] = s[mirrored()];
}

template <bool broken>
__global__ void more_dynamic_shared_than_launched(Data d) {
  SharedArena arena;
  int* s = arena.take<int>(broken ? 2 * kThreads + 1 : kThreads);
  s[thread()] = d.x[place()];
  __syncthreads();
  d.y[place()] = s[mirrored()];
}

template <bool broken>
__global__ void uninitialised_shared(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  if (!broken || thread() != 5) s[thread()] = 0;
  s[thread()] += d.x[place()];
  __syncthreads();
  d.y[place()] = s[mirrored()];
}

template <bool broken>
__global__ void uninitialised_workspace(Data d) {
  if (!broken || thread() != 5) d.scratch[place()] = 0;
  d.scratch[place()] += d.x[place()];
  __syncthreads();
  d.y[place()] = d.scratch[static_cast<int>(blockIdx.x) * kThreads + mirrored()];
}

template <bool broken>
__global__ void missing_copy_wait(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  cp_async<4>(&s[thread()], &d.x[place()]);
  cp_async_commit();
  if (!broken) cp_async_wait<0>();
  __syncthreads();
  d.y[place()] = s[mirrored()];
  cp_async_wait<0>();
}

// The copy engine's copy is read before its barrier was waited for.
template <bool broken>
__global__ void missing_bulk_wait(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  CROSSPOINT_SHARED(barrier, uint64_t);
  if (thread() == 0) barrier_init(&barrier, 1);
  __syncthreads();
  if (thread() == 0) {
    barrier_arrive_expecting(&barrier, sizeof s);
    copy_bulk(s, &d.x[place()], sizeof s, &barrier);
  }
  if (!broken) barrier_wait(&barrier, 0);
  d.y[place()] = s[mirrored()];
  barrier_wait(&barrier, 0);
}

// It copies over what others still read.
template <bool broken>
__global__ void bulk_copy_over_what_is_read(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  CROSSPOINT_SHARED(barriers, uint64_t[2]);
  if (thread() < 2) barrier_init(&barriers[thread()], 1);
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    if (thread() == 0) {
      barrier_arrive_expecting(&barriers[round], sizeof s);
      copy_bulk(s, &d.x[round == 0 ? place() : (1 - static_cast<int>(blockIdx.x)) * kThreads], sizeof s, &barriers[round]);
    }
    barrier_wait(&barriers[round], 0);
    if (round == 0) d.y[place()] = s[mirrored()];
    if (!broken) __syncthreads();
  }
}

template <bool broken>
__global__ void barrier_short_of_an_arrival(Data d) {
  CROSSPOINT_SHARED(barrier, uint64_t);
  if (thread() == 0) barrier_init(&barrier, broken ? kThreads + 1 : kThreads);
  __syncthreads();
  barrier_arrive(&barrier);
  barrier_wait(&barrier, 0);
  d.y[place()] = d.x[place() + mirrored() - thread()];
}

struct alignas(1024) Panel {
  uint64_t v[1024];
};

// Its sums are used while the tensor cores are at them.
template <bool broken>
__global__ void missing_product_wait(Data d) {
  CROSSPOINT_SHARED(panel, Panel);
  for (int i = thread(); i < 1024; i += kThreads) panel.v[i] = 0;
  __syncthreads();
  float sum[8][4] = {};
  const uint64_t operand = panel_descriptor(shared_address(&panel));
  wgmma_fence();
  wgmma_bf16(sum, operand, operand, true);
  wgmma_commit();
  if (!broken) wgmma_wait<0>();
  d.y[place()] = d.x[place() + mirrored() - thread()] + static_cast<int>(sum[0][0]);
}

template <bool broken>
__global__ void divergent_barrier(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  s[thread()] = d.x[place()];
  if (broken && thread() < 20) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  d.y[place()] = s[mirrored()];
}

template <>
__global__ void divergent_barrier<false>(Data d) {
  missing_barrier<false>(d);
}

template <bool broken>
__global__ void return_before_a_barrier(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  s[thread()] = d.x[place()];
  if (broken && thread() >= 50) return;
  __syncthreads();
  d.y[place()] = s[mirrored()];
}

template <bool broken>
__global__ void barrier_that_a_warp_does_not_reach(Data d) {
  CROSSPOINT_SHARED(s, int[kThreads]);
  s[thread()] = d.x[place()];
  if (!broken || thread() != 3) __syncthreads();
  __syncwarp();
  d.y[place()] = s[mirrored()];
}

// Two blocks read what each other writes; the twin does so in two launches.
template <bool broken>
__global__ void race_between_blocks(Data d, int step) {
  if (broken || step == 0) d.scratch[place()] = d.x[place()];
  if (broken ? step == 0 : step == 1) d.y[place()] = d.scratch[kCount - 1 - place()];
}

template <bool broken>
__global__ void lost_update_between_blocks(Data d) {
  if (thread() == 0) {
    if (broken) {
      *d.ticket += 1;
    } else {
      atomicAdd(d.ticket, 1u);
    }
  }
  d.y[place()] = d.x[place() ^ (kThreads - 1)];
}

template <bool broken>
__global__ void missing_fence(Data d) {
  CROSSPOINT_SHARED(last, bool);
  d.scratch[place()] = d.x[place()];
  __syncthreads();
  if (thread() == 0) {
    if (!broken) __threadfence();
    last = atomicAdd(d.ticket, 1u) == kBlocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (last)
    for (int i = thread(); i < kCount; i += kThreads) d.y[i] = d.scratch[kCount - 1 - i];
}

template <bool broken>
__global__ void buffer_overrun(Data d) {
  d.y[broken ? place() + 1 : place()] = d.x[place() ^ (kThreads - 1)];
}

template <bool broken>
__global__ void buffer_overrun_by_reading(Data d) {
  d.y[place()] = d.x[(place() ^ (kThreads - 1)) + (broken ? 1 : 0)];
}

template <bool broken>
__global__ void write_to_an_input(Data d) {
  const int v = d.x[place() ^ (kThreads - 1)];
  __syncthreads();
  if (broken) const_cast<int*>(d.x)[place()] = 0;
  d.y[place()] = v;
}

template <class Kernel>
cudaError_t run(Kernel kernel, const Data& d) {
  return launch(kernel, kBlocks, kThreads, 2 * shared_bytes<int>(kThreads), nullptr, d);
}

template <bool broken>
cudaError_t run_case(const char* name, const Data& d) {
#define CASE(kernel) \
  if (std::strcmp(name, #kernel) == 0) return run(kernel<broken>, d);
  CASE(missing_barrier)
  CASE(missing_second_barrier)
  CASE(missing_warp_barrier)
  CASE(shuffle_for_a_barrier)
  CASE(mask_without_the_caller)
  CASE(mask_with_a_lane_elsewhere)
  CASE(mask_with_a_lane_that_left)
  CASE(shuffle_from_outside_the_mask)
  CASE(shared_overrun)
  CASE(shared_overrun_by_reading)
  CASE(dynamic_shared_overrun)
  CASE(more_dynamic_shared_than_launched)
  CASE(uninitialised_shared)
  CASE(uninitialised_workspace)
  CASE(missing_copy_wait)
  CASE(missing_bulk_wait)
  CASE(bulk_copy_over_what_is_read)
  CASE(barrier_short_of_an_arrival)
  CASE(missing_product_wait)
  CASE(divergent_barrier)
  CASE(return_before_a_barrier)
  CASE(barrier_that_a_warp_does_not_reach)
  CASE(lost_update_between_blocks)
  CASE(missing_fence)
  CASE(buffer_overrun)
  CASE(buffer_overrun_by_reading)
  CASE(write_to_an_input)
#undef CASE
  if (std::strcmp(name, "race_between_blocks") != 0) return cudaErrorInvalidValue;
  const cudaError_t first = launch(race_between_blocks<broken>, kBlocks, kThreads, 0, nullptr, d, 0);
  return broken || first != cudaSuccess ? first : launch(race_between_blocks<broken>, kBlocks, kThreads, 0, nullptr, d, 1);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) cudaError_t planted(const char* name, int64_t broken, const int* x, int* y,
                                                                     int* scratch, unsigned* ticket) {
  const Data d{x, y, scratch, ticket};
  return broken != 0 ? run_case<true>(name, d) : run_case<false>(name, d);
}
