// What launches need to know of the device at hand, asked once.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace resnet_fused::cuda {

// Blocks of a kernel that the current device holds at once, at least one. Every launch asks, and asks here: more dynamic shared memory
// than the 48 KiB that a kernel has by default is allowed to it first, without which the occupancy would be 0.
cudaError_t resident_blocks(const void* kernel, int threads, int64_t shared_bytes, int64_t& blocks);

int device_attribute(cudaDeviceAttr attribute);

// More than any kernel here has of its own shared memory (docs/kernels.md), which counts with the dynamic one.
constexpr int64_t kOwnShared = 16 * 1024;

// The widest access, in bytes, that runs of so many bytes and all pointers are aligned for.
inline int access_bytes(int64_t run_bytes, std::initializer_list<const void*> pointers) {
  uintptr_t bits = static_cast<uintptr_t>(run_bytes);
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : 1;
}

template <typename Kernel>
const void* address_of(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace resnet_fused::cuda
