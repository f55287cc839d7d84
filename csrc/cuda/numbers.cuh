// The dtypes of tensors, the types that the device computes with, and accesses of several values at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "batch_norm.h"
#include "cuda/arguments.h"

namespace resnet_fused::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

// Arithmetic and statistics: double for double, float for every other dtype.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double number(double v) { return v; }
__device__ __forceinline__ float number(float v) { return v; }
__device__ __forceinline__ float number(BFloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float number(Half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T rounded(Compute<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, Half>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = unsigned;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};

// V consecutive values that are loaded and stored in one access.
template <typename T, int V>
union Pack {
  using Word = typename WordOf<V * sizeof(T)>::Type;
  Word word;
  T values[V];

  __device__ __forceinline__ Pack() : word{} {}
  __device__ __forceinline__ void load(const void* from, int64_t at) {
    word = *reinterpret_cast<const Word*>(static_cast<const T*>(from) + at);
  }
  __device__ __forceinline__ void store(void* to, int64_t at) const {
    *reinterpret_cast<Word*>(static_cast<T*>(to) + at) = word;
  }
  __device__ __forceinline__ Compute<T> operator[](int i) const { return number(values[i]); }
};
template <typename T>
union Pack<T, 1> {
  T values[1];

  __device__ __forceinline__ Pack() : values{rounded<T>(0)} {}
  __device__ __forceinline__ void load(const void* from, int64_t at) { values[0] = static_cast<const T*>(from)[at]; }
  __device__ __forceinline__ void store(void* to, int64_t at) const { static_cast<T*>(to)[at] = values[0]; }
  __device__ __forceinline__ Compute<T> operator[](int) const { return number(values[0]); }
};

// V values of the arithmetic's type.
template <typename C, int V>
struct Values {
  C v[V];
  __device__ __forceinline__ C operator[](int i) const { return v[i]; }
};

template <typename C>
__device__ __forceinline__ C value_of(const ChannelVector& vector, int64_t channel, C otherwise) {
  if (vector.data == nullptr) return otherwise;
  const int64_t at = channel * vector.stride;
  switch (vector.dtype) {
    case Dtype::kDouble:
      return static_cast<C>(static_cast<const double*>(vector.data)[at]);
    case Dtype::kFloat:
      return static_cast<C>(static_cast<const float*>(vector.data)[at]);
    case Dtype::kBFloat16:
      return static_cast<C>(number(static_cast<const BFloat16*>(vector.data)[at]));
    default:
      return static_cast<C>(number(static_cast<const Half*>(vector.data)[at]));
  }
}

__device__ __forceinline__ double value_of(const ChannelOutput& vector, int64_t channel) {
  return value_of<double>(ChannelVector{vector.data, vector.stride, vector.dtype}, channel, 0);
}

__device__ __forceinline__ void set_value(const ChannelOutput& vector, int64_t channel, double value) {
  if (vector.data == nullptr) return;
  const int64_t at = channel * vector.stride;
  switch (vector.dtype) {
    case Dtype::kDouble:
      static_cast<double*>(vector.data)[at] = value;
      break;
    case Dtype::kFloat:
      static_cast<float*>(vector.data)[at] = static_cast<float>(value);
      break;
    case Dtype::kBFloat16:
      static_cast<BFloat16*>(vector.data)[at] = rounded<BFloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<Half*>(vector.data)[at] = rounded<Half>(static_cast<float>(value));
      break;
  }
}

template <typename C>
__device__ __forceinline__ Affine<C> affine_of(const Branch& branch, int64_t channel) {
  const C mean = value_of<C>(branch.mean, channel, C(0));
  const C spread = value_of<C>(branch.spread, channel, C(0));
  const C weight = value_of<C>(branch.weight, channel, C(1));
  const C bias = value_of<C>(branch.bias, channel, C(0));
  return {mean, branch.spread_is_var ? scale_of_var(weight, spread, branch.eps) : weight * spread, bias};
}

template <typename C>
__device__ __forceinline__ C invstd_of(const Branch& branch, int64_t channel) {
  const C spread = value_of<C>(branch.spread, channel, C(0));
  return branch.spread_is_var ? scale_of_var(C(1), spread, branch.eps) : spread;
}

// Half of the threads that an SM can hold are to be resident, whatever the kernel.
constexpr int kThreads = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
#define RESNET_FUSED_MIN_BLOCKS 2
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define RESNET_FUSED_MIN_BLOCKS 3
#else
#define RESNET_FUSED_MIN_BLOCKS 4
#endif
#define RESNET_FUSED_LAUNCH_BOUNDS __launch_bounds__(kThreads, RESNET_FUSED_MIN_BLOCKS)

// Calls f.operator()<T>() for the dtype.
template <typename F>
auto dispatch(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kDouble:
      return f.template operator()<double>();
    case Dtype::kFloat:
      return f.template operator()<float>();
    case Dtype::kBFloat16:
      return f.template operator()<BFloat16>();
    default:
      return f.template operator()<Half>();
  }
}

}  // namespace resnet_fused::cuda
