// How many blocks a launch has and what each owns. Plain C++: tests compile it for devices that are not at hand.
#pragma once

#include <algorithm>
#include <cstdint>

namespace resnet_fused::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// The largest grid in x.
inline unsigned grid_size(int64_t blocks) { return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 0x7fffffff)); }

constexpr int kThreads = 256;
// The widest tile, whose constants lie in shared memory.
constexpr int kTileChannels = 256;

// A tensor without gaps as rows of C values (channels_last, or a single position) or planes of S = H·W.
struct Shape {
  int64_t batch;
  int64_t channels;
  int64_t positions;
  bool rows;

  constexpr int64_t count() const { return batch * positions; }
  constexpr int64_t numel() const { return batch * positions * channels; }
  // A run is a row or a plane. The mask packs each into whole bytes.
  constexpr int64_t inner() const { return rows ? channels : positions; }
  constexpr int64_t runs() const { return rows ? batch * positions : batch * channels; }
  constexpr int64_t mask_bytes() const { return (inner() + 7) / 8; }
};

// Passes that write one value for each they read (walk.cuh) -----------------------------------------------------------

// A distance in slots, taken apart.
struct Step {
  int64_t runs, slots;
  int32_t channels;
};

struct Walk {
  int64_t runs;
  int64_t inner;
  int64_t channels;
  int64_t slots;
  int64_t mask_bytes;
  int64_t chunks;
  Step thread_step, chunk_step;  // planes: between a thread's places in a chunk, and between its chunks
  int64_t tiles;                 // rows: a block owns a tile of channels, and of each chunk of rows
  int32_t tile_slots, tile_rows;
};

struct WalkPlan {
  Walk walk;
  unsigned grid;
  unsigned block;
};

// As many blocks as the device holds, or fewer where there is less to do. A thread has `unroll` accesses of v values
// under way at once.
inline WalkPlan plan_walk(const Shape& shape, int v, int unroll, int64_t resident) {
  WalkPlan plan{};
  Walk& w = plan.walk;
  const int lanes_per_byte = 8 / v;
  w.runs = shape.runs();
  w.inner = shape.inner();
  w.channels = shape.channels;
  w.mask_bytes = shape.mask_bytes();
  w.slots = w.mask_bytes * lanes_per_byte;
  plan.block = kThreads;
  if (shape.rows) {
    const int64_t widest = kTileChannels / v;
    w.tiles = divide_up(w.slots, widest);
    w.tile_slots = static_cast<int32_t>(round_up(divide_up(w.slots, w.tiles), lanes_per_byte));
    w.tiles = divide_up(w.slots, w.tile_slots);
    w.tile_rows = kThreads / w.tile_slots;
    w.chunks = divide_up(w.runs, int64_t{unroll} * w.tile_rows);
    plan.grid = grid_size(w.tiles * std::clamp<int64_t>(resident / w.tiles, 1, w.chunks));
    // A whole number of blocks to a tile, whatever the limit.
    plan.grid -= static_cast<unsigned>(plan.grid % w.tiles);
  } else {
    const int64_t chunk = int64_t{unroll} * kThreads;
    w.chunks = divide_up(w.runs * w.slots, chunk);
    plan.grid = grid_size(std::min(resident, w.chunks));
    const auto step = [&](int64_t slots) {
      return Step{slots / w.slots, slots % w.slots, static_cast<int32_t>(slots / w.slots % w.channels)};
    };
    w.thread_step = step(kThreads);
    w.chunk_step = step(chunk * plan.grid);
  }
  return plan;
}

// Passes that reduce (sums.cuh) ---------------------------------------------------------------------------------------

struct SumsWalk {
  int64_t outer;  // planes: N; rows: the rows
  int64_t slots;  // accesses of a plane or of a row
  int64_t inner;  // values of a plane or of a row
  int64_t channels;
  int64_t mask_bytes;
  int64_t chunks;                      // of `unroll` accesses a thread
  int64_t splits;                      // blocks that share a channel or a tile of channels
  int64_t items;                       // channels or tiles, times splits
  int64_t tiles;                       // rows
  int64_t groups, group_splits;        // rows: the splits, counted in groups first
  int64_t thread_outer, thread_slots;  // planes: from a thread's place in a chunk to its next
  int64_t chunk_outer, chunk_slots;    // and from its chunk to its next
  int32_t tile_slots, tile_rows;       // rows
  double* partials;
  unsigned* arrived;
  int64_t branch_partials, branch_counters;  // from one branch's to the next one's
};

