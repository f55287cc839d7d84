#include "cuda/device.h"

#include <map>
#include <mutex>
#include <tuple>

namespace resnet_fused::cuda {

namespace {

std::mutex mutex;

int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? device : 0;
}

}  // namespace

int64_t resident_blocks(const void* kernel, int threads, int64_t shared_bytes) {
  static std::map<std::tuple<const void*, int, int64_t, int>, int64_t> known;
  const auto key = std::tuple(kernel, threads, shared_bytes, current_device());
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int processors = 1, blocks = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, std::get<3>(key));
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes));
  // A kernel that does not fit says so when it is launched; nothing else shall.
  if (error != cudaSuccess) cudaGetLastError();
  return known[key] = int64_t{1} * std::max(processors, 1) * blocks;
}

int device_attribute(cudaDeviceAttr attribute) {
  static std::map<std::pair<cudaDeviceAttr, int>, int> known;
  const std::pair key(attribute, current_device());
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, key.second);
  return known[key] = value;
}

cudaError_t allow_shared(const void* kernel, int64_t shared_bytes) {
  // Without asking a block has 48 KiB, of which the kernel's own shared memory (at most kOwnShared) takes its part.
  if (shared_bytes <= 48 * 1024 - kOwnShared) return cudaSuccess;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  const std::lock_guard lock(mutex);
  int64_t& most = allowed[{kernel, current_device()}];
  if (shared_bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    most = shared_bytes;
  } else {
    cudaGetLastError();  // whoever asked decides what becomes of it
  }
  return error;
}

}  // namespace resnet_fused::cuda
