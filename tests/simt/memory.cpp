// The memory that kernels see: buffers and shared memory between red zones, poisoned until written. Compiled with
// SIMT_WATCH, the kernels' loads and stores come here too (the compiler's thread sanitizer calls the functions at
// the end of this file), and each is held against the earlier ones to the same bytes: races, reads of what was
// never written, accesses outside of every buffer.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_CLOSE(address, bytes) __asan_poison_memory_region(address, bytes)
#define SIMT_OPEN(address, bytes) __asan_unpoison_memory_region(address, bytes)
#else
#define SIMT_CLOSE(address, bytes) ((void)(address), (void)(bytes))
#define SIMT_OPEN(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace simt {

size_t launch_dynamic_shared;

namespace {

constexpr unsigned char kRed = 0xa5;
constexpr size_t kArena = kMaxShared + 128 * (kRedZone + 1024);
#if defined(SIMT_WATCH)
constexpr bool kWatch = true;
#else
constexpr bool kWatch = false;
#endif

struct Access {
  uint32_t launch = 0, thread = 0, epoch = 0, clock = 0, where = 0;
  bool atomic = false;
};

struct Cell {  // of one byte: its last write, and two reads since that no order was seen between
  Access write, read[2];
};

// As simt_alloc is told: unwritten; written and not to be changed; written; larger than this machine's memory.
enum Mode { output, input, both, sparse };

// Below a sparse buffer, where an offset in 16-byte elements lands that wrapped around in 32 bits.
constexpr size_t kWrapped = size_t{16} << 31;

struct Region {
  unsigned char* base;
  size_t bytes;
  std::string name;
  Mode mode = output;
  bool shared = false;
  const Block* block = nullptr;  // of shared memory: whose it is now
  std::vector<Cell> cells;
  std::vector<unsigned char> is_written;
  void* allocation = nullptr;
  size_t mapped = 0;  // bytes of a sparse allocation
};

std::map<uintptr_t, std::unique_ptr<Region>> regions;  // by first address, the red zone before it included
std::vector<Region*> arenas;                            // of the resident blocks
std::unordered_map<const void*, std::vector<Known>> published;  // by atomics, for whoever reads them
uint32_t launch_number = 0;
uint32_t threads_in_block = 1;
long long watched = 0;

Region* find(const void* address) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  auto next = regions.upper_bound(place);
  if (next == regions.begin()) return nullptr;
  Region* below = std::prev(next)->second.get();
  return place < reinterpret_cast<uintptr_t>(below->base) + below->bytes + kRedZone ? below : nullptr;
}

Region* add_region(size_t bytes, const char* name, Mode mode = output) {
  auto region = std::make_unique<Region>();
  const size_t room = (bytes + 2 * 256 + 255) / 256 * 256;
  if (mode == sparse) {
    region->mapped = kWrapped + room;
    region->allocation =
        mmap(nullptr, region->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region->allocation == MAP_FAILED) return nullptr;
    region->base = static_cast<unsigned char*>(region->allocation) + kWrapped + 256;
  } else {
    region->allocation = std::aligned_alloc(256, room);
    if (region->allocation == nullptr) std::abort();
    region->base = static_cast<unsigned char*>(region->allocation) + 256;
  }
  region->bytes = bytes;
  region->name = name;
  region->mode = mode;
  std::memset(region->base - kRedZone, kRed, kRedZone);
  std::memset(region->base + bytes, kRed, kRedZone);
  if (kWatch) {
    if (mode == sparse) std::abort();  // every byte is followed
    region->cells.resize(bytes);
    region->is_written.resize(bytes);
  }
  Region* added = region.get();
  regions[reinterpret_cast<uintptr_t>(added->base) - kRedZone] = std::move(region);
  return added;
}

[[maybe_unused]] bool red(const unsigned char* from, size_t bytes) {
  return std::all_of(from, from + bytes, [](unsigned char byte) { return byte == kRed; });
}

void merge(std::vector<Known>& into, const Known& known) {
  for (Known& have : into)
    if (have.block == known.block && have.warp == known.warp) {
      have.epoch = std::max(have.epoch, known.epoch);
      for (int i = 0; i < kWarp; ++i) have.clock[i] = std::max(have.clock[i], known.clock[i]);
      return;
    }
  into.push_back(known);
}

void merge(std::vector<Known>& into, const std::vector<Known>& from) {
  for (const Known& known : from) merge(into, known);
}

#if defined(SIMT_WATCH)

