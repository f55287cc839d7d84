// The CPU kernels for any machine: whatever registers the compiler's default target has.
#include "cpu/kernels.h"
#define RESNET_FUSED_ISA portable
#define RESNET_FUSED_REGISTER_BITS 128
#include "cpu/kernels_impl.h"

template <typename T>
const Kernels<T>* portable_kernels() {
  return &portable::kTable<T>;
}

template const Kernels<double>* portable_kernels<double>();
template const Kernels<float>* portable_kernels<float>();
template const Kernels<BFloat16>* portable_kernels<BFloat16>();
template const Kernels<Half>* portable_kernels<Half>();
