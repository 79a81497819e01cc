// What the stand-in CUDA headers need of the harness. README.md says what it does and what it cannot show.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda_runtime_api.h"

// The file and line of the call, filled in by the caller's compiler.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {

struct Site {
  const char* file;
  int line;
};

// Runs the grid; the error (of which simt_error() gives the words) is also cudaGetLastError's.
cudaError_t launch(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& kernel);

// Ends the launch with this message, prefixed by the calling thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Barrier { plain, count, all, any };
int block_barrier(Barrier kind, bool predicate, Site site);

// Waits until every lane of the mask is in the same call, then the last to come runs `finish` on what all of
// them brought (slots[lane], null outside the mask). Only __syncwarp orders memory.
using Finish = void (*)(unsigned mask, void* const* slots);
void collective(const char* name, unsigned mask, void* slot, Finish finish, Site site, bool orders_memory = false);

unsigned lane();
void pause();            // a point at which other threads may run
void fence(bool whole_device);
void* shared_piece(const void* key, int index, size_t bytes, size_t align, const char* name);
void atomic_access(const void* address, size_t bytes);  // tell the watch; the caller then does it
void touch(const void* address, size_t bytes, bool write, const void* where);

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};
void copy_later(const Copy& copy);
void copies_commit();
void copies_wait(int pending);

// Barriers in shared memory that count arrivals and bytes (mbarrier), and copies that report to them; a copy lands when
// somebody who waits looks.
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);
void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier);

// Products are formed when their group is waited for: `form` is given a copy of the item.
void form_later(void (*form)(const void* item), const void* item, size_t bytes);
void products_commit();
void products_wait(int pending);

uint32_t shared_offset(const void* address);  // in the block's shared memory
unsigned char* shared_at(uint32_t offset);
int thread_of_block();

template <class T>
T& shared_variable(const void* key, const char* name) {
  return *static_cast<T*>(shared_piece(key, -1, sizeof(T), alignof(T), name));
}

class SharedArena {
 public:
  template <class T>
  T* take(size_t count, size_t align = 16) {
    return static_cast<T*>(shared_piece(nullptr, index_++, count * sizeof(T), align, "dynamic shared memory"));
  }

 private:
  int index_ = 0;
};

}  // namespace simt
