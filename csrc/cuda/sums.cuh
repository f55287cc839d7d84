// How the passes that reduce go over a tensor, and how their sums are put together: always in the same order.
//
// A thread adds the terms of a group in the arithmetic's type and the group to a double, so that a GPU with little
// double arithmetic keeps up with its memory. Threads and blocks are put together in double. Where several blocks share
// a channel, each writes its sums to memory that they share and counts itself in; the last one to arrive adds them up.
#pragma once

#include "cuda/device.h"
#include "cuda/numbers.cuh"

namespace resnet_fused::cuda {

// The terms that are added up before double takes over.
template <typename T>
constexpr int kGroup = sizeof(T) == 2 ? 8 : 4;

// The sum of a group. Compensated, it holds what the additions and products round off as well: a gradient's sum is
// often a small rest of large terms, and then these roundings are what one would see of it.
template <typename C, bool kCompensated>
struct Group {
  C sum = 0, rest = 0;

  __device__ __forceinline__ void add(C term) {
    if constexpr (kCompensated) {
      // Knuth's two-sum: the rounding of an addition, exactly.
      const C next = sum + term;
      const C part = next - sum;
      rest += (sum - (next - part)) + (term - part);
      sum = next;
    } else {
      sum += term;
    }
  }
  __device__ __forceinline__ void add_product(C a, C b) {
    if constexpr (kCompensated) {
      const C product = mul_rn(a, b);
      rest += fma(a, b, -product);
      add(product);
    } else {
      sum = fma(a, b, sum);
    }
  }
  // The square of a + rest_of_a. Of squares nothing cancels, and the roundings of many even out: only those of few come
  // to light.
  __device__ __forceinline__ void add_square(C a, C rest_of_a, bool few) {
    if (kCompensated && few) {
      rest = fma(a + a, rest_of_a, rest);
      add_product(a, a);
    } else {
      sum = fma(a, a, sum);
    }
  }
  // a + rest_of_a
  __device__ __forceinline__ void add(C a, C rest_of_a) {
    if constexpr (kCompensated) rest += rest_of_a;
    add(a);
  }
  __device__ __forceinline__ double total() const {
    const double wide = static_cast<double>(sum);
    // Of an infinite sum the rest is not a number.
    return kCompensated && sum - sum == C(0) ? wide + static_cast<double>(rest) : wide;
  }

 private:
  static __device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
  static __device__ __forceinline__ double mul_rn(double a, double b) { return __dmul_rn(a, b); }
};

// The place of one access.
struct Place {
  int64_t at;
  int64_t byte;  // of the mask
  int bit;
  bool active;
};

// The groups of a thread: of planes a group is kSize of the terms of U accesses, of rows (kSize = 0) those of one
// channel.
template <typename C, int K, int V, int kCount, int kSize, bool kCompensated>
struct Groups {
  Group<C, kCompensated> of[K][kCount];

  // That of the k-th sum for value i of access u.
  __device__ __forceinline__ Group<C, kCompensated>& at(int k, int u, int i) {
    if constexpr (kSize == 0) {
      return of[k][i];
    } else {
      return of[k][(u * V + i) / kSize];
    }
  }
};

template <typename T, int V, int U, bool kCompensated>
constexpr int kPlaneGroups = U * V > kGroup<T> && !kCompensated ? U * V / kGroup<T> : 1;
template <typename T, int K, int V, int U, bool kCompensated>
using PlaneGroups = Groups<Compute<T>, K, V, kPlaneGroups<T, V, U, kCompensated>,
                           U * V / kPlaneGroups<T, V, U, kCompensated>, kCompensated>;
template <typename T, int K, int V, bool kCompensated>
using RowGroups = Groups<Compute<T>, K, V, V, 0, kCompensated>;

// The sums over a block, in its first thread.
template <int K>
__device__ __forceinline__ void sum_over_block(double (&v)[K]) {
  __shared__ double of_warp[K][kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v[k] += __shfl_down_sync(~0u, v[k], distance);
    if (lane == 0) of_warp[k][warp] = v[k];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      v[k] = lane < warps ? of_warp[k][lane] : 0;
#pragma unroll
      for (int distance = kThreads / 64; distance > 0; distance /= 2) {
        v[k] += __shfl_down_sync(~0u, v[k], distance);
      }
    }
  }
  __syncthreads();  // of_warp is free again
}

