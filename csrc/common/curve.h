// The order of a space-filling curve (Morton's): the bits of the coordinates, interleaved.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace crosspoint {

// Spreads 10 bits to every third place.
CROSSPOINT_HD static inline uint32_t spread(uint32_t x) {
  x = (x | x << 16) & 0x030000ff;
  x = (x | x << 8) & 0x0300f00f;
  x = (x | x << 4) & 0x030c30c3;
  return (x | x << 2) & 0x09249249;
}

}  // namespace crosspoint
