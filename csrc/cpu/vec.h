// A thin vector type over the compiler's vector extension: as wide as the variant's registers, arithmetic
// by operators.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(CROSSPOINT_ISA)
#error "CPU kernels are compiled once per instruction set, with CROSSPOINT_ISA naming the namespace"
#endif

namespace crosspoint::CROSSPOINT_ISA {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif

template <class T>
struct VecTraits {
  typedef T type __attribute__((vector_size(vector_bytes)));
};

template <class T>
using Vec = typename VecTraits<T>::type;

template <class T>
inline constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, a negative zero too, so the compiler drops the subtraction
}

// Elementwise; where either side is NaN the result is b, as the hardware's maximum has it.
template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V min(V a, V b) {
  return a < b ? a : b;
}

}  // namespace crosspoint::CROSSPOINT_ISA
