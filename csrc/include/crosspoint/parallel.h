// How kernels run in parallel: the caller passes its own pool in.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace crosspoint {

class Parallel {
 public:
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  // Calls body over disjoint ranges that cover [0, n), n > 0, each of at least `grain` items if possible; rethrows what a
  // body throws. `pool` and `threads` are the constructor's.
  using Run = void (*)(void* pool, int threads, int64_t n, int64_t grain, Body body, void* context);

  Parallel(Run run, int threads, void* pool = nullptr) : run_(run), threads_(threads), pool_(pool) {}

  int threads() const { return threads_; }

  // f(begin, end) over static ranges. Results must not depend on where the ranges are cut.
  template <class F>
  void ranges(int64_t n, int64_t grain, F&& f) const {
    using Callable = std::remove_reference_t<F>;
    if (n <= 0) return;
    run_(
        pool_, threads_, n, grain,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<Callable*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

  // f(i) for every i in [0, n), handed out one by one, so that uneven items balance; `make_scratch()` is called once per
  // thread that takes part and its result is passed as f(i, scratch).
  template <class MakeScratch, class F>
  void items(int64_t n, MakeScratch&& make_scratch, F&& f) const {
    std::atomic<int64_t> next{0};
    auto worker = [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) {
        int64_t i = next.fetch_add(1, std::memory_order_relaxed);
        if (i >= n) return;
        auto scratch = make_scratch();
        for (; i < n; i = next.fetch_add(1, std::memory_order_relaxed)) f(i, scratch);
      }
    };
    const int64_t workers = n < threads_ ? n : threads_;
    ranges(workers, 1, worker);
  }

 private:
  Run run_;
  int threads_;
  void* pool_;
};

}  // namespace crosspoint
