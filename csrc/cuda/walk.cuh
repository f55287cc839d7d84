// How the passes that write one value for each they read go over a tensor: from its end to its beginning, for the end
// is what the L2 still has of the pass before.
//
// Accesses of V values are counted in slots. A run (a plane or a row) has as many slots as its mask bytes have room
// for, so that the lanes that share a byte of the mask lie beside each other in a warp; the last slots of a run may be
// empty. A thread owns V = 16 bytes of values and not the eight of a whole mask byte: float and double accesses of a
// warp then fill whole sectors.
#pragma once

#include "cuda/device.h"
#include "cuda/numbers.cuh"
#include "cuda/tile.cuh"

namespace resnet_fused::cuda {

template <int V>
constexpr int kLanesPerByte = 8 / V;

// The places that a thread treats at once. Those that are not active have no values, those not inside have no mask byte
// either.
template <int U>
struct Places {
  int64_t at[U];       // the first value
  int64_t byte[U];     // its mask byte
  int32_t channel[U];  // of planes
  bool active[U];
  bool inside[U];
};

// Constants of a channel, K of them: the same for all values of an access to a plane. Those of rows are in tile.cuh.
template <typename C, int K, int V>
struct PlaneConstants {
  C v[K];
  template <int k>
  __device__ __forceinline__ Values<C, V> get() const {
    Values<C, V> r;
#pragma unroll
    for (int i = 0; i < V; ++i) r.v[i] = v[k];
    return r;
  }
};

// Planes: a block owns chunks of U accesses a thread anywhere in the tensor. body(places, constants), where
// constants(u) are those of the channel at place u, made by fill(channel, values).
template <typename C, int K, int V, int U, typename Fill, typename Body>
__device__ __forceinline__ void walk_planes(const Walk& w, const Fill& fill, const Body& body) {
  const int64_t last = w.chunks - 1 - blockIdx.x;
  const int64_t first = last * (int64_t{U} * blockDim.x) + threadIdx.x;
  int64_t run = first / w.slots;
  int64_t slot = first - run * w.slots;
  const int32_t channels = static_cast<int32_t>(w.channels);
  int32_t channel = static_cast<int32_t>(run % w.channels);
#pragma unroll 1
  for (int64_t chunk = last; chunk >= 0; chunk -= gridDim.x) {
    Places<U> p;
    int64_t r = run, s = slot;
    int32_t c = channel;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      p.inside[u] = r < w.runs;
      p.active[u] = p.inside[u] && s * V < w.inner;
      p.at[u] = r * w.inner + s * V;
      p.byte[u] = r * w.mask_bytes + s / kLanesPerByte<V>;
      p.channel[u] = c;
      r += w.thread_step.runs;
      s += w.thread_step.slots;
      c += w.thread_step.channels;
      if (s >= w.slots) {
        s -= w.slots;
        ++r;
        ++c;
      }
      if (c >= channels) c -= channels;
    }
    body(p, [&](int u) {
      PlaneConstants<C, K, V> constants;
      fill(p.channel[u], constants.v);
      return constants;
    });
    run -= w.chunk_step.runs;
    slot -= w.chunk_step.slots;
    channel -= w.chunk_step.channels;
    if (slot < 0) {
      slot += w.slots;
      --run;
      --channel;
    }
    if (channel < 0) channel += channels;
  }
}

// Rows: a block owns a tile of channels and chunks of U·tile_rows rows; a thread V channels of it, whose constants the
// block puts into shared memory once, and every tile_rows-th row.
template <typename C, int K, int V, int U, typename Fill, typename Body>
__device__ __forceinline__ void walk_rows(const Walk& w, const Fill& fill, const Body& body) {
  __shared__ __align__(16) C shared[K][kTileChannels];
  const int64_t tile = blockIdx.x % w.tiles;
  const int64_t first_slot = tile * w.tile_slots;
  for (int i = threadIdx.x; i < w.tile_slots * V; i += blockDim.x) {
    const int64_t channel = first_slot * V + i;
    C values[K] = {};
    if (channel < w.channels) fill(channel, values);
    const int place = place_in_tile<C, V>(i / V, i % V, w.tile_slots);
#pragma unroll
    for (int k = 0; k < K; ++k) shared[k][place] = values[k];
  }
  __syncthreads();
  const int row = threadIdx.x / w.tile_slots, column = threadIdx.x - row * w.tile_slots;
  const int64_t slot = first_slot + column;
  const bool has_byte = row < w.tile_rows && slot < w.slots;
  const bool has_values = has_byte && slot * V < w.inner;
  const RowConstants<C, K, V> constants{shared, row < w.tile_rows ? column : 0, w.tile_slots};
  const int64_t step = gridDim.x / w.tiles;
#pragma unroll 1
  for (int64_t chunk = w.chunks - 1 - blockIdx.x / w.tiles; chunk >= 0; chunk -= step) {
    Places<U> p;
    const int64_t first_row = chunk * U * w.tile_rows + row;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t r = first_row + u * w.tile_rows;
      p.inside[u] = has_byte && r < w.runs;
      p.active[u] = has_values && r < w.runs;
      p.at[u] = r * w.inner + slot * V;
      p.byte[u] = r * w.mask_bytes + slot / kLanesPerByte<V>;
    }
    body(p, [&](int) { return constants; });
  }
}

template <bool kRows, typename C, int K, int V, int U, typename Fill, typename Body>
__device__ __forceinline__ void walk(const Walk& w, const Fill& fill, const Body& body) {
  if constexpr (kRows) {
    walk_rows<C, K, V, U>(w, fill, body);
  } else {
    walk_planes<C, K, V, U>(w, fill, body);
  }
}

// Bits of V values each, put together over the lanes that share a byte. All lanes of the warp take part; a lane's place
// in its byte is that of its index.
template <int V>
__device__ __forceinline__ unsigned gather_bits(unsigned bits) {
  const int lane = threadIdx.x % 32;
  if constexpr (V == 8) {
    return bits;
  } else if constexpr (V == 1) {
    return (__ballot_sync(~0u, bits) >> (lane & 24)) & 0xff;
  } else {
    bits <<= lane % kLanesPerByte<V> * V;
#pragma unroll
    for (int distance = 1; distance < kLanesPerByte<V>; distance *= 2) {
      bits |= __shfl_xor_sync(~0u, bits, distance);
    }
    return bits;
  }
}

// Whether this lane is the one that writes the byte it shares. Tiles are whole bytes wide, and warps whole bytes long.
template <int V>
__device__ __forceinline__ bool writes_byte() {
  return threadIdx.x % kLanesPerByte<V> == 0;
}

// The bits of this lane's values in a byte that it shares.
template <int V>
__device__ __forceinline__ unsigned own_bits(unsigned byte) {
  return byte >> (threadIdx.x % kLanesPerByte<V> * V);
}

inline cudaError_t plan_walk(WalkPlan& plan, const Shape& shape, int v, int unroll, const void* kernel) {
  int64_t resident = 1;
  const cudaError_t error = resident_blocks(kernel, kThreads, 0, resident);
  if (error == cudaSuccess) plan = plan_walk(shape, v, unroll, resident);
  return error;
}

}  // namespace resnet_fused::cuda
