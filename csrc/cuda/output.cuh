// What the forward passes write: the output behind the ReLU, and its mask.
#pragma once

#include "cuda/walk.cuh"

namespace resnet_fused::cuda {

// Applies the ReLU where there is one, rounds, and stores where the place is active.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> put_output(Values<Compute<T>, V> v, bool relu, void* output, int64_t at,
                                                 bool active) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (relu && !positive_or_nan(v[i])) v.v[i] = 0;
  }
  const auto y = Pack<T, V>::of(v);
  if (active) y.store(output, at);
  return y;
}

// The bits of the rounded values: a small positive one may become zero, and then the gradient stops there. All lanes of
// a warp take part.
template <typename T, int V>
__device__ __forceinline__ void put_mask(const Pack<T, V>& y, uint8_t* mask, int64_t byte, bool active, bool inside) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) bits |= positive_or_nan(y[i]) ? 1u << i : 0;
  bits = gather_bits<V>(active ? bits : 0);
  if (inside && writes_byte<V>()) mask[byte] = static_cast<uint8_t>(bits);
}

}  // namespace resnet_fused::cuda
