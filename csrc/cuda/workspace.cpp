#include "cuda/workspace.h"

#include <map>
#include <mutex>

namespace resnet_fused::cuda {

namespace {

// The size of a kept workspace. Only kernels of single-value accesses may need more.
constexpr int64_t kCounters = 16 << 10, kPartialBytes = 4 << 20;
// Streams that have one. Programs with more allocate for the others at every call.
constexpr size_t kMostStreams = 64;

int64_t bytes_of(int64_t counters) { return counters * static_cast<int64_t>(sizeof(unsigned)); }

// Counters, which are cleared, and behind them the partial sums.
cudaError_t begin(void* memory, int64_t counters, cudaStream_t stream, Workspace& workspace) {
  workspace = {static_cast<char*>(memory) + bytes_of(counters), static_cast<unsigned*>(memory)};
  return cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes_of(counters)), stream);
}

// Not the handle: a new stream may get that of a destroyed one, whose kernels still run.
cudaError_t id_of(cudaStream_t stream, unsigned long long& id) {
#ifdef RESNET_FUSED_EMULATED  // it has no ids, and runs every launch at once
  id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
#else
  return cudaStreamGetId(stream, &id);
#endif
}

// By cudaMalloc, since torch's allocator may be serving from the private pool of a CUDA graph, which reuses what a call
// keeps. In relaxed mode, for otherwise cudaMalloc invalidates a capture that another thread has under way.
cudaError_t allocate(void** memory) {
  const auto bytes = static_cast<size_t>(bytes_of(kCounters) + kPartialBytes);
#ifdef RESNET_FUSED_EMULATED
  return cudaMalloc(memory, bytes);
#else
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t error = cudaMalloc(memory, bytes);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return error;
#endif
}

// Leaves `workspace` empty where the stream has none and gets none: too many streams, or no memory.
cudaError_t kept(int device, cudaStream_t stream, Workspace& workspace) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, Workspace> of_streams;
  unsigned long long id = 0;
  cudaError_t error = id_of(stream, id);
  if (error != cudaSuccess) return error;
  const std::pair key(device, id);
  const std::lock_guard lock(mutex);
  const auto found = of_streams.find(key);
  if (found != of_streams.end()) {
    workspace = found->second;
    return cudaSuccess;
  }
  if (of_streams.size() == kMostStreams) return cudaSuccess;
  void* memory = nullptr;
  if (allocate(&memory) != cudaSuccess) {
    cudaGetLastError();  // torch's allocator may have memory of its own left
    return cudaSuccess;
  }
  error = begin(memory, kCounters, stream, workspace);
  if (error == cudaSuccess) of_streams[key] = workspace;
  return error;
}

}  // namespace

cudaError_t workspace_of(const Tensor& on, cudaStream_t stream, int64_t partial_bytes, int64_t counters,
                         MaybeTensor& owner, Workspace& workspace) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  if (error != cudaSuccess) return error;
  if (capture == cudaStreamCaptureStatusNone && counters <= kCounters && partial_bytes <= kPartialBytes) {
    error = kept(on.get_device_index(), stream, workspace);
    if (error != cudaSuccess || workspace.counters != nullptr) return error;
  }
  counters = round_up(counters, 4);  // partial sums are aligned
  owner = empty(on, {bytes_of(counters) + partial_bytes}, ScalarType::Byte);
  return begin(mutable_data_of(*owner), counters, stream, workspace);
}

}  // namespace resnet_fused::cuda
