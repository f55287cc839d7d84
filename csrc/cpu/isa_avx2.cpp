// The CPU kernels compiled for avx2; capability.cpp decides whether this machine can run them.
#include "cpu/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

// Everything that is not for this instruction set alone stands above: no function that others share may be compiled for it.
#include "cpu/target.h"
RESNET_FUSED_TARGET_BEGIN("avx2,fma,f16c,bmi2")

#define RESNET_FUSED_ISA avx2
#define RESNET_FUSED_REGISTER_BITS 256
#include "cpu/kernels_impl.h"

RESNET_FUSED_TARGET_END

template <typename T>
const Kernels<T>* avx2_kernels() {
  return &avx2::kTable<T>;
}

template const Kernels<double>* avx2_kernels<double>();
template const Kernels<float>* avx2_kernels<float>();
template const Kernels<BFloat16>* avx2_kernels<BFloat16>();
template const Kernels<Half>* avx2_kernels<Half>();

#endif
