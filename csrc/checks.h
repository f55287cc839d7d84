// What the operators refuse, before anything is written. resnet_fused/ops/checks.py says the same for tensors without data.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "layout.h"

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline ScalarType statistics_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_tensor(const Tensor& input, const char* name) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " must be float64, float32, bfloat16 or float16, got ", dtype_name(dtype));
  STD_TORCH_CHECK(input.dim() <= kMaxDims, name, " must have at most ", kMaxDims, " dimensions, got ", input.dim());
}

inline void check_device(const Tensor& other, const char* name, const Tensor& input) {
  STD_TORCH_CHECK(other.device() == input.device(), name, " must be on the device of input");
}

inline void check_input(const Tensor& input) {
  check_tensor(input, "input");
  STD_TORCH_CHECK(input.dim() >= 2, "input must have at least 2 dimensions (N, C, ...), got shape ", shape_text(input));
}

// torch makes no statistics of one value, nor, with a weight, of no channels: functional.py then leaves the word to it.
inline void check_count(const Tensor& input) {
  STD_TORCH_CHECK(input.numel() != input.size(1),
                  "Expected more than 1 value per channel when training, got input size ", shape_text(input));
}

inline void check_same(const Tensor& other, const char* name, const Tensor& input) {
  bool same = other.dim() == input.dim();
  for (int64_t d = 0; same && d < input.dim(); ++d) same = other.size(d) == input.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape of input, got ", shape_text(other), " and ", shape_text(input));
  STD_TORCH_CHECK(other.scalar_type() == input.scalar_type(), name, " must have the dtype of input, got ",
                  dtype_name(other.scalar_type()), " and ", dtype_name(input.scalar_type()));
  check_device(other, name, input);
}

inline void check_same(const MaybeTensor& other, const char* name, const Tensor& input) {
  if (other) check_same(*other, name, input);
}

inline void check_per_channel(const Tensor& vector, const char* name, const Tensor& input) {
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == channels, name, " must have shape [", channels,
                  "], one value a channel of input, got ", shape_text(vector));
  const ScalarType dtype = vector.scalar_type();
  const ScalarType statistics = statistics_dtype(input.scalar_type());
  STD_TORCH_CHECK(dtype == input.scalar_type() || dtype == statistics, name, " must be ",
                  dtype_name(input.scalar_type()), " or ", dtype_name(statistics), " for ",
                  dtype_name(input.scalar_type()), " input, got ", dtype_name(dtype));
  check_device(vector, name, input);
}

inline void check_per_channel(const MaybeTensor& vector, const char* name, const Tensor& input) {
  if (vector) check_per_channel(*vector, name, input);
}

// The vectors of one normalization have one dtype, as torch wants it.
inline void check_one_dtype(std::initializer_list<const MaybeTensor*> vectors) {
  const Tensor* first = nullptr;
  for (const MaybeTensor* vector : vectors) {
    if (!vector->has_value()) continue;
    if (first == nullptr) first = &**vector;
    STD_TORCH_CHECK((*vector)->scalar_type() == first->scalar_type(),
                    "weight, bias and running statistics must have one dtype, got ", dtype_name(first->scalar_type()),
                    " and ", dtype_name((*vector)->scalar_type()));
  }
}

// What the forward operators ask of a branch, of a second one, and of running statistics that they use or update.
inline void check_branch(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias) {
  check_input(input);
  check_per_channel(weight, "weight", input);
  check_per_channel(bias, "bias", input);
}

inline void check_second(const Tensor& input, const Tensor& input2, const MaybeTensor& weight2,
                         const MaybeTensor& bias2) {
  check_same(input2, "input2", input);
  check_per_channel(weight2, "weight2", input);
  check_per_channel(bias2, "bias2", input);
}

inline void check_running(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias,
                          const MaybeTensor& running_mean, const MaybeTensor& running_var, const std::string& suffix) {
  check_per_channel(running_mean, ("running_mean" + suffix).c_str(), input);
  check_per_channel(running_var, ("running_var" + suffix).c_str(), input);
  check_one_dtype({&weight, &bias, &running_mean, &running_var});
}

inline void check_backward(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                           const MaybeTensor& bias, const Tensor& mean, const Tensor& spread) {
  check_input(input);
  check_same(grad_output, "grad_output", input);
  check_per_channel(weight, "weight", input);
  check_per_channel(bias, "bias", input);
  check_per_channel(mean, "mean", input);
  check_per_channel(spread, "invstd or running_var", input);
}

// Statistics of a batch, and the running ones that they update: (C,) vectors on one device.
inline void check_running_update(const MaybeTensor& running_mean, const MaybeTensor& running_var, const Tensor& mean,
                                 const Tensor& var) {
  STD_TORCH_CHECK(mean.dim() == 1 && var.dim() == 1 && mean.size(0) == var.size(0),
                  "mean and var must be (C,) vectors, got ", shape_text(mean), " and ", shape_text(var));
  check_tensor(mean, "mean");
  check_tensor(var, "var");
  check_device(var, "var", mean);
  const auto check = [&](const MaybeTensor& running, const char* name) {
    if (!running) return;
    check_tensor(*running, name);
    STD_TORCH_CHECK(running->dim() == 1 && running->size(0) == mean.size(0), name, " must have shape [", mean.size(0),
                    "], one value a channel of input, got ", shape_text(*running));
    check_device(*running, name, mean);
  };
  check(running_mean, "running_mean");
  check(running_var, "running_var");
}

// Gives the mask without gaps: whoever kept it between forward and backward may have changed its strides.
inline Tensor checked_mask(const Tensor& mask, int64_t outer, int64_t bytes, const Tensor& input) {
  const bool fits = mask.dim() == 2 && mask.size(0) == outer && mask.size(1) == bytes;
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && fits, "mask must be uint8 of shape [", outer, ", ", bytes,
                  "], got ", dtype_name(mask.scalar_type()), " of shape ", shape_text(mask));
  check_device(mask, "mask", input);
  return mask.is_contiguous() ? mask : torch::stable::contiguous(mask);
}

}  // namespace resnet_fused
