// Tensors as the CUDA operators want them: without gaps, in one layout, on the device of the input.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checks.h"
#include "cuda/arguments.h"
#include "layout.h"

// The key that the operators are registered for. Another one lets the library run where its device is emulated.
#ifndef RESNET_FUSED_CUDA_DISPATCH_KEY
#define RESNET_FUSED_CUDA_DISPATCH_KEY CUDA
#endif

namespace resnet_fused::cuda {

Dtype dtype_of(const Tensor& tensor);

// Sees an input of any number of positions' dimensions as rows or planes.
Shape shape_of(const Tensor& input, MemoryFormat format);

// The tensor itself where it has no gaps in that format, else a copy.
inline Tensor dense(const Tensor& tensor, MemoryFormat format) {
  if (is_dense(tensor, format)) return tensor;
  return torch::stable::contiguous(tensor, format);
}

// On the device of `on`.
Tensor empty(const Tensor& on, std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor empty_like(const Tensor& input, MemoryFormat format);

// What an operator returns for a result nobody asked for.
inline Tensor nothing(const Tensor& on, ScalarType dtype) { return empty(on, {0}, dtype); }

// One value a channel in the statistics' dtype.
inline Tensor statistic(const Tensor& input) {
  return empty(input, {input.size(1)}, statistics_dtype(input.scalar_type()));
}

inline Tensor new_mask(const Tensor& on, bool wanted, const Shape& shape) {
  return wanted ? empty(on, {shape.runs(), shape.mask_bytes()}, ScalarType::Byte) : nothing(on, ScalarType::Byte);
}

// A (C,) tensor as kernels read and write it.
ChannelVector values(const Tensor& vector);
inline ChannelVector values(const MaybeTensor& vector) { return vector ? values(*vector) : ChannelVector{}; }
ChannelOutput output_of(const Tensor& vector);
inline ChannelOutput output_of(const MaybeTensor& vector) { return vector ? output_of(*vector) : ChannelOutput{}; }

// A pointer to the first element, null where there is none.
const void* data_of(const Tensor& tensor);
void* mutable_data_of(const Tensor& tensor);

// One call of an operator: the tensor's device becomes the current one, launches go to torch's current stream there.
// Scratch memory comes from torch's allocator, whose streams see to it that nobody gets it before the kernels are done
// with it.
class Call {
 public:
  Call(const char* name, const Tensor& input);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Launch& launch() const { return launch_; }
  // Scratch memory for TableEntry, one a channel of input.
  void* new_table(const Tensor& input);
  // Raises what went wrong, naming the operator and its input.
  void check(cudaError_t error) const;

 private:
  const char* name_;
  Tensor input_;
  torch::stable::accelerator::DeviceGuard guard_;
  Launch launch_;
  std::vector<Tensor> scratch_;
  MaybeTensor workspace_owner_;
};

// Whether launches may keep tensors on chip where they fit, by RESNET_FUSED_ON_CHIP, which is read anew with every call:
// 0, 1 or auto, which is not while torch.distributed is initialized. All blocks of such a launch must be resident, and
// it would wait for every communication under way.
bool on_chip_wanted();

// A normalized input of an operator.
Branch branch_of(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias);
inline void take_invstd(Branch& branch, const Tensor& mean, const Tensor& invstd) {
  branch.mean = values(mean);
  branch.spread = values(invstd);
}
inline void take_var(Branch& branch, const Tensor& mean, const Tensor& var, double eps) {
  branch.mean = values(mean);
  branch.spread = values(var);
  branch.spread_is_var = true;
  branch.eps = eps;
}

}  // namespace resnet_fused::cuda
