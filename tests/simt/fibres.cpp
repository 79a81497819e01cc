// Runs a grid on one OS thread: every CUDA thread is a fibre, which runs until it waits for others.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, then continues on the other stack.
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** save, void* load);
#elif defined(__aarch64__)
asm(R"(
.text
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** save, void* load);
#else
#error "tests/simt switches stacks on x86-64 and AArch64 only"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread* self = nullptr;
std::string error_message;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuardPage = 4096;

uint64_t seed = 0, random_state = 1;
int resident = 1;
void (*choose_blocks)(int64_t blocks, int64_t* first, int64_t* count) = nullptr;
long long launches = 0, switches = 0, collectives = 0;
cudaError_t last_error = cudaSuccess;

void* main_stack_pointer;
bool failed;
const std::function<void()>* kernel;
std::vector<Thread*> ready;

#if defined(__SANITIZE_ADDRESS__)
const void* main_stack;
size_t main_stack_bytes;
#endif

// One stack for each thread of each resident block, kept between launches, a guard page below each.
struct Stacks {
  char* base = nullptr;
  size_t count = 0;

  void reserve(size_t wanted) {
    if (wanted <= count) return;
    if (base != nullptr) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(base, count * (kStack + kGuardPage));
#endif
      munmap(base, count * (kStack + kGuardPage));
    }
    const size_t bytes = wanted * (kStack + kGuardPage);
    base = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED) std::abort();
    for (size_t i = 0; i < wanted; ++i) mprotect(base + i * (kStack + kGuardPage), kGuardPage, PROT_NONE);
    count = wanted;
  }
  char* bottom(size_t i) const { return base + i * (kStack + kGuardPage) + kGuardPage; }
} stacks;

char* stack_of(const Thread& thread) {
  return stacks.bottom(static_cast<size_t>(thread.block->slot) * thread.block->threads.size() + thread.linear);
}

void to_main(bool for_good) {
  Thread* thread = self;
  self = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, main_stack, main_stack_bytes);
  simt_switch(&thread->stack_pointer, main_stack_pointer);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)for_good;
  simt_switch(&thread->stack_pointer, main_stack_pointer);
#endif
}

void to_thread(Thread* thread) {
  self = thread;
  threadIdx = thread->index;
  blockIdx = thread->block->index;
  ++switches;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_of(*thread), kStack);
  simt_switch(&main_stack_pointer, thread->stack_pointer);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  simt_switch(&main_stack_pointer, thread->stack_pointer);
#endif
}

void begin_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
  (*kernel)();
  Block& block = *self->block;
  if (block.arrived > 0)
    fail("returned while %d threads of its block wait at %s:%d", block.arrived, block.barrier_site.file, block.barrier_site.line);
  if (!self->copies.empty()) fail("returned with copies to shared memory that it never waited for");
  if (!self->products.empty()) fail("returned with products that it never waited for");
  self->state = State::done;
  ++block.done;
  block.warps[self->warp].returned |= 1u << self->lane;
  to_main(true);
}

void prepare(Thread& thread, Block& block, int linear) {
  const int x = static_cast<int>(blockDim.x), y = static_cast<int>(blockDim.y);
  thread.block = &block;
  thread.linear = linear;
  thread.lane = linear % kWarp;
  thread.warp = linear / kWarp;
  thread.index = {static_cast<unsigned>(linear % x), static_cast<unsigned>(linear / x % y), static_cast<unsigned>(linear / (x * y))};
  thread.state = State::ready;
  thread.copies.clear();
  thread.commits.clear();
  thread.products.clear();
  thread.product_commits.clear();
  thread.clock.fill(0);
  thread.clock[thread.lane] = 1;
  thread.others.clear();
  thread.released.clear();
  thread.seen.clear();
  char* bottom = stack_of(thread);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom, kStack);
