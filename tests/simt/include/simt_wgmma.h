// csrc/cuda/wgmma.h on fibres. Operands are read through their descriptors, bit by bit as the PTX manual defines them,
// when their group is waited for: what is overwritten too early, or read too early, gives wrong results. Each warp reads
// for itself; products and sums are as in simt_mma.h.
#pragma once

#include "simt_mma.h"

namespace simt {

// What a descriptor says of an operand with the 128-byte swizzle.
struct Panels {
  uint32_t start, leading, stride;

  explicit Panels(uint64_t descriptor) {
    start = (descriptor & 0x3fff) << 4;
    leading = (descriptor >> 16 & 0x3fff) << 4;
    stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("a descriptor of no 128-byte swizzle from 1,024 bytes on");
  }
  // Address bits 4 to 6 are permuted by bits 7 to 9.
  static unsigned char* at(uint32_t address) { return shared_at(address ^ (address >> 7 & 7) << 4); }
  // Two bytes at (i, k) of the operand: i along M or N, k along the depth of 16.
  unsigned char* k_major(int i, int k) const { return at(start + i / 8 * stride + i % 8 * 128 + k * 2); }
  unsigned char* mn_major(int i, int k) const { return at(start + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2); }
};

// One lane's share of a product.
template <class Kind, int n>
struct LaneProduct {
  float (*d)[4];
  bool add, registers, mn_major;
  uint64_t left, right;
  uint32_t a[4][4];  // of the four lanes that hold the row

  static float value(const unsigned char* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return Kind::value(bits, 0);
  }

  static void form(const void* item) {
    const auto& p = *static_cast<const LaneProduct*>(item);
    const int own = static_cast<int>(lane()), first = thread_of_block() / 32 % 4 * 16;
    const Panels right(p.right);
    float rows[2][16];
    if (p.registers) {
      for (int t = 0; t < 4; ++t)
        for (int r = 0; r < 4; ++r)
          for (int half = 0; half < 2; ++half) rows[r % 2][t * 2 + half + r / 2 * 8] = Kind::value(p.a[t][r], half);
    } else {
      const Panels left(p.left);
      touch(left.k_major(first + own / 2, own % 2 * 8), 16, false, __builtin_return_address(0));
      for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k) rows[r][k] = value(left.k_major(first + own / 4 + 8 * r, k));
    }
    // All of the right operand is read by each warp, a part by each lane.
    for (int i = own; i < 2 * n; i += 32)
      touch(p.mn_major ? right.mn_major(i / 16 * 8, i % 16) : right.k_major(i / 2, i % 2 * 8), 16, false,
            __builtin_return_address(0));
    for (int j = 0; j < n / 8; ++j)
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + own % 4 * 2 + e;
        float other[16];
        for (int k = 0; k < 16; ++k) other[k] = value(p.mn_major ? right.mn_major(column, k) : right.k_major(column, k));
        for (int r = 0; r < 2; ++r) {
          double sum = p.add ? p.d[j][2 * r + e] : 0.0;
          for (int k = 0; k < 16; ++k) sum += static_cast<double>(rows[r][k]) * other[k];
          p.d[j][2 * r + e] = cut(sum);
        }
      }
  }
};

template <class Kind, int n8>
void warpgroup_product(const char* name, float (&d)[n8][4], const uint32_t* a, uint64_t left, uint64_t right, bool add, Site site) {
  using Product = LaneProduct<Kind, 8 * n8>;
  Product product{d, add, a != nullptr, a != nullptr, left, right, {}};
  struct Slot {
    const uint32_t* a;
    Product* product;
  } slot{a, &product};
  collective(
      name, 0xffffffffu, &slot,
      [](unsigned, void* const* slots) {
        for (int lane = 0; lane < 32; ++lane)
          for (int t = 0; t < 4; ++t)
            if (const auto* a = static_cast<Slot*>(slots[lane / 4 * 4 + t])->a)
              std::copy_n(a, 4, static_cast<Slot*>(slots[lane])->product->a[t]);
      },
      site);
  form_later(&Product::form, &product, sizeof product);
}

}  // namespace simt

namespace crosspoint::cuda {

inline uint32_t shared_address(const void* shared) { return simt::shared_offset(shared); }
inline void barrier_init(uint64_t* barrier, int arrivals) { simt::barrier_init(barrier, arrivals); }
inline void fence_async() {}
inline void barrier_arrive(uint64_t* barrier) { simt::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expecting(uint64_t* barrier, int bytes) { simt::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, int parity) { simt::barrier_wait(barrier, parity); }
inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  simt::copy_bulk(shared, global, bytes, barrier);
}

template <int count>
void take_registers() {}
template <int count>
void leave_registers() {}

inline void wgmma_fence() {}
inline void wgmma_commit() { simt::products_commit(); }
template <int pending>
void wgmma_wait() {
  simt::products_wait(pending);
}

template <int n>
void wgmma_done(float (&)[n][4]) {}

template <int n8>
void wgmma_bf16(float (&d)[n8][4], uint64_t left, uint64_t right, bool add, SIMT_SITE) {
  simt::warpgroup_product<simt::Bf16>("wgmma_bf16", d, nullptr, left, right, add, {file, line});
}
template <int n8>
void wgmma_bf16(float (&d)[n8][4], const uint32_t (&a)[4], uint64_t right, SIMT_SITE) {
  simt::warpgroup_product<simt::Bf16>("wgmma_bf16", d, a, 0, right, true, {file, line});
}
template <int n8>
void wgmma_f16(float (&d)[n8][4], uint64_t left, uint64_t right, bool add, SIMT_SITE) {
  simt::warpgroup_product<simt::F16>("wgmma_f16", d, nullptr, left, right, add, {file, line});
}
template <int n8>
void wgmma_f16(float (&d)[n8][4], const uint32_t (&a)[4], uint64_t right, SIMT_SITE) {
  simt::warpgroup_product<simt::F16>("wgmma_f16", d, a, 0, right, true, {file, line});
}

}  // namespace crosspoint::cuda
