#include <atomic>
#include <stdexcept>

#include "check.h"

using crosspoint::Parallel;

TEST(ranges_cover_everything_once) {
  for (int count : {1, 2, 3, 16})
    for (int64_t n : {0, 1, 2, 5, 16, 17, 1000})
      for (int64_t grain : {0, 1, 7, 5000}) {
        std::vector<std::atomic<int>> seen(n);
        crosspoint::threads(count).ranges(n, grain, [&](int64_t begin, int64_t end) {
          CHECK(begin < end);
          for (int64_t i = begin; i < end; ++i) ++seen[i];
        });
        for (const auto& times : seen) CHECK(times == 1);
      }
}

TEST(items_are_handed_out_once) {
  for (int count : {1, 2, 5}) {
    std::vector<std::atomic<int>> seen(100);
    std::atomic<int> scratches{0};
    crosspoint::threads(count).items(
        100, [&] { return ++scratches; }, [&](int64_t i, int&) { ++seen[i]; });
    for (const auto& times : seen) CHECK(times == 1);
    CHECK(scratches >= 1 && scratches <= count);
  }
}

TEST(what_a_body_throws_reaches_the_caller) {
  for (int count : {1, 4}) {
    std::string caught;
    try {
      crosspoint::threads(count).ranges(8, 1, [](int64_t, int64_t end) {
        if (end == 8) throw std::runtime_error("from the last range");
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "from the last range");
  }
}

TEST(a_pool_of_the_user_is_passed_through) {
  int calls = 0;
  const auto run = [](void* pool, int threads, int64_t n, int64_t grain, Parallel::Body body, void* context) {
    CHECK(threads == 3 && grain == 5);
    ++*static_cast<int*>(pool);
    body(context, 0, n);
  };
  int64_t total = 0;
  Parallel(run, 3, &calls).ranges(10, 5, [&](int64_t begin, int64_t end) { total += end - begin; });
  CHECK(calls == 1 && total == 10);
}
