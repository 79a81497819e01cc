// What the tests are written with: TEST(name) { ... CHECK(condition) ... }, random input, pools to compare.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "crosspoint/threads.h"

namespace check {

struct Test {
  std::string suite, name;
  std::function<void()> body;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int failures = 0;

inline bool add(const char* file, const char* name, std::function<void()> body) {
  std::string suite = file;
  suite = suite.substr(suite.rfind("test_") + 5);
  tests().push_back({suite.substr(0, suite.find('.')), name, std::move(body)});
  return true;
}

inline bool report(bool passed, const char* file, int line, const std::string& what) {
  if (!passed && ++failures <= 20) std::printf("%s:%d: %s\n", file, line, what.c_str());
  return passed;
}

inline std::string pair(double actual, double expected) {
  char text[80];
  std::snprintf(text, sizeof text, ": %.17g instead of %.17g", actual, expected);
  return text;
}

// Largest difference of two vectors relative to the largest expected value; not finite where they differ in length.
template <class T>
double error(const std::vector<T>& actual, const std::vector<double>& expected) {
  if (actual.size() != expected.size()) return std::numeric_limits<double>::infinity();
  double largest = 1e-30, difference = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    const double here = std::abs(double(actual[i]) - expected[i]);
    difference = here <= difference ? difference : here;  // a NaN stays
    if (std::isnan(here)) return here;
  }
  return difference / largest;
}

// Values rounded to T, so that references in double start from the same input.
template <class T>
std::vector<T> normal(int64_t size, unsigned seed, double scale = 1) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> draw(0, scale);
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(draw(engine));
  return values;
}

template <class T>
std::vector<T> lattice(int64_t size, unsigned seed, double scale = 2) {
  std::vector<T> values = normal<T>(size, seed, scale);
  for (T& value : values) value = std::round(value);
  return values;
}

inline std::vector<int64_t> integers(int64_t size, unsigned seed, int64_t low, int64_t high) {
  std::mt19937_64 engine(seed);
  std::uniform_int_distribution<int64_t> draw(low, high);
  std::vector<int64_t> values(size);
  for (int64_t& value : values) value = draw(engine);
  return values;
}

template <class T>
std::vector<double> widen(const std::vector<T>& values) {
  return std::vector<double>(values.begin(), values.end());
}

// f(parallel) gives the same for every number of threads; that result.
template <class F>
auto with_any_threads(F&& f) {
  const auto result = f(crosspoint::serial());
  for (int count : {2, 3, 8})
    report(f(crosspoint::threads(count)) == result, __FILE__, __LINE__,
           "another result on " + std::to_string(count) + " threads");
  return result;
}

}  // namespace check

#define TEST(name)                                                        \
  static void name();                                                     \
  static const bool name##_added = check::add(__FILE__, #name, &(name));  \
  static void name()
#define CHECK(condition) check::report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_BELOW(value, limit) \
  check::report((value) <= (limit), __FILE__, __LINE__, #value + check::pair(value, limit) + " at most")
