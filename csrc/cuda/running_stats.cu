// Running statistics on their own: one thread a channel.
#include "cuda/device.h"
#include "cuda/numbers.cuh"

namespace resnet_fused::cuda {

namespace {

__global__ void RESNET_FUSED_LAUNCH_BOUNDS running_stats_update_kernel(const RunningArguments a) {
  const int64_t step = int64_t{1} * gridDim.x * blockDim.x;
  for (int64_t c = int64_t{1} * blockIdx.x * blockDim.x + threadIdx.x; c < a.channels; c += step) {
    if (a.running_mean.data != nullptr) {
      const double mean = value_of<double>(a.mean, c, 0);
      set_value(a.running_mean, c, updated_running(value_of(a.running_mean, c), mean, a.momentum));
    }
    if (a.running_var.data != nullptr) {
      const double var = unbiased(a.count) * value_of<double>(a.var, c, 0);
      set_value(a.running_var, c, updated_running(value_of(a.running_var, c), var, a.momentum));
    }
  }
}

}  // namespace

cudaError_t launch_running_stats(const RunningArguments& arguments, const Launch& launch) {
  // torch leaves the running statistics alone where the batch is empty.
  if (arguments.channels == 0 || arguments.count == 0) return cudaSuccess;
  const unsigned grid = grid_size(divide_up(arguments.channels, kThreads));
  running_stats_update_kernel<<<grid, kThreads, 0, launch.stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