#endif
  // The switch pops the registers, then returns into begin_thread, on a stack aligned as after a call. Stacks begin
  // at different offsets in their pages, or they would evict each other from the cache.
  char* end = bottom + kStack - linear % 61 * 1088;
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>(end) - 2;
  *top = reinterpret_cast<uint64_t>(&begin_thread);
  std::fill(top - 6, top, 0);
  thread.stack_pointer = top - 6;
#else
  auto* top = reinterpret_cast<uint64_t*>(end) - 20;
  std::fill(top, top + 20, 0);
  top[11] = reinterpret_cast<uint64_t>(&begin_thread);
  thread.stack_pointer = top;
#endif
}

void make_ready(Thread& thread) {
  thread.state = State::ready;
  ready.push_back(&thread);
}

// With seed 0 threads run in order; otherwise any that can run is next.
Thread* take_ready() {
  const size_t pick = seed == 0 ? 0 : random_bits() % ready.size();
  Thread* thread = ready[pick];
  if (seed == 0) {
    ready.erase(ready.begin());
  } else {
    ready[pick] = ready.back();
    ready.pop_back();
  }
  return thread;
}

void begin_block(Block& block, int linear) {
  const int gx = static_cast<int>(gridDim.x), gy = static_cast<int>(gridDim.y);
  block.linear = linear;
  block.index = {static_cast<unsigned>(linear % gx), static_cast<unsigned>(linear / gx % gy), static_cast<unsigned>(linear / gx / gy)};
  block.done = block.arrived = block.votes = 0;
  block.warps.assign((block.threads.size() + kWarp - 1) / kWarp, Warp());
  block.epoch = 1;
  block.pieces.clear();
  block.used = block.dynamic_bytes = block.static_bytes = 0;
  block.others.clear();
  block.bulk.clear();
  memory_begin_block(block);
  for (size_t i = 0; i < block.threads.size(); ++i) {
    prepare(block.threads[i], block, static_cast<int>(i));
    ready.push_back(&block.threads[i]);
  }
}

std::string describe_waiting(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string text = "deadlock:";
  char line[256];
  int lines = 0;
  for (const auto& block : blocks) {
    if (block->done == static_cast<int>(block->threads.size())) continue;
    for (size_t i = 0, j; i < block->threads.size(); i = j) {
      const Thread& first = block->threads[i];
      const auto same = [&](const Thread& other) {
        return other.state == first.state &&
               (first.state == State::done || (other.site.line == first.site.line && other.mask == first.mask));
      };
      for (j = i + 1; j < block->threads.size() && same(block->threads[j]); ++j) {
      }
      if (++lines > 40) continue;
      std::snprintf(line, sizeof line, "\n  block (%u, %u, %u), threads %zu to %zu: ", block->index.x, block->index.y,
                    block->index.z, i, j - 1);
      text += line;
      if (first.state == State::done) {
        text += "returned";
      } else if (first.state == State::at_barrier) {
        std::snprintf(line, sizeof line, "wait at __syncthreads, %s:%d", first.site.file, first.site.line);
        text += line;
      } else {
        std::snprintf(line, sizeof line, "wait in %s with mask 0x%08x, %s:%d", first.call, first.mask, first.site.file,
                      first.site.line);
        text += line;
      }
    }
  }
  return text;
}

}  // namespace

uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1dull >> 16;
}

// As float: NaN, then very large, then -4e8. As int: -1, then large, then negative.
unsigned char poison_byte() {
  constexpr unsigned char bytes[] = {0xff, 0x7f, 0xcd};
  return bytes[seed % 3];
}

