// What differs between instruction sets: registers of kRegisterBytes and the operations that the language does not have.
// RESNET_FUSED_ISA names the namespace and RESNET_FUSED_REGISTER_BITS the width; the including file has set the target before.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/numbers.h"

#define INLINE [[gnu::always_inline]] inline static

namespace RESNET_FUSED_ISA {

#if RESNET_FUSED_REGISTER_BITS == 512
constexpr int kRegisterBytes = 64;
#elif RESNET_FUSED_REGISTER_BITS == 256
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename C>
struct Registers;

template <>
struct Registers<float> {
  typedef float Value __attribute__((vector_size(kRegisterBytes)));
  typedef float Unaligned __attribute__((vector_size(kRegisterBytes), aligned(4), may_alias));
  typedef int32_t Integer __attribute__((vector_size(kRegisterBytes)));
#if RESNET_FUSED_REGISTER_BITS == 512
  static constexpr Integer kCount = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static constexpr Integer kBit = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                   1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
#elif RESNET_FUSED_REGISTER_BITS == 256
  static constexpr Integer kCount = {0, 1, 2, 3, 4, 5, 6, 7};
  static constexpr Integer kBit = {1, 2, 4, 8, 16, 32, 64, 128};
#else
  static constexpr Integer kCount = {0, 1, 2, 3};
  static constexpr Integer kBit = {1, 2, 4, 8};
#endif
};

template <>
struct Registers<double> {
  typedef double Value __attribute__((vector_size(kRegisterBytes)));
  typedef double Unaligned __attribute__((vector_size(kRegisterBytes), aligned(8), may_alias));
  typedef int64_t Integer __attribute__((vector_size(kRegisterBytes)));
#if RESNET_FUSED_REGISTER_BITS == 512
  static constexpr Integer kCount = {0, 1, 2, 3, 4, 5, 6, 7};
  static constexpr Integer kBit = {1, 2, 4, 8, 16, 32, 64, 128};
#elif RESNET_FUSED_REGISTER_BITS == 256
  static constexpr Integer kCount = {0, 1, 2, 3};
  static constexpr Integer kBit = {1, 2, 4, 8};
#else
  static constexpr Integer kCount = {0, 1};
  static constexpr Integer kBit = {1, 2};
#endif
};

using Floats = Registers<float>::Value;
using Doubles = Registers<double>::Value;
constexpr int kFloats = kRegisterBytes / sizeof(float);
constexpr int kDoubles = kRegisterBytes / sizeof(double);

// bfloat16 is the upper half of a float.
typedef uint16_t Narrow __attribute__((vector_size(kRegisterBytes / 2)));
typedef uint32_t Wide __attribute__((vector_size(kRegisterBytes)));

INLINE Floats register_from_bfloat16(const BFloat16* from) {
  Narrow bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return (Floats)(__builtin_convertvector(bits, Wide) << 16);
}

INLINE void register_to_bfloat16(BFloat16* to, Floats v) {
  // To nearest, ties to even; a NaN stays one when its low bits go.
  const Wide bits = (Wide)v;
  const Wide rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  const Wide nan = (bits >> 16) | 0x40;
  const Narrow narrow = __builtin_convertvector(v == v ? rounded : nan, Narrow);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

#if RESNET_FUSED_REGISTER_BITS == 512

INLINE Floats register_multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps(a, b, c); }
INLINE Doubles register_multiply_add(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm512_fmadd_pd(a, b, c); }
INLINE Doubles register_widen_low(Floats v) { return (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
INLINE Doubles register_widen_high(Floats v) { return (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
INLINE void register_stream(float* to, Floats v) { _mm512_stream_ps(to, v); }
INLINE void register_stream(double* to, Doubles v) { _mm512_stream_pd(to, v); }
INLINE void stream_fence() { _mm_sfence(); }

template <typename C>
INLINE uint32_t register_bits(typename Registers<C>::Integer keep) {
  if constexpr (sizeof(C) == 4) {
    return _mm512_cmplt_epi32_mask((__m512i)keep, _mm512_setzero_si512());
  } else {
    return _mm512_cmplt_epi64_mask((__m512i)keep, _mm512_setzero_si512());
  }
}

INLINE Floats register_from_half(const Half* from) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

INLINE void register_to_half(Half* to, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif RESNET_FUSED_REGISTER_BITS == 256

INLINE Floats register_multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps(a, b, c); }
INLINE Doubles register_multiply_add(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm256_fmadd_pd(a, b, c); }
INLINE Doubles register_widen_low(Floats v) { return (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
INLINE Doubles register_widen_high(Floats v) { return (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
INLINE void register_stream(float* to, Floats v) { _mm256_stream_ps(to, v); }
INLINE void register_stream(double* to, Doubles v) { _mm256_stream_pd(to, v); }
INLINE void stream_fence() { _mm_sfence(); }

template <typename C>
INLINE uint32_t register_bits(typename Registers<C>::Integer keep) {
  if constexpr (sizeof(C) == 4) {
    return _mm256_movemask_ps((__m256)keep);
  } else {
    return _mm256_movemask_pd((__m256d)keep);
  }
}

INLINE Floats register_from_half(const Half* from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

INLINE void register_to_half(Half* to, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#else

INLINE Floats register_multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE Doubles register_multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }

INLINE Doubles register_widen_low(Floats v) { return Doubles{v[0], v[1]}; }
INLINE Doubles register_widen_high(Floats v) { return Doubles{v[2], v[3]}; }
INLINE void register_stream(float* to, Floats v) { __builtin_memcpy(to, &v, sizeof(v)); }
INLINE void register_stream(double* to, Doubles v) { __builtin_memcpy(to, &v, sizeof(v)); }
INLINE void stream_fence() {}

template <typename C>
INLINE uint32_t register_bits(typename Registers<C>::Integer keep) {
  uint32_t bits = 0;
  for (int i = 0; i < kRegisterBytes / static_cast<int>(sizeof(C)); ++i)
    bits |= static_cast<uint32_t>(keep[i] & 1) << i;
  return bits;
}

INLINE Floats register_from_half(const Half* from) {
  Floats r;
  for (int i = 0; i < kFloats; ++i) r[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i].x);
  return r;
}

INLINE void register_to_half(Half* to, Floats v) {
  for (int i = 0; i < kFloats; ++i) to[i].x = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[i]);
}

#endif

}  // namespace RESNET_FUSED_ISA
