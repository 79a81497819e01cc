// Operators that describe the library itself.
#include <string>

#include "common.h"
#include "crosspoint/isa.h"

namespace crosspoint::binding {

std::string cpu_variant() { return isa_name(isa()); }

// One "name: fact" a line, written by setup.py.
std::string build_info() { return CROSSPOINT_BUILD_INFO; }

}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CompositeExplicitAutograd, m) {
  m.impl("cpu_variant", TORCH_BOX(&crosspoint::binding::cpu_variant));
  m.impl("build_info", TORCH_BOX(&crosspoint::binding::build_info));
}
