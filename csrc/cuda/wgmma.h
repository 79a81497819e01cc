// What Hopper (sm_90a) has beside mma.h: products of a warpgroup (wgmma) that read shared memory through descriptors,
// copies of whole lines by the copy engine (cp.async.bulk), and the barriers that these report to (mbarrier).
#pragma once

#include "cuda/mma.h"
#include "cuda/panels.h"

namespace crosspoint::cuda {

inline constexpr int kWarpgroup = 128;  // threads

}  // namespace crosspoint::cuda

#if defined(CROSSPOINT_SIMT)
#include "simt_wgmma.h"
#else

namespace crosspoint::cuda {

// ---- barriers in shared memory

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// What a thread wrote to shared memory, barriers included, is there for the copy engine and for wgmma.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and keeps the phase open until `bytes` more have been copied.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity: the first has parity 0.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts to copy `bytes`, a multiple of 16 between addresses that are too, and reports them to the barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// ---- products of a warpgroup

// Moves registers between the warpgroups of a block: `count` for each thread of the calling one.
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Before the first product, and whenever registers that products read or add to were written by anything else.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// After the wait for what adds to d: keeps the compiler from moving what reads d before it.
template <int n>
__device__ __forceinline__ void wgmma_done(float (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

#define CROSSPOINT_R4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define CROSSPOINT_R16(n) CROSSPOINT_R4(n), CROSSPOINT_R4(n + 1), CROSSPOINT_R4(n + 2), CROSSPOINT_R4(n + 3)
#define CROSSPOINT_R32(n) CROSSPOINT_R16(n), CROSSPOINT_R16(n + 4)
#define CROSSPOINT_R64(n) CROSSPOINT_R32(n), CROSSPOINT_R32(n + 8)
#define CROSSPOINT_R128 CROSSPOINT_R64(0), CROSSPOINT_R64(16)
#define CROSSPOINT_D0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, " \
  "%8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define CROSSPOINT_D1 \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define CROSSPOINT_D2 \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define CROSSPOINT_D3 \
  "%96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"

#define CROSSPOINT_D01 CROSSPOINT_D0 ", " CROSSPOINT_D1
#define CROSSPOINT_D0123 CROSSPOINT_D01 ", " CROSSPOINT_D2 ", " CROSSPOINT_D3

// d (64, 8 n) += a b for a (64, 16) and b (16, 8 n), both K-major in shared memory; d = a b where not `add`.
#define CROSSPOINT_WGMMA_SHARED(name, type, N, D, a, b, p, ...)                                                \
  __device__ __forceinline__ void name(float (&d)[N / 8][4], uint64_t left, uint64_t right, bool add) {        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"                                              \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #type "." #type " {" D "}, "                \
                 "%" #a ", %" #b ", p, 1, 1, 0, 0;\n}\n"                                                       \
                 : __VA_ARGS__                                                                                 \
                 : "l"(left), "l"(right), "r"(static_cast<int>(add)));                                         \
  }
// d += a b for a in registers, laid out as for mma.sync, and b MN-major.
#define CROSSPOINT_WGMMA_REGISTERS(name, type, N, D, a0, a1, a2, a3, b, ...)                                   \
  __device__ __forceinline__ void name(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t right) {         \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #type "." #type " {" D "}, "                \
                 "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, 1;\n}\n"                         \
                 : __VA_ARGS__                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right));                                    \
  }
CROSSPOINT_WGMMA_SHARED(wgmma_bf16, bf16, 64, CROSSPOINT_D0, 32, 33, 34, CROSSPOINT_R32(0))
CROSSPOINT_WGMMA_SHARED(wgmma_bf16, bf16, 128, CROSSPOINT_D01, 64, 65, 66, CROSSPOINT_R64(0))
CROSSPOINT_WGMMA_REGISTERS(wgmma_bf16, bf16, 64, CROSSPOINT_D0, 32, 33, 34, 35, 36, CROSSPOINT_R32(0))
CROSSPOINT_WGMMA_REGISTERS(wgmma_bf16, bf16, 128, CROSSPOINT_D01, 64, 65, 66, 67, 68, CROSSPOINT_R64(0))
CROSSPOINT_WGMMA_REGISTERS(wgmma_bf16, bf16, 256, CROSSPOINT_D0123, 128, 129, 130, 131, 132, CROSSPOINT_R128)
CROSSPOINT_WGMMA_SHARED(wgmma_f16, f16, 64, CROSSPOINT_D0, 32, 33, 34, CROSSPOINT_R32(0))
CROSSPOINT_WGMMA_SHARED(wgmma_f16, f16, 128, CROSSPOINT_D01, 64, 65, 66, CROSSPOINT_R64(0))
CROSSPOINT_WGMMA_REGISTERS(wgmma_f16, f16, 64, CROSSPOINT_D0, 32, 33, 34, 35, 36, CROSSPOINT_R32(0))
CROSSPOINT_WGMMA_REGISTERS(wgmma_f16, f16, 128, CROSSPOINT_D01, 64, 65, 66, 67, 68, CROSSPOINT_R64(0))
CROSSPOINT_WGMMA_REGISTERS(wgmma_f16, f16, 256, CROSSPOINT_D0123, 128, 129, 130, 131, 132, CROSSPOINT_R128)

#undef CROSSPOINT_WGMMA_SHARED
#undef CROSSPOINT_WGMMA_REGISTERS
#undef CROSSPOINT_D0
#undef CROSSPOINT_D1
#undef CROSSPOINT_D2
#undef CROSSPOINT_D3
#undef CROSSPOINT_D01
#undef CROSSPOINT_D0123
#undef CROSSPOINT_R4
#undef CROSSPOINT_R16
#undef CROSSPOINT_R32
#undef CROSSPOINT_R64
#undef CROSSPOINT_R128

}  // namespace crosspoint::cuda

#endif
