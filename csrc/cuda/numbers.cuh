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

// V values of the arithmetic's type.
template <typename C, int V>
struct Values {
  C v[V];
  __device__ __forceinline__ C operator[](int i) const { return v[i]; }
};

// V consecutive values that are loaded and stored in one access, taken apart and put together by arithmetic: a compiler
// that may see them as an array splits the access.
template <typename T, int V>
struct Pack {
  static constexpr int kWords = V * sizeof(T) / 4;
  static_assert(kWords == 2 || kWords == 4);
  unsigned words[kWords] = {};

  __device__ __forceinline__ void load(const void* from, int64_t at) {
    const T* address = static_cast<const T*>(from) + at;
    if constexpr (kWords == 4) {
      const uint4 word = __ldg(reinterpret_cast<const uint4*>(address));
      words[0] = word.x, words[1] = word.y, words[2] = word.z, words[3] = word.w;
    } else {
      const uint2 word = __ldg(reinterpret_cast<const uint2*>(address));
      words[0] = word.x, words[1] = word.y;
    }
  }
  __device__ __forceinline__ void store(void* to, int64_t at) const {
    // A store of a vector's elements is not always put together again.
    const size_t address = __cvta_generic_to_global(static_cast<T*>(to) + at);
    if constexpr (kWords == 4) {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]),
                   "r"(words[2]), "r"(words[3])
                   : "memory");
    } else {
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
    }
  }
  __device__ __forceinline__ Compute<T> operator[](int i) const {
    if constexpr (std::is_same_v<T, double>) {
      return __hiloint2double(static_cast<int>(words[2 * i + 1]), static_cast<int>(words[2 * i]));
    } else if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      const unsigned word = words[i / 2];
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16))));
    }
  }
  // Zeros take the place of the values whose bit is not set.
  __device__ __forceinline__ void keep(unsigned bits) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 2) {
        words[i] &= (bits >> 2 * i & 1) * 0xffffu | (bits >> (2 * i + 1) & 1) * 0xffff0000u;
      } else {
        words[i] = bits >> (i * 4 / static_cast<int>(sizeof(T))) & 1 ? words[i] : 0;
      }
    }
  }
  // Rounds to T, as a sum that is written to memory.
  __device__ __forceinline__ void add(const Pack& other) {
    Values<Compute<T>, V> sum;
#pragma unroll
    for (int i = 0; i < V; ++i) sum.v[i] = (*this)[i] + other[i];
    *this = of(sum);
  }
  // Rounds to T.
  static __device__ __forceinline__ Pack of(const Values<Compute<T>, V>& v) {
    Pack r;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (std::is_same_v<T, double>) {
        r.words[2 * i] = static_cast<unsigned>(__double2loint(v[i]));
        r.words[2 * i + 1] = static_cast<unsigned>(__double2hiint(v[i]));
      } else if constexpr (std::is_same_v<T, float>) {
        r.words[i] = __float_as_uint(v[i]);
      } else if (i % 2 == 0) {
        r.words[i / 2] = two_rounded(v[i], v[i + 1]);
      }
    }
    return r;
  }

 private:
  static __device__ __forceinline__ unsigned two_rounded(float low, float high) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      return __bfloat16_as_ushort(pair.x) | static_cast<unsigned>(__bfloat16_as_ushort(pair.y)) << 16;
    } else {
      const __half2 pair = __floats2half2_rn(low, high);
      return __half_as_ushort(pair.x) | static_cast<unsigned>(__half_as_ushort(pair.y)) << 16;
    }
  }
};
template <typename T>
struct Pack<T, 1> {
  T value = rounded<T>(0);

  __device__ __forceinline__ void load(const void* from, int64_t at) { value = static_cast<const T*>(from)[at]; }
  __device__ __forceinline__ void store(void* to, int64_t at) const { static_cast<T*>(to)[at] = value; }
  __device__ __forceinline__ Compute<T> operator[](int) const { return number(value); }
  __device__ __forceinline__ void keep(unsigned bits) {
    if (!(bits & 1)) value = rounded<T>(0);
  }
  __device__ __forceinline__ void add(const Pack& other) { value = rounded<T>((*this)[0] + other[0]); }
  static __device__ __forceinline__ Pack of(const Values<Compute<T>, 1>& v) { return {rounded<T>(v[0])}; }
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
  if (branch.table != nullptr) {
    const TableEntry<C> entry = static_cast<const TableEntry<C>*>(branch.table)[channel];
    return {entry.v[0], entry.v[1], entry.v[2]};
  }
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

// An SM holds half of its threads at least. Kernels with more loads under way in each thread need more registers: of those
// it holds three blocks, which together have more bytes under way (make static).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
#define RESNET_FUSED_MIN_BLOCKS 2
#elif defined(__CUDA_ARCH__) &&                                                                                        \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define RESNET_FUSED_MIN_BLOCKS 3
#else
#define RESNET_FUSED_MIN_BLOCKS 4
#endif
#define RESNET_FUSED_LAUNCH_BOUNDS __launch_bounds__(kThreads, RESNET_FUSED_MIN_BLOCKS)
#define RESNET_FUSED_LAUNCH_BOUNDS_OF(holds_more)                                                                      \
  __launch_bounds__(kThreads, (holds_more) && RESNET_FUSED_MIN_BLOCKS > 3 ? 3 : RESNET_FUSED_MIN_BLOCKS)

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
