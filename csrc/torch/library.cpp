// Operators that describe the library itself.
#include <string>

#include "common.h"
#include "crosspoint/isa.h"

namespace crosspoint::binding {

std::string cpu_variant() { return isa_name(isa()); }

}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CompositeExplicitAutograd, m) {
  m.impl("cpu_variant", TORCH_BOX(&crosspoint::binding::cpu_variant));
}