bool happened_before(const Access& access, const Thread& thread) {
  if (access.launch != launch_number) return true;
  const int block = static_cast<int>(access.thread / threads_in_block), linear = static_cast<int>(access.thread % threads_in_block);
  const int warp = linear / kWarp, lane = linear % kWarp;
  if (block == thread.block->linear) {
    if (linear == thread.linear || access.epoch < thread.block->epoch) return true;
    if (warp == thread.warp && access.clock <= thread.clock[lane]) return true;
  }
  for (const std::vector<Known>* list : {&std::as_const(thread.others), &std::as_const(thread.block->others)})
    for (const Known& known : *list)
      if (known.block == block && (access.epoch < known.epoch || (warp == known.warp && access.clock <= known.clock[lane]))) return true;
  return false;
}

std::string describe(const Access& access, const char* what) {
  char text[160];
  std::snprintf(text, sizeof text, "%s%s by block %u, thread %u at pc:0x%x", access.atomic ? "atomic " : "", what,
                access.thread / threads_in_block, access.thread % threads_in_block, access.where);
  return text;
}

[[noreturn]] void race(const Region& region, size_t offset, const Access& now, const char* what, const Access& before,
                       const char* what_before, const std::string& name) {
  fail("race on %s memory, %s, byte %zu: %s and %s, with no barrier between them", region.shared ? "shared" : "global",
       name.c_str(), offset, describe(before, what_before).c_str(), describe(now, what).c_str());
}

// The piece of shared memory that holds all the bytes; its name, and the offset in it.
std::string name_of(const Region& region, const unsigned char* address, size_t bytes, size_t* offset, uint32_t where) {
  if (!region.shared) {
    if (address < region.base || address + bytes > region.base + region.bytes)
      fail("%zu bytes at offset %td of %s, which has %zu bytes, at pc:0x%x", bytes, address - region.base, region.name.c_str(),
           region.bytes, where);
    *offset = static_cast<size_t>(address - region.base);
    return region.name;
  }
  if (region.block != self->block) fail("reaches into the shared memory of another block, at pc:0x%x", where);
  const auto place = static_cast<size_t>(address - region.base);
  const Piece* below = nullptr;
  for (const Piece& piece : region.block->pieces) {
    if (place >= piece.offset && place + bytes <= piece.offset + piece.bytes) {
      *offset = place - piece.offset;
      return piece.index < 0 ? piece.name : std::string(piece.name) + " piece " + std::to_string(piece.index);
    }
    if (piece.offset <= place && (below == nullptr || piece.offset > below->offset)) below = &piece;
  }
  if (below == nullptr) fail("%zu bytes of shared memory before every variable, at pc:0x%x", bytes, where);
  fail("%zu bytes at offset %zu of %s (shared memory, piece %d), which has %zu bytes, at pc:0x%x", bytes, place - below->offset,
       below->name, below->index, below->bytes, where);
}

void watch(const void* pointer, size_t bytes, bool reads, bool writes, bool atomic, const void* caller) {
  Thread& thread = *self;
  const auto* address = static_cast<const unsigned char*>(pointer);
  Region* region = find(address);
  if (region == nullptr) return;
  static const auto module = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&simt::launch), &info);
    return reinterpret_cast<uintptr_t>(info.dli_fbase);
  }();
  ++watched;
  const auto where = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(caller) - module - 1);
  size_t offset = 0;
  const std::string name = name_of(*region, address, bytes, &offset, where);
  if (writes && region->mode == input) fail("writes to %s, which is an input, at pc:0x%x", name.c_str(), where);
  const Access now{launch_number, static_cast<uint32_t>(thread.block->linear) * threads_in_block + thread.linear, thread.block->epoch,
                   thread.clock[thread.lane], where, atomic};
  const char* what = writes && !atomic ? "write" : atomic ? "access" : "read";
  const size_t first = static_cast<size_t>(address - region->base);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = region->cells[first + i];
    if (reads && !region->is_written[first + i])
      fail("reads byte %zu of %s memory, %s, which nobody has written, at pc:0x%x", offset + i,
           region->shared ? "shared" : "global", name.c_str(), where);
    const auto conflicts = [&](const Access& before) { return !(atomic && before.atomic) && !happened_before(before, thread); };
    if (conflicts(cell.write)) race(*region, offset + i, now, what, cell.write, "write", name);
    if (writes) {
      for (const Access& read : cell.read)
        if (conflicts(read)) race(*region, offset + i, now, what, read, "read", name);
      cell.write = now;
      region->is_written[first + i] = 1;
    } else if (happened_before(cell.read[0], thread)) {
      cell.read[0] = now;
    } else if (happened_before(cell.read[1], thread)) {
      cell.read[1] = now;
    } else {
      cell.read[random_bits() % 2] = now;
    }
  }
}

#endif

}  // namespace