// Counts this block in; true in the last of `splits`, which sets the counter back to zero. What the block wrote to
// global memory before is then visible to the last one: each thread's fence puts its own writes before the barrier, the
// barrier before the count of thread 0; the fence behind the count keeps the reads that follow from being served by what
// an L1 or a register held before.
__device__ __forceinline__ bool is_last_block(unsigned* arrived, int64_t splits) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned of_last = static_cast<unsigned>(splits - 1);
    last = atomicInc(arrived, of_last) == of_last;
  }
  __syncthreads();
  const bool result = last;
  __threadfence();
  __syncthreads();  // `last` is free again
  return result;
}

// The places of the chunks split, split + splits, ... of a channel of planes, U a thread at once: f(places).
template <int V, int U, typename F>
__device__ __forceinline__ void each_place_of_planes(const SumsWalk& w, int64_t channel, int64_t split, const F& f) {
  const int64_t first = split * (int64_t{U} * blockDim.x) + threadIdx.x;
  int64_t outer = first / w.slots;
  int64_t slot = first - outer * w.slots;
#pragma unroll 1
  for (int64_t chunk = split; chunk < w.chunks; chunk += w.splits) {
    Place p[U];
    int64_t n = outer, s = slot;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t run = n * w.channels + channel;
      p[u].active = n < w.outer;
      p[u].at = run * w.inner + s * V;
      p[u].byte = run * w.mask_bytes + s * V / 8;
      p[u].bit = static_cast<int>(s * V % 8);
      n += w.thread_outer;
      s += w.thread_slots;
      if (s >= w.slots) {
        s -= w.slots;
        ++n;
      }
    }
    f(p);
    outer += w.chunk_outer;
    slot += w.chunk_slots;
    if (slot >= w.slots) {
      slot -= w.slots;
      ++outer;
    }
  }
}

// Planes: a block owns chunks of one channel after the other. They are interleaved with those of the channel's other
// blocks, so that all blocks go through the batch together and the L2 keeps its end.
//   begin(channel): the block prepares constants of the channel
//   terms(places, groups): adds the terms of U accesses
//   finish(channel, sums): the first thread of the last block
template <typename T, int K, int V, int U, bool kCompensated, typename Begin, typename Terms, typename Finish>
__device__ __forceinline__ void sum_planes(const SumsWalk& w, const Begin& begin, const Terms& terms,
                                           const Finish& finish) {
  constexpr int kGroups = kPlaneGroups<T, V, U, kCompensated>;
  for (int64_t item = blockIdx.x; item < w.items; item += gridDim.x) {
    const int64_t channel = item % w.channels, split = item / w.channels;
    begin(channel);
    double sums[K] = {};
    each_place_of_planes<V, U>(w, channel, split, [&](const Place(&p)[U]) {
      PlaneGroups<T, K, V, U, kCompensated> groups;
      terms(p, groups);
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) sums[k] += groups.of[k][i].total();
      }
    });
    sum_over_block<K>(sums);
    if (w.splits > 1) {
      double* partial = w.partials + channel * w.splits * K;
      if (threadIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) partial[split * K + k] = sums[k];
      }
      if (!is_last_block(w.arrived + channel, w.splits)) continue;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        sums[k] = 0;
        for (int64_t i = threadIdx.x; i < w.splits; i += blockDim.x) sums[k] += partial[i * K + k];
      }
      sum_over_block<K>(sums);
    }
    if (threadIdx.x == 0) finish(channel, sums);
  }
}