void fail(const char* format, ...) {
  char text[1024], where[160];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (self != nullptr)
    std::snprintf(where, sizeof where, "block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z, self->linear);
  if (error_message.empty()) error_message = (self != nullptr ? where : std::string()) + text;
  failed = true;
  last_error = cudaErrorLaunchFailure;
  if (self == nullptr) std::abort();
  to_main(true);
  __builtin_unreachable();
}

cudaError_t launch(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& body) {
  if (last_error != cudaSuccess) return last_error;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      dynamic_shared > kMaxShared) {
    error_message = "no such launch: " + std::to_string(threads) + " threads, grid (" + std::to_string(grid.x) + ", " +
                    std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), " + std::to_string(dynamic_shared) +
                    " bytes of dynamic shared memory";
    return last_error = cudaErrorInvalidConfiguration;
  }
  int64_t first = 0, count = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (choose_blocks != nullptr) choose_blocks(count, &first, &count);
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), static_cast<int>(first));
  if (seed != 0)
    for (int64_t i = count - 1; i > 0; --i) std::swap(order[i], order[random_bits() % (i + 1)]);

  ++launches;
  failed = false;
  blockDim = block;
  gridDim = grid;
  kernel = &body;
  ready.clear();
  launch_dynamic_shared = dynamic_shared;
  const int slots = static_cast<int>(std::min<int64_t>(resident, count));
  stacks.reserve(slots * threads);
  memory_begin(slots, static_cast<int>(threads));
  std::vector<std::unique_ptr<Block>> blocks;
  int64_t next = 0;
  for (int slot = 0; slot < slots; ++slot) {
    blocks.push_back(std::make_unique<Block>());
    blocks.back()->slot = slot;
    blocks.back()->threads.resize(threads);
    begin_block(*blocks.back(), order[next++]);
  }
  while (!ready.empty() && !failed) {
    Thread* thread = take_ready();
    to_thread(thread);
    Block& finished = *thread->block;
    if (!failed && thread->state == State::done && finished.done == static_cast<int>(threads)) {
      if (!finished.bulk.empty()) report("a block returned while copies to its shared memory were under way");
      memory_end_block(finished);
      if (!failed && next < count) begin_block(finished, order[next++]);
    }
  }
  if (!failed)
    for (const auto& left : blocks)
      if (left->done != static_cast<int>(threads)) {
        error_message = describe_waiting(blocks);
        last_error = cudaErrorLaunchFailure;
        break;
      }
  memory_end();
  return last_error;
}

void report(const std::string& message) {
  if (error_message.empty()) error_message = message;
  failed = true;
  last_error = cudaErrorLaunchFailure;
}

unsigned lane() { return static_cast<unsigned>(self->lane); }

void pause() {
  if (seed == 0 || random_bits() % 4 != 0) return;
  ready.push_back(self);
  to_main(false);
}

int block_barrier(Barrier kind, bool predicate, Site site) {
  Block& block = *self->block;
  if (block.done > 0) fail("waits at %s:%d, but %d threads of its block have returned", site.file, site.line, block.done);
  if (block.arrived == 0) {
    block.barrier = kind;
    block.barrier_site = site;
    block.votes = 0;
  } else if (block.barrier != kind || block.barrier_site.line != site.line) {
    fail("waits at the barrier %s:%d while others of its block wait at %s:%d", site.file, site.line, block.barrier_site.file,
         block.barrier_site.line);
  }
  block.votes += predicate;
  self->site = site;
  const int threads = static_cast<int>(block.threads.size());
  if (++block.arrived == threads) {
    block.arrived = 0;
    synchronise_block(block);
    ++block.epoch;
    const int votes = block.votes;
    for (Thread& thread : block.threads) {
      thread.mask = static_cast<unsigned>(votes);
      make_ready(thread);
    }
  } else {
    self->state = State::at_barrier;
  }
  to_main(false);
  const int votes = static_cast<int>(self->mask);
  return kind == Barrier::all ? votes == threads : kind == Barrier::any ? votes > 0 : votes;
}

