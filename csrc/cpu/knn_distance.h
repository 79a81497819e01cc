// Squared distances by direct differences. For a given number of channels every path of this backend sums in
// the same order, so that equal pairs get equal distances wherever they are computed.
#pragma once

#include <cstdint>

#include "knn_select.h"

namespace crosspoint::CROSSPOINT_ISA {

// Up to here distances are summed channel by channel, points side by side in a vector; beyond, channels are
// side by side.
inline constexpr int64_t kFewChannels = 8;

// sum + d * d, rounded once where the processor can.
template <class T>
inline Vec<T> add_square(Vec<T> sum, Vec<T> d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 x = reinterpret_cast<__m512>(d);
    return reinterpret_cast<Vec<T>>(_mm512_fmadd_ps(x, x, reinterpret_cast<__m512>(sum)));
  } else {
    const __m512d x = reinterpret_cast<__m512d>(d);
    return reinterpret_cast<Vec<T>>(_mm512_fmadd_pd(x, x, reinterpret_cast<__m512d>(sum)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256 x = reinterpret_cast<__m256>(d);
    return reinterpret_cast<Vec<T>>(_mm256_fmadd_ps(x, x, reinterpret_cast<__m256>(sum)));
  } else {
    const __m256d x = reinterpret_cast<__m256d>(d);
    return reinterpret_cast<Vec<T>>(_mm256_fmadd_pd(x, x, reinterpret_cast<__m256d>(sum)));
  }
#else
  return sum + d * d;
#endif
}

template <class T>
inline bool all_finite(const T* x, int64_t n) {
  Vec<T> sum = {};  // 0 * x is NaN where x is not finite
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) sum += load(x + i) * splat(T(0));
  T rest = 0;
  for (; i < n; ++i) rest += x[i] * T(0);
  for (int lane = 0; lane < lanes<T>; ++lane) rest += sum[lane];
  return rest == T(0);
}

// ---- few channels: panels of points, channel by channel

template <class T>
inline constexpr int64_t kPanel = Tile<T>::columns;

// points (n, channels) as panels of depth x kPanel, zeros beyond n and beyond channels.
template <class T>
inline void pack_points(const T* points, int64_t n, int64_t channels, int64_t depth, T* out) {
  for (int64_t j = 0; j < n; j += kPanel<T>, out += depth * kPanel<T>) {
    const int64_t width = std::min(kPanel<T>, n - j);
    for (int64_t c = 0; c < depth; ++c) {
      T* line = out + c * kPanel<T>;
      const bool real = c < channels;
      for (int64_t i = 0; i < kPanel<T>; ++i)
        line[i] = real && i < width ? points[(j + i) * channels + c] : T(0);
    }
  }
}

// out[q * stride + j] = squared distance of query q to point j of the panels; NaN is made +inf, unless all is
// finite anyway.
template <class T, int C, int Q, bool finite>
inline void panel_distances(const T* panels, int64_t count, const T* query, T* out, int64_t stride) {
  constexpr int64_t L = lanes<T>;
  for (int64_t p = 0; p < count; ++p, panels += C * kPanel<T>, out += kPanel<T>) {
    Vec<T> sum[Q][2] = {};
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec<T> x0 = load(panels + c * kPanel<T>), x1 = load(panels + c * kPanel<T> + L);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const Vec<T> own = splat(query[q * C + c]);
        sum[q][0] = add_square<T>(sum[q][0], x0 - own);
        sum[q][1] = add_square<T>(sum[q][1], x1 - own);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      store(out + q * stride, finite ? sum[q][0] : least<T>(sum[q][0], splat(infinity<T>)));
      store(out + q * stride + L, finite ? sum[q][1] : least<T>(sum[q][1], splat(infinity<T>)));
    }
  }
}

// ---- many channels: rows of channels, zero-padded to whole vectors

template <class T, int... I>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{I...});
#endif
}

// Lane l of the result takes segment (l / H) / 2 of a or b, whichever parity says; its lower half plus its
// upper half.
template <class T, int H, int... I>
inline Vec<T> fold_pair(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int L = lanes<T>;
  return shuffle<T>(a, b, std::integer_sequence<int, (I / H / 2 * 2 * H + I % H + (I / H % 2) * L)...>{}) +
         shuffle<T>(a, b, std::integer_sequence<int, (I / H / 2 * 2 * H + I % H + H + (I / H % 2) * L)...>{});
}

// Lane i of the result is the sum of the lanes of v[i], halves added first.
template <class T, int H = lanes<T> / 2>
inline Vec<T> fold(Vec<T>* v) {
  for (int i = 0; i < H; ++i)
    v[i] = fold_pair<T, H>(v[i], v[i + H], std::make_integer_sequence<int, lanes<T>>{});
  if constexpr (H == 1)
    return v[0];
  else
    return fold<T, H / 2>(v);
}

// Points as rows of `width` values, a whole number of vectors; the rows are the caller's where those are wide
// enough.
template <class T>
struct Rows {
  const T* data;
  int64_t width;

  const T* row(int64_t i) const { return data + i * width; }
};

// out[i] = squared distance of `query` to the point index[i], NaN made +inf, for i in [0, n); written up to
// whole vectors.
template <class T>
inline void row_distances(const T* query, Rows<T> points, const int32_t* index, int64_t n, T* out) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < n; i += L) {
    const int here = static_cast<int>(std::min<int64_t>(L, n - i));
    Vec<T> sum[L];
    for (int j = 0; j < L; ++j) sum[j] = Vec<T>{};
    for (int j = 0; j < here; ++j) {
      const T* other = points.row(index[i + j]);
      Vec<T> total = {};
      for (int64_t c = 0; c < points.width; c += L)
        total = add_square<T>(total, load(other + c) - load(query + c));
      sum[j] = total;
    }
    store(out + i, least<T>(fold<T>(sum), splat(infinity<T>)));
  }
}

}  // namespace crosspoint::CROSSPOINT_ISA
