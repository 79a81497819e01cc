#include "crosspoint/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace crosspoint {
namespace {

Isa supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa best = supported();
  const char* forced = std::getenv("CROSSPOINT_CPU");
#if defined(CROSSPOINT_ONLY)
  const std::string only = isa_name(Isa::CROSSPOINT_ONLY);
  if (Isa::CROSSPOINT_ONLY > best)
    throw std::runtime_error("these kernels are built for " + only + " alone, and this processor runs at most " +
                             isa_name(best));
  if (forced != nullptr && *forced != '\0' && forced != only)
    throw std::runtime_error("CROSSPOINT_CPU must be " + only + ", the only variant of this build, got " + forced);
  return Isa::CROSSPOINT_ONLY;
#else
  if (forced == nullptr || *forced == '\0') return best;
  for (Isa candidate : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::string(forced) != isa_name(candidate)) continue;
    if (candidate > best)
      throw std::runtime_error(std::string("CROSSPOINT_CPU=") + forced + ": this processor runs at most " +
                               isa_name(best));
    return candidate;
  }
  throw std::runtime_error(std::string("CROSSPOINT_CPU must be avx512, avx2 or baseline, got ") + forced);
#endif
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa value) {
  switch (value) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::baseline: return "baseline";
  }
  return "unknown";
}

}  // namespace crosspoint
