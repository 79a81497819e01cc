// crosspoint_tests SUITE runs the tests of test_SUITE.cpp; 77 if this processor cannot run the variant asked for.
#include <cstring>
#include <exception>

#include "check.h"
#include "crosspoint/isa.h"

int main(int count, char** arguments) {
  const std::string suite = count > 1 ? arguments[1] : "";
  try {
    std::printf("%s on %s\n", suite.c_str(), crosspoint::isa_name(crosspoint::isa()));
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return std::strstr(error.what(), "this processor runs at most") != nullptr ? 77 : 1;
  }
  int run = 0;
  for (const check::Test& test : check::tests()) {
    if (test.suite != suite) continue;
    ++run;
    const int before = check::failures;
    test.body();
    std::printf("%s %s\n", check::failures == before ? "passed" : "FAILED", test.name.c_str());
  }
  if (run == 0) std::printf("no suite of this name\n");
  return run > 0 && check::failures == 0 ? 0 : 1;
}
