// A thin vector type over the compiler's vector extension: as wide as the variant's registers, arithmetic
// by operators.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// The first `valid` elements (or all), zeros beyond them.
template <class T>
inline Vec<T> load_part(const T* p, int64_t valid) {
  if (valid >= lanes<T>) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, valid * sizeof(T));
  return v;
}

template <class T>
inline void store_part(T* p, Vec<T> v, int64_t valid) {
  if (valid >= lanes<T>)
    store(p, v);
  else
    std::memcpy(p, &v, valid * sizeof(T));
}

template <class T>
inline T sum_lanes(Vec<T> v) {
  T line[lanes<T>];
  store(line, v);
  for (int half = lanes<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) line[l] += line[l + half];
  return line[0];
}

// Calls f(number of vectors as a constant, first column) over the block's columns.
template <class T, class F>
inline void over_columns(int64_t columns, F&& f) {
  constexpr int64_t L = lanes<T>;
  constexpr int most = vector_bytes == 64 ? 4 : 2;
  int64_t c = 0;
  for (; c + most * L <= columns; c += most * L) f(std::integral_constant<int, most>{}, c);
  if constexpr (most > 2)
    for (; c + 2 * L <= columns; c += 2 * L) f(std::integral_constant<int, 2>{}, c);
  for (; c < columns; c += L) f(std::integral_constant<int, 1>{}, c);
}

}  // namespace crosspoint::CROSSPOINT_ISA
