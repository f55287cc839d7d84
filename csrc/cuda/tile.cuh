#pragma once

#include <cstring>

#include "cuda/numbers.cuh"

namespace resnet_fused::cuda {

// Constants of a tile of channels, K of each, in shared memory. Four floats of a lane lie beside those of the next, so
// that 16-byte accesses of a warp meet every bank once.
template <typename C, int V>
__device__ __forceinline__ int place_in_tile(int slot, int i, int tile_slots) {
  if constexpr (V == 8) return (i / 4 * tile_slots + slot) * 4 + i % 4;
  return slot * V + i;
}

template <typename C, int K, int V>
struct RowConstants {
  const C (*shared)[kTileChannels];
  int slot, tile_slots;
  template <int k>
  __device__ __forceinline__ Values<C, V> get() const {
    Values<C, V> r;
    if constexpr (V * sizeof(C) >= 16) {
      constexpr int kPart = 16 / sizeof(C);
#pragma unroll
      for (int i = 0; i < V; i += kPart) {
        const uint4 word = *reinterpret_cast<const uint4*>(&shared[k][place_in_tile<C, V>(slot, i, tile_slots)]);
        memcpy(&r.v[i], &word, 16);
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) r.v[i] = shared[k][place_in_tile<C, V>(slot, i, tile_slots)];
    }
    return r;
  }
};

}  // namespace resnet_fused::cuda
