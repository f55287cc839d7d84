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

cudaError_t resident_blocks(const void* kernel, int threads, int64_t shared_bytes, int64_t& blocks) {
  static std::map<std::tuple<const void*, int, int64_t, int>, int64_t> known;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  const auto key = std::tuple(kernel, threads, shared_bytes, current_device());
  const int64_t processors = std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    blocks = found->second;
    return cudaSuccess;
  }
  int per_processor = 0;
  cudaError_t error = cudaSuccess;
  // Of the 48 KiB the kernel's own shared memory, at most kOwnShared, takes its part. What was allowed once is not taken back.
  int64_t& most = allowed.try_emplace({kernel, std::get<3>(key)}, 48 * 1024 - kOwnShared).first->second;
  if (shared_bytes > most) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error == cudaSuccess) most = shared_bytes;
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads,
                                                          static_cast<size_t>(shared_bytes));
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // whoever asked decides what becomes of it
    return error;
  }
  if (per_processor == 0) return cudaErrorLaunchOutOfResources;
  blocks = known[key] = processors * per_processor;
  return cudaSuccess;
}

}  // namespace resnet_fused::cuda
