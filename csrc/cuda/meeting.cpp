#include "cuda/meeting.h"

#include <map>
#include <mutex>

namespace resnet_fused::cuda {

namespace {

// Of one stream. Partials lie behind the counters.
struct Kept {
  Tensor memory;
  int64_t partial_bytes = 0, counters = 0;

  void take(const Tensor& on, int64_t bytes, int64_t count) {
    partial_bytes = round_up(bytes, 16);
    counters = round_up(count, 4);
    memory = empty(on, {partial_bytes + counter_bytes()}, ScalarType::Byte);
  }
  int64_t counter_bytes() const { return counters * static_cast<int64_t>(sizeof(unsigned)); }
  Meeting meeting() const {
    char* data = static_cast<char*>(mutable_data_of(memory));
    return {data + counter_bytes(), reinterpret_cast<unsigned*>(data)};
  }
  cudaError_t clear(cudaStream_t stream) const {
    return cudaMemsetAsync(meeting().counters, 0, static_cast<size_t>(counter_bytes()), stream);
  }
};

// Streams of torch are never destroyed, and others come and go: a handle may come back while kernels of the stream that had it
// still run, and an id does not.
cudaError_t id_of(cudaStream_t stream, unsigned long long& id) {
#ifdef RESNET_FUSED_EMULATED  // which has no ids, and one stream
  id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
#else
  return cudaStreamGetId(stream, &id);
#endif
}

constexpr size_t kMostStreams = 256;
std::mutex mutex;

}  // namespace

cudaError_t meeting_of(const Tensor& on, cudaStream_t stream, int64_t partial_bytes, int64_t counters, Tensor& keep,
                       Meeting& meeting) {
  // Never freed: when the process ends, torch's allocator may be gone before them.
  static auto& of_streams = *new std::map<std::pair<int, unsigned long long>, Kept>;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  if (error != cudaSuccess) return error;
  unsigned long long id = 0;
  const bool captured = capture != cudaStreamCaptureStatusNone;
  if (!captured && (error = id_of(stream, id)) != cudaSuccess) return error;
  const std::pair key(on.get_device_index(), id);
  const std::lock_guard lock(mutex);
  const bool kept = !captured && (of_streams.size() < kMostStreams || of_streams.count(key) != 0);
  Kept own;
  Kept& memory = kept ? of_streams[key] : own;
  if (memory.partial_bytes < partial_bytes || memory.counters < counters) {
    Kept more;
    more.take(on, std::max(partial_bytes, memory.partial_bytes), std::max(counters, memory.counters));
    error = more.clear(stream);
    if (error != cudaSuccess) return error;
    memory = more;
  }
  keep = memory.memory;
  meeting = memory.meeting();
  return cudaSuccess;
}

}  // namespace resnet_fused::cuda