void* shared_piece(const void* key, int index, size_t bytes, size_t align, const char* name) {
  Block& block = *self->block;
  for (const Piece& piece : block.pieces)
    if (piece.key == key && piece.index == index) {
      if (piece.bytes != bytes || piece.align != align)
        fail("takes %zu bytes as piece %d of %s, of which another thread took %zu", bytes, index, name, piece.bytes);
      return arenas[block.slot]->base + piece.offset;
    }
  size_t& total = key == nullptr ? block.dynamic_bytes : block.static_bytes;
  total = (total + align - 1) / align * align + bytes;
  if (key == nullptr && total > launch_dynamic_shared)
    fail("takes %zu bytes of dynamic shared memory, but the launch has %zu", total, launch_dynamic_shared);
  if (key != nullptr && total > 48 * 1024) fail("has %zu bytes of static shared memory: 49152 are possible", total);
  if (launch_dynamic_shared + block.static_bytes > kMaxShared)
    fail("has %zu bytes of shared memory: %zu are possible", launch_dynamic_shared + block.static_bytes, kMaxShared);

  Region& arena = *arenas[block.slot];
  const size_t offset = (block.used + std::max<size_t>(align, 16) - 1) / std::max<size_t>(align, 16) * std::max<size_t>(align, 16);
  if (offset + bytes + kRedZone > kArena) fail("has too many pieces of shared memory");
  SIMT_OPEN(arena.base + offset, bytes);
  unwritten(arena.base + offset, bytes);
  if (kWatch) std::fill_n(arena.cells.begin() + static_cast<std::ptrdiff_t>(offset), bytes, Cell());
  write_poison(arena.base + offset, bytes);
  block.used = offset + bytes + kRedZone;
  block.pieces.push_back({key, index, offset, bytes, align, name});
  return arena.base + offset;
}

uint32_t shared_offset(const void* address) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(address) - arenas[self->block->slot]->base);
}

unsigned char* shared_at(uint32_t offset) { return arenas[self->block->slot]->base + offset; }

void write_poison(void* address, size_t bytes) {
  if (bytes == 0) return;
  std::memset(address, poison_byte(), bytes);
  unwritten(address, bytes);
}

void written(const void* address, size_t bytes) {
  Region* region = kWatch ? find(address) : nullptr;
  if (region != nullptr) std::fill_n(region->is_written.begin() + (static_cast<const unsigned char*>(address) - region->base), bytes, 1);
}

void unwritten(void* address, size_t bytes) {
  Region* region = kWatch ? find(address) : nullptr;
  if (region != nullptr) std::fill_n(region->is_written.begin() + (static_cast<unsigned char*>(address) - region->base), bytes, 0);
}

void memory_begin(int resident_blocks, int block_threads) {
  ++launch_number;
  threads_in_block = static_cast<uint32_t>(block_threads);
  published.clear();
  while (static_cast<int>(arenas.size()) < resident_blocks) {
    arenas.push_back(add_region(kArena, "shared memory", both));
    arenas.back()->shared = true;
  }
}

void memory_begin_block(Block& block) {
  Region& arena = *arenas[block.slot];
  arena.block = &block;
  SIMT_OPEN(arena.base, kArena);
  std::memset(arena.base, kRed, kArena);
  SIMT_CLOSE(arena.base, kArena);
  block.used = kRedZone;
}

void memory_end_block(Block& block) {
#if !defined(__SANITIZE_ADDRESS__)
  const unsigned char* base = arenas[block.slot]->base;
  size_t checked = 0;
  for (size_t i = 0; i <= block.pieces.size(); ++i) {
    const size_t next = i < block.pieces.size() ? block.pieces[i].offset : kArena;
    if (!red(base + checked, next - checked)) {
      const std::string after = i == 0 ? "before the first" : "after " + std::string(block.pieces[i - 1].name);
      report("block " + std::to_string(block.linear) + " wrote to shared memory outside of its variables, " + after);
      return;
    }
    if (i < block.pieces.size()) checked = next + block.pieces[i].bytes;
  }
#else
  (void)block;
#endif
}

void memory_end() {
#if !defined(__SANITIZE_ADDRESS__)
  for (const auto& [first, region] : regions)
    if (!red(region->base - kRedZone, kRedZone) || !red(region->base + region->bytes, kRedZone)) {
      report("wrote outside of " + region->name + ", which has " + std::to_string(region->bytes) + " bytes");
      std::memset(region->base - kRedZone, kRed, kRedZone);
      std::memset(region->base + region->bytes, kRed, kRedZone);
    }
#endif
}

