// Where rows of two-byte channels lie for Hopper's tensor cores (wgmma.h), in shared and in global memory, and how
// descriptors say so. All of it runs on the host, too.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace crosspoint::cuda {

inline constexpr int kPanelBytes = 128;  // of a row of a panel: 64 channels of two bytes

// Operands lie in panels of 64 channels: a row is 128 bytes, and its eight groups of 16 bytes are permuted by the row's
// number (the 128-byte swizzle), so that neither eight rows of one group nor eight groups of one row meet a bank
// conflict. A panel begins at a multiple of 1,024 bytes.
CROSSPOINT_HD constexpr int panel_byte(int row, int group) { return row * kPanelBytes + (group ^ row % 8) * 16; }

// Rows of one view in global memory as those panels are copied: blocks of 128 rows, in each of which panel follows
// panel, so that any run of a block's rows is one piece of a panel. The last block has the rows that are left, and room
// for no more.
struct PanelledRows {
  static constexpr int64_t block = 128;
  int64_t count;  // rows of the view
  int64_t width;  // channels: a multiple of 64

  CROSSPOINT_HD int64_t rows_of(int64_t first) const { return count - first < block ? count - first : block; }
  // Where row i of panel p begins, before its groups are permuted.
  CROSSPOINT_HD int64_t line(int64_t i, int64_t p) const {
    const int64_t first = i / block * block;
    return first * width * 2 + (p * rows_of(first) + i - first) * kPanelBytes;
  }
  CROSSPOINT_HD int64_t group(int64_t i, int64_t g) const { return line(i, g / 8) + (g % 8 ^ i % 8) * 16; }
};

// The descriptor of an operand in panels, from byte `address` of shared memory on. K-major (the depth runs along the
// panel's rows): 32 bytes further is the next 16 of the depth, `stride` lies between eight rows, and `leading` is not
// used. MN-major (the depth runs down the rows): 16 rows further is the next 16 of the depth, `stride` lies between
// eight of its rows, and `leading` between panels.
CROSSPOINT_HD constexpr uint64_t panel_descriptor(uint32_t address, uint32_t leading = 16) {
  constexpr uint64_t stride = 8 * kPanelBytes, swizzle_128 = 1;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | stride >> 4 << 32 | swizzle_128 << 62;
}

}  // namespace crosspoint::cuda
