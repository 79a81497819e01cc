// Stands in for CUDA's header of this name: the device side, on fibres.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda_runtime_api.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __grid_constant__
// The watch is told of an atomic once, as an atomic.
#define SIMT_UNWATCHED __attribute__((noinline, no_sanitize_thread))

// --- places -----------------------------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// --- vectors ----------------------------------------------------------------------------------------------

#define SIMT_VECTOR2(T, name, align)           \
  struct alignas(align) name##2 { T x, y; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define SIMT_VECTOR3(T, name)                  \
  struct name##3 { T x, y, z; };               \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }
#define SIMT_VECTOR4(T, name, align)                 \
  struct alignas(align) name##4 { T x, y, z, w; };   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTOR2(float, float, 8)
SIMT_VECTOR2(double, double, 16)
SIMT_VECTOR2(int, int, 8)
SIMT_VECTOR2(unsigned, uint, 8)
SIMT_VECTOR2(short, short, 4)
SIMT_VECTOR2(unsigned short, ushort, 4)
SIMT_VECTOR2(long long, longlong, 16)
SIMT_VECTOR2(unsigned long long, ulonglong, 16)
SIMT_VECTOR3(float, float)
SIMT_VECTOR3(double, double)
SIMT_VECTOR3(int, int)
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
SIMT_VECTOR4(float, float, 16)
SIMT_VECTOR4(int, int, 16)
SIMT_VECTOR4(unsigned, uint, 16)
SIMT_VECTOR4(short, short, 8)
SIMT_VECTOR4(unsigned short, ushort, 8)
SIMT_VECTOR4(unsigned char, uchar, 4)
SIMT_VECTOR4(signed char, char, 4)

// --- barriers and warps -----------------------------------------------------------------------------------

