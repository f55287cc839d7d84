#include "cuda/meeting.h"

#include <map>
#include <mutex>

namespace resnet_fused::cuda {

namespace {

// What is kept of each of so many streams. Every plan but those of accesses of single values needs a part of it.
constexpr int64_t kCounters = 16 << 10, kPartialBytes = 4 << 20;
constexpr size_t kMostStreams = 64;

int64_t bytes_of(int64_t counters) { return counters * static_cast<int64_t>(sizeof(unsigned)); }

// Partial sums lie behind the counters, which are cleared.
cudaError_t begin(void* memory, int64_t counters, cudaStream_t stream, Meeting& meeting) {
  meeting = {static_cast<char*>(memory) + bytes_of(counters), static_cast<unsigned*>(memory)};
  return cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes_of(counters)), stream);
}

// A handle may come back while kernels of the stream that had it still run; an id does not.
cudaError_t id_of(cudaStream_t stream, unsigned long long& id) {
#ifdef RESNET_FUSED_EMULATED  // it has no ids, and runs everything at once
  id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
#else
  return cudaStreamGetId(stream, &id);
#endif
}

// Not from torch's allocator, whose pool may be one of a graph that takes back what is left in it. Another thread may be
// capturing meanwhile, which only says that this memory is not of its graph.
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

// False where nothing is kept for the stream, and nothing can be.
bool kept(int device, cudaStream_t stream, Meeting& meeting) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, Meeting> of_streams;
  unsigned long long id = 0;
  if (id_of(stream, id) != cudaSuccess) return false;
  const std::pair key(device, id);
  const std::lock_guard lock(mutex);
  const auto found = of_streams.find(key);
  if (found != of_streams.end()) {
    meeting = found->second;
    return true;
  }
  void* memory = nullptr;
  if (of_streams.size() == kMostStreams || allocate(&memory) != cudaSuccess) return false;
  if (begin(memory, kCounters, stream, meeting) != cudaSuccess) return false;
  of_streams[key] = meeting;
  return true;
}

}  // namespace

cudaError_t meeting_of(const Tensor& on, cudaStream_t stream, int64_t partial_bytes, int64_t counters,
                       MaybeTensor& keep, Meeting& meeting) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  if (error != cudaSuccess) return error;
  if (capture == cudaStreamCaptureStatusNone && counters <= kCounters && partial_bytes <= kPartialBytes) {
    if (kept(on.get_device_index(), stream, meeting)) return cudaSuccess;
    cudaGetLastError();
  }
  counters = round_up(counters, 4);  // partial sums are aligned
  keep = empty(on, {bytes_of(counters) + partial_bytes}, ScalarType::Byte);
  return begin(mutable_data_of(*keep), counters, stream, meeting);
}

}  // namespace resnet_fused::cuda
