// Chooses the kernels for the machine at hand, once.
#include <cstdlib>
#include <string_view>

#include "cpu/kernels.h"

template <typename T>
const Kernels<T>* portable_kernels();
template <typename T>
const Kernels<T>* avx2_kernels();
template <typename T>
const Kernels<T>* avx512_kernels();

namespace {

enum class Capability { kDefault, kAvx2, kAvx512 };

Capability best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Capability::kAvx512;
  }
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kDefault;
}

Capability choose() {
  const Capability possible = best();
  const char* asked = std::getenv("RESNET_FUSED_CPU_CAPABILITY");
  const std::string_view name = asked ? asked : "";
  if (name == "default") return Capability::kDefault;
  if (name == "avx2" && possible >= Capability::kAvx2) return Capability::kAvx2;
  return possible;
}

const Capability kCapability = choose();

}  // namespace

const char* cpu_capability() {
  switch (kCapability) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

template <typename T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  if (kCapability == Capability::kAvx512) return *avx512_kernels<T>();
  if (kCapability == Capability::kAvx2) return *avx2_kernels<T>();
#endif
  return *portable_kernels<T>();
}

template const Kernels<double>& kernels<double>();
template const Kernels<float>& kernels<float>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();

extern "C" __attribute__((visibility("default"))) const char* resnet_fused_cpu_capability() { return cpu_capability(); }
