// Where one search of k-NN gives way to another. Guessed by arithmetic for an H200 and never measured: instructions of
// a warp, of which it issues about 784 G/s, and 2.5 us to start a kernel. The stage `paths` of scripts/gpu_check.sh
// times both sides around each number (CROSSPOINT_KNN_PATH forces them).
#pragma once

#include <cstdint>

namespace crosspoint::cuda {

// Channels that `cloud` takes, beyond which `filter` does: direct differences of C channels take 2.1 C + 1 instructions
// for 32 points, twice where they are not kept, against about 700 in all of the filter at 1,024 points: 8 channels are
// 580 + 310. By channels and k alone: the two sum distances of many channels in different orders, and padding or the
// rest of a batch must not change an answer.
inline constexpr int64_t kFewChannels = 8;

// `cloud` takes N / 32 x 15.4 + 310 instructions a query (each point twice), `tree` about 1,000, and 27 us to start and
// to sort. For one cloud both take 36 us at N = 7,300: more points than this are the tree's.
inline constexpr int64_t kTreeLeast = 7168;

// Spread over 65,536 queries the tree's start is 320 instructions of each, so that it pays from N = 1,900 on; with
// room for what sorting takes of a batch, from here.
inline constexpr int64_t kTreeLeastOfMany = 4096;
inline constexpr int64_t kManyQueries = 65536;

}  // namespace crosspoint::cuda
