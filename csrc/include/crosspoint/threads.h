// Ready-made pools to pass to a kernel.
#pragma once

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "crosspoint/parallel.h"

namespace crosspoint {

// Everything in the calling thread.
inline Parallel serial() {
  return Parallel([](void*, int, int64_t n, int64_t, Parallel::Body body, void* context) { body(context, 0, n); }, 1);
}

// Up to `count` threads, started anew for each parallel region and joined at its end: nothing outlives a call, so a
// process may fork between calls.
inline Parallel threads(int count) {
  const auto run = [](void*, int count, int64_t n, int64_t grain, Parallel::Body body, void* context) {
    grain = std::max<int64_t>(grain, 1);
    const int64_t parts = std::min<int64_t>(count, (n + grain - 1) / grain);
    std::vector<std::exception_ptr> failures(parts);
    const auto part = [&](int64_t i) {
      try {
        body(context, n / parts * i + std::min(i, n % parts), n / parts * (i + 1) + std::min(i + 1, n % parts));
      } catch (...) {
        failures[i] = std::current_exception();
      }
    };
    std::vector<std::thread> started;
    started.reserve(parts - 1);
    for (int64_t i = 1; i < parts; ++i) {
      try {
        started.emplace_back(part, i);
      } catch (const std::system_error&) {
        part(i);  // the system has no thread left: the result is the same without it
      }
    }
    part(0);
    for (std::thread& thread : started) thread.join();
    for (const std::exception_ptr& failure : failures)
      if (failure) std::rethrow_exception(failure);
  };
  return count <= 1 ? serial() : Parallel(run, count);
}

}  // namespace crosspoint
