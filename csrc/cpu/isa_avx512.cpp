// The CPU kernels compiled for avx512; capability.cpp decides whether this machine can run them.
#include "cpu/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

// Everything that is not for this instruction set alone stands above: no function that others share may be compiled for it.
#include "cpu/target.h"
RESNET_FUSED_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")

#define RESNET_FUSED_ISA avx512
#define RESNET_FUSED_REGISTER_BITS 512
#include "cpu/kernels_impl.h"

RESNET_FUSED_TARGET_END

template <typename T>
const Kernels<T>* avx512_kernels() {
  return &avx512::kTable<T>;
}

template const Kernels<double>* avx512_kernels<double>();
template const Kernels<float>* avx512_kernels<float>();
template const Kernels<BFloat16>* avx512_kernels<BFloat16>();
template const Kernels<Half>* avx512_kernels<Half>();

#endif