void collective(const char* name, unsigned mask, void* slot, Finish finish, Site site, bool orders_memory) {
  Block& block = *self->block;
  Warp& warp = block.warps[self->warp];
  Thread* const lanes = &block.threads[self->warp * kWarp];
  const int count = std::min<int>(kWarp, static_cast<int>(block.threads.size()) - self->warp * kWarp);
  const unsigned own = 1u << self->lane;
  ++collectives;
  if ((mask & own) == 0)
    fail("%s with mask 0x%08x, which leaves out the caller's lane %d, %s:%d", name, mask, self->lane, site.file, site.line);
  if (count < kWarp && mask >> count != 0)
    fail("%s with mask 0x%08x, but the warp has %d lanes, %s:%d", name, mask, count, site.file, site.line);
  if ((mask & warp.returned) != 0)
    fail("%s with mask 0x%08x, but lane %d has returned, %s:%d", name, mask, __builtin_ctz(mask & warp.returned), site.file,
         site.line);
  self->call = name;
  self->site = site;
  self->mask = mask;
  self->slot = slot;
  Group* group = nullptr;
  for (Group& open : warp.groups) {
    if (open.mask == mask && open.site.line == site.line && std::strcmp(open.call, name) == 0)
      group = &open;
    else if ((open.mask & own) != 0 && (open.arrived & mask) != 0)
      fail("%s with mask 0x%08x, %s:%d, while lane %d waits for it in %s with mask 0x%08x, %s:%d", name, mask, site.file,
           site.line, __builtin_ctz(open.arrived & mask), open.call, open.mask, open.site.file, open.site.line);
  }
  if (group == nullptr) {
    warp.groups.push_back({name, site, mask, 0});
    group = &warp.groups.back();
  }
  group->arrived |= own;
  self->state = State::at_collective;
  if (group->arrived == mask) {
    *group = warp.groups.back();
    warp.groups.pop_back();
    void* slots[kWarp] = {};
    for (int i = 0; i < count; ++i)
      if (mask >> i & 1u) slots[i] = lanes[i].slot;
    if (finish != nullptr) finish(mask, slots);
    if (orders_memory) synchronise_warp(block, self->warp, mask);
    for (int i = 0; i < count; ++i)
      if (mask >> i & 1u) make_ready(lanes[i]);
  }
  to_main(false);
}

void copy_later(const Copy& copy) {
  const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % copy.bytes != 0; };
  if (misaligned(copy.to) || (copy.valid && misaligned(copy.from)))
    fail("cp.async of %d bytes between addresses that are no multiples of them", copy.bytes);
  touch(copy.to, copy.bytes, true, nullptr);
  write_poison(copy.to, copy.bytes);
  self->copies.push_back(copy);
}

void copies_commit() { self->commits.push_back(self->copies.size()); }

void copies_wait(int pending) {
  if (static_cast<int>(self->commits.size()) <= pending) return;
  const size_t groups = self->commits.size() - pending, landed = self->commits[groups - 1];
  for (size_t i = 0; i < landed; ++i) {
    const Copy& copy = self->copies[i];
    touch(copy.to, copy.bytes, true, nullptr);
    if (copy.valid) {
      touch(copy.from, copy.bytes, false, nullptr);
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  self->copies.erase(self->copies.begin(), self->copies.begin() + static_cast<std::ptrdiff_t>(landed));
  self->commits.erase(self->commits.begin(), self->commits.begin() + static_cast<std::ptrdiff_t>(groups));
  for (size_t& commit : self->commits) commit -= landed;
}

namespace {

// A barrier's 64 bits: how many arrive in a phase, how many are still to come, bytes still to come, and the phase.
struct BarrierState {
  uint64_t phase : 1, arrivals : 15, pending : 16;
  int64_t bytes : 32;
};
static_assert(sizeof(BarrierState) == sizeof(uint64_t));

template <class Update>
void update_barrier(uint64_t* barrier, Update update) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof state);
  update(state);
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.arrivals;
  }
  std::memcpy(barrier, &state, sizeof state);
}

void land_one(Block& block) {
  if (block.bulk.empty()) return;
  const size_t pick = seed == 0 ? 0 : random_bits() % block.bulk.size();
  const BulkCopy copy = block.bulk[pick];
  block.bulk.erase(block.bulk.begin() + static_cast<std::ptrdiff_t>(pick));
  std::memcpy(copy.to, copy.from, copy.bytes);
  written(copy.to, copy.bytes);
  update_barrier(copy.barrier, [&](BarrierState& state) { state.bytes -= copy.bytes; });
}

}  // namespace