// The sums of a thread's V channels, K of each, in dynamic shared memory: registers would not do for them. Lanes lie
// beside each other.
template <int K, int V>
struct ThreadSums {
  double* own;
  __device__ __forceinline__ ThreadSums() {
    extern __shared__ __align__(16) double sums[];
    own = sums + threadIdx.x;
  }
  __device__ __forceinline__ double& at(int k, int i, int thread = 0) const {
    return own[(k * V + i) * kThreads + thread];
  }
  // One after the other: there are no registers for all of them at once.
  __device__ __forceinline__ void add(int k, int i, double term) const {
    volatile double* to = own + (k * V + i) * kThreads;
    *to = *to + term;
  }
  __device__ __forceinline__ double* of_thread(int thread) const { return own - threadIdx.x + thread; }
  __device__ __forceinline__ void clear() const {
#pragma unroll
    for (int j = 0; j < K * V; ++j) own[j * kThreads] = 0;
  }
};

// Adds up over the rows of threads, into the first.
template <int K, int V>
__device__ __forceinline__ void sum_over_rows(const ThreadSums<K, V>& sums, int row, int rows, int tile_slots) {
  __syncthreads();
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    if (row + half < rows) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < V; ++i) sums.at(k, i) += sums.at(k, i, half * tile_slots);
      }
    }
    rows = half;
    __syncthreads();
  }
}

// What a block and a thread of rows own: a tile of channels and of its rows the chunks split, split + splits, ...; of
// the tile V channels and every tile_rows-th row.
struct RowsOwner {
  int tile, split, row, column;

  // Opaque to the compiler, so that it makes them again behind the loop and keeps no registers for them all along.
  __device__ __forceinline__ explicit RowsOwner(const SumsWalk& w) {
    unsigned thread = threadIdx.x, block = blockIdx.x;
    asm volatile("" : "+r"(thread), "+r"(block));
    split = static_cast<int>(block / static_cast<unsigned>(w.tiles));
    tile = static_cast<int>(block) - split * static_cast<int>(w.tiles);
    row = static_cast<int>(thread) / w.tile_slots;
    column = static_cast<int>(thread) - row * w.tile_slots;
  }
  __device__ __forceinline__ int64_t slot(const SumsWalk& w) const { return int64_t{tile} * w.tile_slots + column; }
  __device__ __forceinline__ bool has_values(const SumsWalk& w) const { return row < w.tile_rows && slot(w) < w.slots; }
};

// Puts the sums of a tile's blocks together, in the last of them; false in every other. Blocks are counted in groups
// first, for a single block would be at it long: its SM reads no faster than any other.
template <int K, int V>
__device__ __forceinline__ bool merge_tile(const SumsWalk& w, const ThreadSums<K, V>& sums, const RowsOwner& own) {
  const int width = w.tile_slots * V;
  double* partials = w.partials + int64_t{own.tile} * (w.splits + w.groups) * K * width;
  unsigned* arrived = w.arrived + int64_t{own.tile} * (w.groups + 1);
  const auto put = [&](int64_t slot) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        partials[(slot * K + k) * width + i] = sums.of_thread(i / V)[(k * V + i % V) * kThreads];
      }
    }
  };
  // Threads of a row read one channel each, as it lies, and leave the sums where sum_over_rows looks for them.
  const int rows = static_cast<int>(blockDim.x) / width, row = threadIdx.x / width, i = threadIdx.x - row * width;
  const auto merge = [&](int64_t first, int64_t count) {
    double total[K] = {};
    if (row < rows) {
#pragma unroll 2
      for (int64_t s = row; s < count; s += rows) {
#pragma unroll
        for (int k = 0; k < K; ++k) total[k] += partials[((first + s) * K + k) * width + i];
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        sums.of_thread(row * w.tile_slots + i / V)[(k * V + i % V) * kThreads] = total[k];
      }
    }
    sum_over_rows(sums, own.row, rows, w.tile_slots);
  };
  const int64_t group = own.split / w.group_splits, first = group * w.group_splits, left = w.splits - first;
  const int64_t members = left < w.group_splits ? left : w.group_splits;
  put(own.split);
  if (!is_last_block(arrived + group, members)) return false;
  merge(first, members);
  if (w.groups == 1) return true;
  put(w.splits + group);
  if (!is_last_block(arrived + w.groups, w.groups)) return false;
  merge(w.splits, w.groups);
  return true;
}

