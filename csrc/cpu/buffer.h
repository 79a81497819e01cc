// Workspace that outlives a call: fresh pages cost more than many kernels, so freed memory is kept, up to a
// limit.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "vec.h"

namespace crosspoint::CROSSPOINT_ISA {

class Workspace {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static Workspace& shared() {
    static Workspace workspace;
    return workspace;
  }

  // At least `bytes`, cache-line aligned: the smallest kept block that fits without much waste, or a new one.
  Block take(size_t bytes) {
    bytes = (bytes + granule - 1) / granule * granule;
    lock();
    Block* best = nullptr;
    for (Block& block : blocks_) {
      const bool fits = block.bytes >= bytes && block.bytes <= 2 * bytes;
      if (fits && (best == nullptr || block.bytes < best->bytes)) best = &block;
    }
    if (best != nullptr) {
      const Block found = *best;
      *best = Block();
      kept_ -= found.bytes;
      unlock();
      return found;
    }
    unlock();
    void* data = std::aligned_alloc(64, bytes);
    if (data == nullptr) throw std::bad_alloc();
    return {data, bytes};
  }

  void give(Block block) {
    if (block.bytes > most_kept / 2) {
      std::free(block.data);
      return;
    }
    lock();
    // The oldest go first, until this one fits.
    do {
      Block& oldest = blocks_[next_];
      std::free(oldest.data);
      kept_ -= oldest.bytes;
      oldest = Block();
      next_ = (next_ + 1) % slots;
    } while (kept_ + block.bytes > most_kept);
    blocks_[(next_ + slots - 1) % slots] = block;
    kept_ += block.bytes;
    unlock();
  }

 private:
  // A process that forks while another thread holds the lock would leave it held in the child for ever.
  Workspace() {
    pthread_atfork([] { shared().lock(); }, [] { shared().unlock(); }, [] { shared().unlock(); });
  }

  static constexpr int slots = 32;
  static constexpr size_t most_kept = size_t(64) << 20;
  static constexpr size_t granule = 4096;

  void lock() {
    while (__atomic_exchange_n(&locked_, true, __ATOMIC_ACQUIRE)) {
    }
  }
  void unlock() { __atomic_store_n(&locked_, false, __ATOMIC_RELEASE); }

  Block blocks_[slots];
  int next_ = 0;
  size_t kept_ = 0;
  bool locked_ = false;
};

// Uninitialised, cache-line aligned storage.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { resize(size); }
  Buffer(Buffer&& other) noexcept : block_(other.block_) { other.block_ = Workspace::Block(); }
  Buffer& operator=(Buffer&& other) noexcept {
    release();
    block_ = other.block_;
    other.block_ = Workspace::Block();
    return *this;
  }
  ~Buffer() { release(); }

  // The contents are lost if it grows.
  void resize(int64_t size) {
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    if (bytes <= block_.bytes) return;
    release();
    block_ = Workspace::shared().take(bytes);
  }

  T* data() { return static_cast<T*>(block_.data); }
  const T* data() const { return static_cast<const T*>(block_.data); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

 private:
  void release() {
    if (block_.data != nullptr) Workspace::shared().give(block_);
    block_ = Workspace::Block();
  }

  Workspace::Block block_;
};

}  // namespace crosspoint::CROSSPOINT_ISA