void barrier_init(uint64_t* barrier, int arrivals) {
  touch(barrier, sizeof *barrier, true, nullptr);
  if (arrivals < 1) fail("a barrier for %d arrivals", arrivals);
  const BarrierState state{0, static_cast<uint64_t>(arrivals), static_cast<uint64_t>(arrivals), 0};
  std::memcpy(barrier, &state, sizeof state);
  written(barrier, sizeof *barrier);
}

void barrier_arrive(uint64_t* barrier, int bytes) {
  fence(false);
  atomic_access(barrier, sizeof *barrier);
  update_barrier(barrier, [&](BarrierState& state) {
    if (state.pending == 0) fail("more arrive at a barrier than it was made for");
    --state.pending;
    state.bytes += bytes;
  });
}

void barrier_wait(uint64_t* barrier, int parity) {
  for (long tries = 0;; ++tries) {
    BarrierState state;
    std::memcpy(&state, barrier, sizeof state);
    if (static_cast<int>(state.phase) != (parity & 1)) break;
    land_one(*self->block);
    if (tries == 1 << 14) fail("waits in vain for phase %d of a barrier: %d to arrive, %d bytes to come", parity,
                               static_cast<int>(state.pending), static_cast<int>(state.bytes));
    ready.push_back(self);
    to_main(false);
  }
  atomic_access(barrier, sizeof *barrier);
  fence(false);
}

void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("a bulk copy of %d bytes, or addresses, that are no multiples of 16", bytes);
  touch(global, bytes, false, nullptr);
  touch(shared, bytes, true, nullptr);
  write_poison(shared, bytes);
  fence(false);
  atomic_access(barrier, sizeof *barrier);
  self->block->bulk.push_back({shared, global, bytes, barrier});
}

void form_later(void (*form)(const void* item), const void* item, size_t bytes) {
  const auto* from = static_cast<const unsigned char*>(item);
  self->products.push_back({form, {from, from + bytes}});
}

void products_commit() { self->product_commits.push_back(self->products.size()); }

void products_wait(int pending) {
  if (static_cast<int>(self->product_commits.size()) <= pending) return;
  const size_t groups = self->product_commits.size() - pending, formed = self->product_commits[groups - 1];
  for (size_t i = 0; i < formed; ++i) self->products[i].form(self->products[i].item.data());
  self->products.erase(self->products.begin(), self->products.begin() + static_cast<std::ptrdiff_t>(formed));
  self->product_commits.erase(self->product_commits.begin(), self->product_commits.begin() + static_cast<std::ptrdiff_t>(groups));
  for (size_t& commit : self->product_commits) commit -= formed;
}

int thread_of_block() { return self->linear; }

}  // namespace simt

cudaError_t cudaPeekAtLastError() { return simt::last_error; }

// As on the device, a failed launch stays: simt_configure clears it.
cudaError_t cudaGetLastError() { return simt::last_error; }

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : simt::error_message.c_str(); }

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(to, value, bytes);
  simt::written(to, bytes);
  return simt::last_error;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes != 0) std::memcpy(to, from, bytes);
  simt::written(to, bytes);
  return simt::last_error;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
  }
  return cudaSuccess;
}

#pragma GCC visibility push(default)
extern "C" {

// Forgets errors; seed 0 runs blocks and threads in order, any other shuffles them.
void simt_configure(uint64_t seed, int resident_blocks) {
  simt::seed = seed;
  simt::random_state = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  simt::resident = resident_blocks;
  simt::error_message.clear();
  simt::last_error = cudaSuccess;
}

// Called with the number of blocks of every launch, says which of them run; null: all do.
void simt_choose_blocks(void (*choose)(int64_t blocks, int64_t* first, int64_t* count)) { simt::choose_blocks = choose; }

const char* simt_error() { return simt::error_message.c_str(); }

// Launches, switches and warp collectives since the library was loaded.
void simt_counts(long long* counts) {
  counts[0] = simt::launches;
  counts[1] = simt::switches;
  counts[2] = simt::collectives;
}
}