// The places of a thread in a chunk of U rows each.
template <int V, int U>
__device__ __forceinline__ void places_of_rows(const SumsWalk& w, int64_t slot, bool has_values, int chunk, int row,
                                               Place (&p)[U]) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t r = int64_t{chunk} * (U * w.tile_rows) + (u * w.tile_rows + row);
    p[u].active = has_values && r < w.outer;
    p[u].at = r * w.inner + slot * V;
    // Rows of eight whole values are of whole bytes: one product less to keep.
    p[u].byte = V == 8 ? p[u].at >> 3 : r * w.mask_bytes + slot * V / 8;
    p[u].bit = static_cast<int>(slot * V % 8);
  }
}

// Rows: see RowsOwner. A thread adds a group of rows, of one chunk or several, at a time.
//   begin(first channel, count): the block prepares constants of the tile
//   terms(places, column, groups): adds the terms of U rows
//   finish(channel, sums): of the last block, one thread a channel
template <typename T, int K, int V, int U, bool kCompensated, typename Begin, typename Terms, typename Finish>
__device__ __forceinline__ void sum_rows(const SumsWalk& w, const Begin& begin, const Terms& terms,
                                         const Finish& finish) {
  constexpr int kRows = kGroup<T>;
  static_assert(kRows % U == 0);
  const ThreadSums<K, V> sums;
  const auto channels_of = [&](int tile) {
    const int64_t left = w.channels - int64_t{tile} * w.tile_slots * V, width = int64_t{w.tile_slots} * V;
    return static_cast<int>(left < width ? left : width);
  };
  {
    const RowsOwner own(w);
    begin(int64_t{own.tile} * w.tile_slots * V, channels_of(own.tile));
    sums.clear();
    __syncthreads();
    const int64_t slot = own.slot(w);
    const bool has_values = own.has_values(w);
    const int chunks = static_cast<int>(w.chunks), splits = static_cast<int>(w.splits);
    int chunk = own.split;
#pragma unroll 1
    while (chunk < chunks) {
      RowGroups<T, K, V, kCompensated> groups;
      // Where one row or two fill the registers, the loop must not be unrolled either.
#pragma unroll(U < 4 ? 1 : 2)
      for (int g = 0; g < kRows && chunk < chunks; g += U) {
        Place p[U];
        places_of_rows<V>(w, slot, has_values, chunk, own.row, p);
        terms(p, own.column, groups);
        chunk += splits;
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < V; ++i) sums.add(k, i, groups.of[k][i].total());
      }
    }
  }
  const RowsOwner own(w);
  sum_over_rows(sums, own.row, w.tile_rows, w.tile_slots);
  if (w.splits > 1 && !merge_tile(w, sums, own)) return;
  const int channels = channels_of(own.tile);
  for (int i = threadIdx.x; i < channels; i += blockDim.x) {
    double of_channel[K];
#pragma unroll
    for (int k = 0; k < K; ++k) of_channel[k] = sums.of_thread(i / V)[(k * V + i % V) * kThreads];
    finish(int64_t{own.tile} * w.tile_slots * V + i, of_channel);
  }
}

inline cudaError_t plan_sums(SumsPlan& plan, const Shape& shape, int sums, int v, int unroll, int branches,
                             const void* kernel) {
  cudaError_t error = cudaSuccess;
  plan = plan_sums(shape, sums, v, unroll, branches, false, [&](int threads, int64_t shared_bytes) {
    int64_t blocks = 1;
    error = resident_blocks(kernel, threads, shared_bytes, blocks);
    return blocks;
  });
  return error;
}

// Memory for blocks that share a channel.
inline cudaError_t prepare_workspace(SumsPlan& plan, int branches, const Launch& launch) {
  if (plan.counters == 0) return cudaSuccess;
  Workspace workspace;
  const cudaError_t error = launch.workspace(plan.partial_doubles * branches * static_cast<int64_t>(sizeof(double)),
                                             plan.counters * branches, workspace);
  plan.walk.partials = static_cast<double*>(workspace.partials);
  plan.walk.arrived = workspace.counters;
  return error;
}

}  // namespace resnet_fused::cuda
