// How work is divided: into pieces that depend on the shape alone, which any number of threads then take.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace resnet_fused::cpu {

// Below this many elements a second thread costs more than it does.
constexpr int64_t kSerialElements = 32768;

// f(begin, end) over parts of [0, n), in one call where there is little to do.
template <typename F>
void parallel(int64_t n, int64_t elements, const F& f) {
  if (n == 0) return;
  if (n == 1 || elements < kSerialElements) {
    f(int64_t{0}, n);
  } else {
    torch::stable::parallel_for(0, n, 1, f);
  }
}

// Rows in pieces with sums of their own, few enough that those cost little to add up.
struct RowPieces {
  explicit RowPieces(const Shape& shape) : rows(shape.outer()) {
    while (count < 64 && rows / (count * 2) >= 48) count *= 2;
  }
  int64_t begin(int64_t piece) const { return rows * piece / count; }

  int64_t rows;
  int64_t count = 1;
};

// How many channels of planes go through the kernels together. Planes of one channel lie C·S values apart, each on a page of its own
// and, where that is a power of two, in the same sets of the cache. So small planes are taken some channels at a time, as long as their
// values stay in the cache between the two passes.
inline int64_t channels_together(const Shape& shape, int64_t value_bytes) {
  constexpr int64_t kRunBytes = 8192, kCacheBytes = 131072;
  const int64_t run = kRunBytes / (shape.positions * value_bytes), fit = kCacheBytes / (shape.count() * value_bytes);
  return std::clamp<int64_t>(std::min(run, fit), 1, kChannelsTogether);
}

// f(channel, channels) for channels [begin, end), `together` at a time.
template <typename F>
void for_channels(int64_t begin, int64_t end, int64_t together, const F& f) {
  for (int64_t c = begin; c < end; c += together) f(c, std::min(together, end - c));
}

// The values of a channel of planes in pieces: one, unless there are too few channels to keep the threads of a large machine busy.
struct PlanePieces {
  explicit PlanePieces(const Shape& shape) : values(shape.count()) {
    constexpr int64_t kTasks = 64, kLeast = 16384;
    while (shape.channels * count < kTasks && values / (count * 2) >= kLeast) count *= 2;
    positions = shape.positions;
  }
  // On a byte of the mask: a plane's beginning or a multiple of 64 values within.
  int64_t begin(int64_t piece) const {
    if (piece == count) return values;
    const int64_t at = values * piece / count;
    const int64_t within = at % positions;
    return at - within + within / 64 * 64;
  }

  int64_t values;
  int64_t positions;
  int64_t count = 1;
};

}  // namespace resnet_fused::cpu
