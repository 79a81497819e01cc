// Instruction-set variants of the CPU kernels, and the choice between them at run time.
#pragma once

#include "crosspoint/parallel.h"

namespace crosspoint {

enum class Isa { baseline, avx2, avx512 };

// The best variant that this binary holds and this processor runs; CROSSPOINT_CPU=avx2|baseline lowers it.
// An unknown value, or one that this processor cannot run, throws std::runtime_error.
Isa isa();
const char* isa_name(Isa);

}  // namespace crosspoint

#if !defined(__x86_64__) && !defined(CROSSPOINT_ONLY)
#define CROSSPOINT_ONLY baseline
#endif

// Declares a CPU kernel `void name(const Args&, const Parallel&)`: its variants, and the function that picks one.
// A build that defines CROSSPOINT_ONLY has that variant alone.
#if defined(CROSSPOINT_ONLY)
#define CROSSPOINT_CPU_KERNEL(name, Args)                                                                \
  namespace crosspoint {                                                                                 \
  namespace CROSSPOINT_ONLY { void name(const Args&, const Parallel&); }                                 \
  inline void name(const Args& args, const Parallel& parallel) { isa(), CROSSPOINT_ONLY::name(args, parallel); } \
  }
#else
#define CROSSPOINT_CPU_KERNEL(name, Args)                                               \
  namespace crosspoint {                                                                \
  namespace avx512 { void name(const Args&, const Parallel&); }                         \
  namespace avx2 { void name(const Args&, const Parallel&); }                           \
  namespace baseline { void name(const Args&, const Parallel&); }                       \
  inline void name(const Args& args, const Parallel& parallel) {                        \
    switch (isa()) {                                                                    \
      case Isa::avx512: return avx512::name(args, parallel);                            \
      case Isa::avx2: return avx2::name(args, parallel);                                \
      case Isa::baseline: return baseline::name(args, parallel);                        \
    }                                                                                   \
  }                                                                                     \
  }
#endif
