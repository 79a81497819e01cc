// csrc/cuda/mma.h on fibres. Products are exact, sums are taken in double and cut to float: close to what tensor
// cores do, and no evidence of it.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace simt {

inline float cut(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Tf32 {
  static constexpr int depth = 8, packed = 1;
  static float value(uint32_t bits, int) { return bits_of(bits & 0xffffe000u); }
  static float bits_of(uint32_t bits) { return simt::bits<float>(bits); }
};
struct Bf16 {
  static constexpr int depth = 16, packed = 2;
  static float value(uint32_t bits, int half) { return simt::bits<float>((bits >> (16 * half) & 0xffffu) << 16); }
};
struct F16 {
  static constexpr int depth = 16, packed = 2;
  static float value(uint32_t bits, int half) { return half_to_float(static_cast<uint16_t>(bits >> (16 * half))); }
};

// d (16, 8) += a (16, depth) b (depth, 8). Lane 4 g + t holds rows g and g + 8 of a and d, column g of b; a
// register holds `packed` neighbours along the depth.
template <class Kind>
void warp_product(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  struct Slot {
    float* d;
    const uint32_t *a, *b;
  } slot{d, a, b};
  collective(
      name, 0xffffffffu, &slot,
      [](unsigned, void* const* slots) {
        constexpr int packed = Kind::packed, depth = Kind::depth;
        float left[16][depth], right[depth][8];
        for (int lane = 0; lane < 32; ++lane) {
          const Slot& from = *static_cast<Slot*>(slots[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int half = 0; half < packed; ++half)
            for (int part = 0; part < 2; ++part) {
              const int k = t * packed + half + part * depth / 2;
              left[g][k] = Kind::value(from.a[2 * part], half);
              left[g + 8][k] = Kind::value(from.a[2 * part + 1], half);
              right[k][g] = Kind::value(from.b[part], half);
            }
        }
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float& total = static_cast<Slot*>(slots[lane])->d[i];
            double sum = total;
            for (int k = 0; k < depth; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
            total = cut(sum);
          }
      },
      site);
}

template <int matrices, bool transposed>
void load_matrices(uint32_t* r, const void* row, Site site) {
  struct Slot {
    uint32_t* r;
    const unsigned char* row;
  } slot{r, static_cast<const unsigned char*>(row)};
  if (static_cast<int>(lane()) < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a row that starts at no multiple of 16 bytes");
    touch(row, 16, false, __builtin_return_address(0));
  }
  collective(
      "ldmatrix", 0xffffffffu, &slot,
      [](unsigned, void* const* slots) {
        for (int lane = 0; lane < 32; ++lane)
          for (int m = 0; m < matrices; ++m) {
            const auto element = [&](int i, int j) {
              uint16_t value;
              std::memcpy(&value, static_cast<Slot*>(slots[8 * m + i])->row + 2 * j, 2);
              return static_cast<uint32_t>(value);
            };
            const int i = lane / 4, j = lane % 4 * 2;
            static_cast<Slot*>(slots[lane])->r[m] = transposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
          }
      },
      site);
}

}  // namespace simt

namespace crosspoint::cuda {

inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline uint32_t pack_bf16(float low, float high) {
  return static_cast<uint32_t>(simt::float_to_bf16(high)) << 16 | simt::float_to_bf16(low);
}

inline uint32_t pack_f16(float low, float high) {
  return static_cast<uint32_t>(simt::float_to_half(high)) << 16 | simt::float_to_half(low);
}

inline float fast_exp2(float x) { return std::exp2(x) < 1.17549435e-38f ? 0.0f : std::exp2(x); }

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  simt::warp_product<simt::Tf32>("mma_tf32", d, a, b, {file, line});
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  simt::warp_product<simt::Bf16>("mma_bf16", d, a, b, {file, line});
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  simt::warp_product<simt::F16>("mma_f16", d, a, b, {file, line});
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_SITE) { simt::load_matrices<4, false>(r, row, {file, line}); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_SITE) { simt::load_matrices<4, true>(r, row, {file, line}); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, SIMT_SITE) { simt::load_matrices<2, false>(r, row, {file, line}); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, SIMT_SITE) { simt::load_matrices<2, true>(r, row, {file, line}); }

template <int bytes>
void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::copy_later({shared, global, bytes, valid});
}
inline void cp_async_commit() { simt::copies_commit(); }
template <int pending>
void cp_async_wait() {
  simt::copies_wait(pending);
}

}  // namespace crosspoint::cuda
