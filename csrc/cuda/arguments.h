// What the kernels are launched with, and the functions that launch them: the border between the host operators, which
// know torch's tensors, and the device code, which does not.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

#include "cuda/plan.h"

namespace resnet_fused::cuda {

enum class Dtype : int32_t { kDouble, kFloat, kBFloat16, kHalf };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

// One value a channel, of any stride and of the tensor's dtype or the statistics'. Without data: ones or zeros, as it
// may be.
struct ChannelVector {
  const void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::kFloat;
};

struct ChannelOutput {
  void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::kFloat;
};

// Up to four constants of a channel, which planes read with every access, in as few accesses as can be.
template <typename C>
struct alignas(16) TableEntry {
  C v[4];
};

// A normalized input and its statistics: mean and invstd, or mean and var.
struct Branch {
  const void* input = nullptr;
  const void* table = nullptr;  // TableEntry<C>[C] of mean, scale and bias, where they are known already
  ChannelVector weight, bias, mean, spread;
  bool spread_is_var = false;
  double eps = 0;
};

// Memory for blocks that share a channel.
struct Workspace {
  void* partials = nullptr;
  unsigned* counters = nullptr;  // zeros; a kernel leaves them so
};

// Where a launch goes, and where its workspace comes from.
struct Launch {
  cudaStream_t stream = nullptr;
  std::function<cudaError_t(int64_t partial_bytes, int64_t counters, Workspace& workspace)> workspace;
};

// A training input: where its statistics go. Results are of the statistics' dtype; those without data are not written.
struct StatisticsBranch {
  const void* input = nullptr;
  double eps = 0;
  void* mean = nullptr;
  void* var = nullptr;
  void* invstd = nullptr;
  ChannelOutput running_mean, running_var;
  double momentum = 0;
  ChannelVector weight, bias;
  ChannelOutput saved_bias;  // a copy of the bias
  void* table = nullptr;     // for the pass that normalizes
};

struct StatisticsArguments {
  Shape shape;
  StatisticsBranch first, second;
  int branches;
};

// output = relu(affine(input) + residual), or with a second branch relu(affine(input) + affine2(input2)).
struct ForwardArguments {
  Shape shape;
  Branch first, second;
  const void* residual;  // null without one, and for two branches
  void* output;
  uint8_t* mask;  // null where none is wanted
  bool two;
  bool relu;
};

enum class KeepFrom : int32_t { kAll, kMask, kInput };

// Per channel grad_input = (grad - mean_grad - (input - mean) slope) scale, or grad scale where the statistics are
// constants.
//
// What the gradient is made of, in both backward passes. The gradient behind the ReLU is grad_output where `keep` says
// so. Where there is a grad_output2, grad_output is the sum of both, rounded as a tensor of its own would round it.
struct Gradient {
  Shape shape;
  Branch first, second;
  const void* grad_output;
  const void* grad_output2;  // null without one
  const uint8_t* mask;
  KeepFrom keep;
  bool two;
  // What is written: null where it is not asked for.
  void* grad_input;
  void* grad_input2;
  void* grad_residual;
};

// Sums of grad, grad (input - mean) and grad (input2 - mean2), and what becomes of them.
struct ReduceArguments {
  Gradient gradient;
  bool read_input, read_input2;  // whether the products are wanted
  // The results of SyncBatchNorm's reduction, of the statistics' dtype.
  void* sum_grad;
  void* sum_grad_xmu;
  ChannelOutput grad_weight, grad_bias, grad_weight2, grad_bias2;
  void* table;  // TableEntry<C>[C] of mean_grad, slope and slope2, for the pass that applies
};

struct BackwardArguments {
  Gradient gradient;
  bool constant_statistics;                // grad_input = grad scale
  const void* table;                       // mean_grad and slopes from the reduction, or
  ChannelVector mean_grad, mean_grad_xmu;  // given
};

cudaError_t launch_statistics(Dtype dtype, const StatisticsArguments& arguments, const Launch& launch);
cudaError_t launch_forward(Dtype dtype, const ForwardArguments& arguments, const Launch& launch);
cudaError_t launch_reduce(Dtype dtype, const ReduceArguments& arguments, const Launch& launch);
cudaError_t launch_backward(Dtype dtype, const BackwardArguments& arguments, const Launch& launch);

// Over elements in memory order.
cudaError_t launch_add_relu(Dtype dtype, const void* input, const void* residual, void* output, uint8_t* mask,
                            int64_t numel, const Launch& launch);
cudaError_t launch_add_relu_backward(Dtype dtype, const void* grad_output, const uint8_t* mask, void* grad_input,
                                     int64_t numel, const Launch& launch);

// Both passes of a training forward or backward of one branch in one launch, the inputs staying on chip between them;
// false where the tensor does not fit or is not aligned, and then nothing has been launched.
bool launch_on_chip_forward(Dtype dtype, const StatisticsArguments& statistics, const ForwardArguments& forward,
                            const Launch& launch, cudaError_t& error);
bool launch_on_chip_backward(Dtype dtype, const ReduceArguments& reduce, const Launch& launch, cudaError_t& error);

struct RunningArguments {
  ChannelOutput running_mean, running_var;
  ChannelVector mean, var;
  int64_t channels, count;
  double momentum;
};
cudaError_t launch_running_stats(const RunningArguments& arguments, const Launch& launch);

}  // namespace resnet_fused::cuda