void synchronise_warp(Block& block, int warp, unsigned mask) {
  std::array<uint32_t, kWarp> latest{};
  std::vector<Known> others;
  const auto for_members = [&](auto&& act) {
    for (int i = 0; i < kWarp; ++i)
      if (mask >> i & 1u) act(block.threads[warp * kWarp + i]);
  };
  for_members([&](Thread& thread) {
    for (int i = 0; i < kWarp; ++i) latest[i] = std::max(latest[i], thread.clock[i]);
    merge(others, thread.others);
  });
  for_members([&](Thread& thread) {
    thread.clock = latest;
    ++thread.clock[thread.lane];
    thread.others = others;
  });
}

void synchronise_block(Block& block) {
  for (Thread& thread : block.threads) {
    merge(block.others, thread.others);
    thread.others.clear();
  }
}

// What the thread did before a fence is published by its next atomic, and what it saw published before one is
// known after it. Within a block as on the whole device: the difference is not modelled.
void fence(bool) {
  Thread& thread = *self;
  thread.released = thread.others;
  merge(thread.released, thread.block->others);
  merge(thread.released, {thread.block->linear, thread.warp, thread.block->epoch, thread.clock});
  ++thread.clock[thread.lane];
  merge(thread.others, thread.seen);
  thread.seen.clear();
  pause();
}

namespace {
void atomically(const void* address, bool reads, bool writes) {
  Thread& thread = *self;
  auto place = published.find(address);
  if (reads && place != published.end()) merge(thread.seen, place->second);
  if (writes && !thread.released.empty()) merge(published[address], thread.released);
}
}  // namespace

#if defined(SIMT_WATCH)
__attribute__((noinline)) void atomic_access(const void* address, size_t bytes) {
  watch(address, bytes, true, true, true, __builtin_return_address(0));
  atomically(address, true, true);
}
void touch(const void* address, size_t bytes, bool write, const void* where) { watch(address, bytes, !write, write, false, where); }
#else
void atomic_access(const void* address, size_t) { atomically(address, true, true); }
void touch(const void*, size_t, bool, const void*) {}
#endif

}  // namespace simt

#pragma GCC visibility push(default)
extern "C" {

// A buffer in device memory between red zones; mode 0: unwritten, 1: an input, 2: written by the host and by kernels,
// 3: sparse, zeros that take memory only where they are touched (null where the system has no such addresses).
void* simt_alloc(size_t bytes, const char* name, int mode) {
  simt::Region* region = simt::add_region(bytes, name, static_cast<simt::Mode>(mode));
  if (region == nullptr || region->mode == simt::sparse) return region == nullptr ? nullptr : region->base;
  simt::write_poison(region->base, bytes);
  if (region->mode != simt::output) simt::written(region->base, bytes);
  SIMT_CLOSE(region->base - simt::kRedZone, simt::kRedZone);
  SIMT_CLOSE(region->base + bytes, simt::kRedZone);
  return region->base;
}

void simt_free(void* address) {
  const auto place = simt::regions.find(reinterpret_cast<uintptr_t>(address) - simt::kRedZone);
  if (place == simt::regions.end()) std::abort();
  void* allocation = place->second->allocation;
  const size_t bytes = place->second->bytes, mapped = place->second->mapped;
  SIMT_OPEN(static_cast<unsigned char*>(address) - simt::kRedZone, bytes + 2 * simt::kRedZone);
  simt::regions.erase(place);
  if (mapped > 0)
    munmap(allocation, mapped);
  else
    std::free(allocation);
}

// Loads and stores that were watched since the library was loaded; 0 in builds without the watch.
long long simt_watched() { return simt::watched; }

#if defined(SIMT_WATCH)

#define SIMT_HOOK(name, bytes, reads, writes)                                                                \
  void name(void* address) {                                                                                 \
    if (simt::self != nullptr) simt::watch(address, bytes, reads, writes, false, __builtin_return_address(0)); \
  }
#define SIMT_VOLATILE_HOOK(name, bytes, reads, writes)                        \
  void name(void* address) {                                                  \
    if (simt::self == nullptr) return;                                        \
    simt::pause();                                                            \
    simt::watch(address, bytes, reads, writes, true, __builtin_return_address(0)); \
    simt::atomically(address, reads, writes);                                 \
  }
#define SIMT_HOOKS(bytes)                                             \
  SIMT_HOOK(__tsan_read##bytes, bytes, true, false)                   \
  SIMT_HOOK(__tsan_write##bytes, bytes, false, true)                  \
  SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, true, false)         \
  SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, false, true)        \
  SIMT_VOLATILE_HOOK(__tsan_volatile_read##bytes, bytes, true, false) \
  SIMT_VOLATILE_HOOK(__tsan_volatile_write##bytes, bytes, false, true)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  if (simt::self != nullptr) simt::watch(address, bytes, true, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  if (simt::self != nullptr) simt::watch(address, bytes, false, true, false, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

#endif
}