struct SumsPlan {
  SumsWalk walk;
  unsigned grid;
  unsigned block;
  int64_t shared_bytes;
  int64_t partial_doubles, counters;  // of one branch
};

// How many blocks share each of `groups` channels or tiles, `chunks` of work each. As many as the device holds at once
// leave a part of it idle where the groups do not divide them well; more than one round of blocks can then take less
// time. It is measured in half chunks: a block spends one on its beginning and end.
inline int64_t splits_of(int64_t groups, int64_t chunks, int64_t resident, bool one_round) {
  int64_t best = std::clamp<int64_t>(resident / std::max<int64_t>(groups, 1), 1, std::max<int64_t>(chunks, 1));
  if (one_round) return best;
  const auto time = [&](int64_t splits) {
    return divide_up(groups * splits, resident) * (2 * divide_up(chunks, splits) + 1);
  };
  const int64_t most = std::min<int64_t>(4 * best + 4, chunks);
  for (int64_t splits = best + 1; splits <= most; ++splits) {
    if (20 * time(splits) < 19 * time(best)) best = splits;
  }
  return best;
}

// Enough blocks to fill the device, resident(threads, shared bytes), each with a chunk or more to do. `branches` inputs
// are reduced at once, `sums` sums a channel each. On chip all blocks are resident.
template <typename Resident>
SumsPlan plan_sums(const Shape& shape, int sums, int v, int unroll, int branches, bool on_chip,
                   const Resident& resident) {
  SumsPlan plan{};
  SumsWalk& w = plan.walk;
  w.inner = shape.inner();
  w.channels = shape.channels;
  w.mask_bytes = shape.mask_bytes();
  w.slots = std::max<int64_t>(divide_up(w.inner, v), 1);
  int64_t groups = 0;
  if (shape.rows) {
    w.outer = shape.runs();
    // Tiles of whole sectors and more, but narrow, so that a block sees many rows: what it writes for its channels is
    // then little.
    w.tiles = divide_up(w.slots, v > 1 ? 8 : 128);
    // Whole bytes of the mask, for who writes one.
    w.tile_slots = static_cast<int32_t>(round_up(divide_up(w.slots, w.tiles), v > 1 ? 8 / v : 1));
    w.tiles = divide_up(w.slots, w.tile_slots);
    w.tile_rows = kThreads / w.tile_slots;
    w.chunks = divide_up(w.outer, int64_t{unroll} * w.tile_rows);
    plan.block = kThreads;
    plan.shared_bytes = int64_t{sums} * v * kThreads * static_cast<int64_t>(sizeof(double));
    groups = w.tiles;
  } else {
    w.outer = shape.numel() == 0 ? 0 : shape.batch;
    const int64_t accesses = w.outer * w.slots;
    plan.block = static_cast<unsigned>(std::clamp<int64_t>(round_up(divide_up(accesses, unroll), 32), 32, kThreads));
    const int64_t chunk = int64_t{unroll} * plan.block;
    w.chunks = divide_up(accesses, chunk);
    groups = w.channels;
  }
  const int64_t blocks = std::max<int64_t>(resident(static_cast<int>(plan.block), plan.shared_bytes), 1);
  // On chip a thread has eight rows at least: the partial sums of more blocks would cost the traffic that is to be saved.
  const int64_t least = on_chip && shape.rows ? divide_up(8, unroll) : 1;
  w.splits = splits_of(groups * branches, divide_up(w.chunks, least), blocks, on_chip);
  w.items = groups * w.splits;
  constexpr int64_t kFew = 32;
  w.group_splits = w.splits <= kFew ? w.splits : kFew;
  w.groups = divide_up(w.splits, w.group_splits);
  plan.grid = grid_size(w.items);
  if (!shape.rows) {
    const int64_t chunk = int64_t{unroll} * plan.block * w.splits;
    w.thread_outer = plan.block / w.slots;
    w.thread_slots = plan.block % w.slots;
    w.chunk_outer = chunk / w.slots;
    w.chunk_slots = chunk % w.slots;
  }
  if (w.splits > 1) {
    if (shape.rows) {
      plan.partial_doubles = w.tiles * (w.splits + w.groups) * sums * w.tile_slots * v;
      plan.counters = w.tiles * (w.groups + 1);
    } else {
      plan.partial_doubles = w.items * sums;
      plan.counters = groups;
    }
    w.branch_partials = plan.partial_doubles;
    w.branch_counters = plan.counters;
  }
  return plan;
}

}  // namespace resnet_fused::cuda