inline void __syncthreads(SIMT_SITE) { simt::block_barrier(simt::Barrier::plain, false, {file, line}); }
inline int __syncthreads_count(int p, SIMT_SITE) { return simt::block_barrier(simt::Barrier::count, p, {file, line}); }
inline int __syncthreads_and(int p, SIMT_SITE) { return simt::block_barrier(simt::Barrier::all, p, {file, line}); }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::block_barrier(simt::Barrier::any, p, {file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::collective("__syncwarp", mask, nullptr, nullptr, {file, line}, true);
}

// Who is in the warp's current step is up to the machine: here, the caller alone, which is allowed.
inline unsigned __activemask() { return 1u << simt::lane(); }

namespace simt {

template <class T>
struct Shuffle {
  T value, result;
  int source;  // lane, or -1 for the caller's own value
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  Shuffle<T> slot{value, value, source};
  collective(
      name, mask, &slot,
      [](unsigned, void* const* slots) {
        for (int i = 0; i < 32; ++i) {
          auto* mine = static_cast<Shuffle<T>*>(slots[i]);
          if (mine == nullptr || mine->source < 0) continue;
          auto* other = static_cast<Shuffle<T>*>(slots[mine->source]);
          if (other == nullptr) fail("lane %d shuffles from lane %d, which the mask leaves out", i, mine->source);
          mine->result = other->value;
        }
      },
      site);
  return slot.result;
}

// The source of a shuffle inside the caller's segment of `width` lanes, -1 where it would leave it.
inline int segment_source(int position, int width) {
  const int first = static_cast<int>(lane()) & ~(width - 1);
  return position < 0 || position >= width ? -1 : first + position;
}

template <class T, class Combine>
T reduce(const char* name, unsigned mask, T value, Combine, Site site) {
  struct Slot {
    T value, result;
  } slot{value, value};
  collective(
      name, mask, &slot,
      [](unsigned members, void* const* slots) {
        T total{};
        bool first = true;
        for (int i = 0; i < 32; ++i)
          if (members >> i & 1u) {
            const T next = static_cast<Slot*>(slots[i])->value;
            total = first ? next : Combine{}(total, next);
            first = false;
          }
        for (int i = 0; i < 32; ++i)
          if (members >> i & 1u) static_cast<Slot*>(slots[i])->result = total;
      },
      site);
  return slot.result;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate, Site site) {
  struct Slot {
    unsigned bit, result;
  } slot{predicate ? 1u << lane() : 0u, 0};
  collective(
      name, mask, &slot,
      [](unsigned members, void* const* slots) {
        unsigned all = 0;
        for (unsigned left = members; left != 0; left &= left - 1) all |= static_cast<Slot*>(slots[__builtin_ctz(left)])->bit;
        for (unsigned left = members; left != 0; left &= left - 1) static_cast<Slot*>(slots[__builtin_ctz(left)])->result = all;
      },
      site);
  return slot.result;
}

// The lanes of the mask whose value has the same bits as the caller's.
template <class T>
unsigned match(const char* name, unsigned mask, T value, Site site) {
  struct Slot {
    T value;
    unsigned result;
  } slot{value, 0};
  collective(
      name, mask, &slot,
      [](unsigned members, void* const* slots) {
        for (int i = 0; i < 32; ++i)
          for (int j = 0; j < 32; ++j)
            if ((members >> i & 1u) && (members >> j & 1u) &&
                std::memcmp(&static_cast<Slot*>(slots[j])->value, &static_cast<Slot*>(slots[i])->value, sizeof(T)) == 0)
              static_cast<Slot*>(slots[i])->result |= 1u << j;
      },
      site);
  return slot.result;
}

struct Least { template <class T> T operator()(T a, T b) const { return b < a ? b : a; } };
struct Most { template <class T> T operator()(T a, T b) const { return a < b ? b : a; } };
struct Total { template <class T> T operator()(T a, T b) const { return a + b; } };
struct BitAnd { template <class T> T operator()(T a, T b) const { return a & b; } };
struct BitOr { template <class T> T operator()(T a, T b) const { return a | b; } };
struct BitXor { template <class T> T operator()(T a, T b) const { return a ^ b; } };

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  return simt::shuffle("__shfl_sync", mask, value, simt::segment_source(source & (width - 1), width), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_SITE) {
  const int position = static_cast<int>(simt::lane() & (width - 1)) - static_cast<int>(by);
  return simt::shuffle("__shfl_up_sync", mask, value, simt::segment_source(position, width), {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_SITE) {
  const int position = static_cast<int>(simt::lane() & (width - 1)) + static_cast<int>(by);
  return simt::shuffle("__shfl_down_sync", mask, value, simt::segment_source(position, width), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, SIMT_SITE) {
  // Across segments the hardware reads only earlier ones.
  const int source = static_cast<int>(simt::lane()) ^ with;
  const int last = (static_cast<int>(simt::lane()) | (width - 1));
  return simt::shuffle("__shfl_xor_sync", mask, value, source > last ? -1 : source, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot("__ballot_sync", mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot("__any_sync", mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot("__all_sync", mask, predicate != 0, {file, line}) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
  return simt::match("__match_any_sync", mask, value, {file, line});
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, SIMT_SITE) {
  *all = simt::match("__match_all_sync", mask, value, {file, line}) == mask;
  return *all ? mask : 0u;
}

#define SIMT_REDUCE(name, Combine, T) \
  inline T name(unsigned mask, T value, SIMT_SITE) { return simt::reduce(#name, mask, value, Combine{}, {file, line}); }
SIMT_REDUCE(__reduce_add_sync, simt::Total, unsigned)
SIMT_REDUCE(__reduce_add_sync, simt::Total, int)
SIMT_REDUCE(__reduce_min_sync, simt::Least, unsigned)
SIMT_REDUCE(__reduce_min_sync, simt::Least, int)
SIMT_REDUCE(__reduce_max_sync, simt::Most, unsigned)
SIMT_REDUCE(__reduce_max_sync, simt::Most, int)
SIMT_REDUCE(__reduce_and_sync, simt::BitAnd, unsigned)
SIMT_REDUCE(__reduce_or_sync, simt::BitOr, unsigned)
SIMT_REDUCE(__reduce_xor_sync, simt::BitXor, unsigned)

// --- memory -----------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
T __ldca(const T* p) { return *p; }
template <class T>
void __stcs(T* p, T value) { *p = value; }
template <class T>
void __stcg(T* p, T value) { *p = value; }

inline void __threadfence() { simt::fence(true); }
inline void __threadfence_block() { simt::fence(false); }
inline void __nanosleep(unsigned) { simt::pause(); }
[[noreturn]] inline void __trap() { simt::fail("__trap()"); }

namespace simt {
template <class T, class Update>
SIMT_UNWATCHED T atomic(T* address, T operand, Update update) {
  pause();
  atomic_access(address, sizeof(T));
  const T before = *address;
  *address = update(before, operand);
  return before;
}
struct Second { template <class T> T operator()(T, T b) const { return b; } };
struct Difference { template <class T> T operator()(T a, T b) const { return a - b; } };
template <class T>
struct IfEqual {
  T expected;
  T operator()(T a, T b) const { return a == expected ? b : a; }
};
}  // namespace simt

// As CUDA has them: int and unsigned of 32 bits, unsigned long long (and long long for min and max), float, double.
#define SIMT_ATOMIC(name, Update, T)                                                             \
  inline T name(T* address, T operand) { return simt::atomic(address, operand, Update{}); }      \
  inline T name##_block(T* address, T operand) { return simt::atomic(address, operand, Update{}); }
#define SIMT_ATOMIC_INTEGERS(name, Update) \
  SIMT_ATOMIC(name, Update, int)           \
  SIMT_ATOMIC(name, Update, unsigned)      \
  SIMT_ATOMIC(name, Update, unsigned long long)
SIMT_ATOMIC_INTEGERS(atomicAdd, simt::Total)
SIMT_ATOMIC(atomicAdd, simt::Total, float)
SIMT_ATOMIC(atomicAdd, simt::Total, double)
SIMT_ATOMIC(atomicSub, simt::Difference, int)
SIMT_ATOMIC(atomicSub, simt::Difference, unsigned)
SIMT_ATOMIC_INTEGERS(atomicMin, simt::Least)
SIMT_ATOMIC(atomicMin, simt::Least, long long)
SIMT_ATOMIC_INTEGERS(atomicMax, simt::Most)
SIMT_ATOMIC(atomicMax, simt::Most, long long)
SIMT_ATOMIC_INTEGERS(atomicAnd, simt::BitAnd)
SIMT_ATOMIC_INTEGERS(atomicOr, simt::BitOr)
SIMT_ATOMIC_INTEGERS(atomicXor, simt::BitXor)
SIMT_ATOMIC_INTEGERS(atomicExch, simt::Second)
SIMT_ATOMIC(atomicExch, simt::Second, float)
#define SIMT_CAS(T) \
  inline T atomicCAS(T* address, T expected, T desired) { return simt::atomic(address, desired, simt::IfEqual<T>{expected}); }
SIMT_CAS(int)
SIMT_CAS(unsigned)
SIMT_CAS(unsigned long long)

// --- arithmetic -------------------------------------------------------------------------------------------

namespace simt {
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
// Exact in double or wider, then rounded the given way.
inline float toward(double exact, bool up) {
  const float nearest = static_cast<float>(exact);
  if (up ? nearest < exact : nearest > exact) return std::nextafter(nearest, up ? INFINITY : -INFINITY);
  return nearest;
}
}  // namespace simt

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(both >> (8 * (pick & 7)) & 0xff);
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmul_rd(float a, float b) { return simt::toward(static_cast<double>(a) * b, false); }
inline float __fmul_ru(float a, float b) { return simt::toward(static_cast<double>(a) * b, true); }
// A sum of floats rounds once in double only where the exponents are far apart, and then outwards is still right
// to within one double ulp; two-sum says on which side.
inline float __fadd_ru(float a, float b) {
  const double s = static_cast<double>(a) + b, t = s - a, lost = (a - (s - t)) + (b - t);
  const float nearest = static_cast<float>(s);
  return nearest < s || (nearest == s && lost > 0) ? std::nextafter(nearest, INFINITY) : nearest;
}
inline float __fadd_rd(float a, float b) { return -__fadd_ru(-a, -b); }
inline float __fsub_ru(float a, float b) { return __fadd_ru(a, -b); }
inline float __fsub_rd(float a, float b) { return __fadd_rd(a, -b); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// Conversions saturate and turn NaN into 0, as on the device.
inline int __float2int_rz(float x) {
  if (!(x == x)) return 0;
  if (x >= 2147483648.0f) return std::numeric_limits<int>::max();
  if (x < -2147483648.0f) return std::numeric_limits<int>::min();
  return static_cast<int>(x);
}
inline int __float2int_rd(float x) { return __float2int_rz(std::floor(x)); }
inline int __float2int_ru(float x) { return __float2int_rz(std::ceil(x)); }
inline int __float2int_rn(float x) { return __float2int_rz(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) {
  if (!(x > 0.0f)) return 0;
  return x >= 4294967296.0f ? 0xffffffffu : static_cast<unsigned>(x);
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __double2float_ru(double x) { return simt::toward(x, true); }
inline float __double2float_rd(double x) { return simt::toward(x, false); }

#define SIMT_MIN_MAX(T)                                  \
  inline T min(T a, T b) { return b < a ? b : a; }       \
  inline T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
