// The harness's own parts to each other: fibres.cpp runs threads, memory.cpp looks after what they read and write.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

inline constexpr int kWarp = 32;
inline constexpr size_t kRedZone = 64;  // bytes on each side of a buffer and of a piece of shared memory
inline constexpr size_t kMaxShared = 232448;  // bytes that one block may have: compute capability 9.0

struct Block;

// What a thread knows of another warp: everything before its block's barrier `epoch`, and of that interval what
// its lanes did up to `clock`.
struct Known {
  int block, warp;
  uint32_t epoch;
  std::array<uint32_t, kWarp> clock;
};

enum class State { ready, at_barrier, at_collective, done };

struct Product {
  void (*form)(const void* item);
  std::vector<unsigned char> item;
};

struct Thread {
  Block* block;
  uint3 index;
  int linear, lane, warp;
  State state;
  void* stack_pointer;
  // Where it waits.
  const char* call;
  Site site;
  unsigned mask;
  void* slot;
  // Copies under way: commits[i] is how many had been asked for at the i-th commit that is still pending.
  std::vector<Copy> copies;
  std::vector<size_t> commits;
  // Products under way, and their groups, likewise.
  std::vector<Product> products;
  std::vector<size_t> product_commits;
  // Order of memory: the lane's own time, and what it knows of its warp and of other blocks.
  std::array<uint32_t, kWarp> clock;
  std::vector<Known> others, released, seen;
};

// Lanes of a warp that wait in one call for each other.
struct Group {
  const char* call;
  Site site;
  unsigned mask, arrived;
};

struct Warp {
  std::vector<Group> groups;
  unsigned returned;
};

struct Piece {
  const void* key;
  int index;
  size_t offset, bytes, align;
  const char* name;
};

struct BulkCopy {
  void* to;
  const void* from;
  int bytes;
  uint64_t* barrier;
};

struct Block {
  int linear;
  uint3 index;
  int slot;  // which of the resident blocks
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int done, arrived, votes;
  Barrier barrier;
  Site barrier_site;
  uint32_t epoch;
  std::vector<Piece> pieces;
  size_t used, dynamic_bytes, static_bytes;
  std::vector<Known> others;
  std::vector<BulkCopy> bulk;  // under way
};

extern Thread* self;  // null outside kernels
extern std::string error_message;
extern size_t launch_dynamic_shared;

void report(const std::string& message);  // an error found outside the threads
uint64_t random_bits();
unsigned char poison_byte();

// memory.cpp
void memory_begin(int resident_blocks, int block_threads);
void memory_begin_block(Block& block);
void memory_end_block(Block& block);
void memory_end();
void synchronise_warp(Block& block, int warp, unsigned mask);
void synchronise_block(Block& block);
void written(const void* address, size_t bytes);  // by no thread: the host, or a copy that has landed
void unwritten(void* address, size_t bytes);
void write_poison(void* address, size_t bytes);

}  // namespace simt
