// Where the channels of a tensor lie: the memory format that torch would suggest for its strides.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <cstdint>
#include <optional>

namespace resnet_fused {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

// torch's rule: the strides of channels, then of the last to the first position, then of the batch do not decrease, each by at
// least the size before. Strides that fit both formats are NCHW.
inline MemoryFormat memory_format(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  if (dims != 4 && dims != 5) return MemoryFormat::Contiguous;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (strides[1] == 0) return MemoryFormat::Contiguous;
  int64_t least = 0;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
    if (sizes[d] == 0 || strides[d] < least) return MemoryFormat::Contiguous;
    if (d == 0 && least == strides[1]) return MemoryFormat::Contiguous;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return dims == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// The format that an operator works in: the one that is asked for, or else that of its input. A graph asks, for its compiler may
// give the input of the forward another format than that of the backward, and the mask of one is read by the other.
inline MemoryFormat format_of(const Tensor& input, std::optional<bool> channels_last) {
  if (!channels_last) return memory_format(input);
  if (!*channels_last || (input.dim() != 4 && input.dim() != 5)) return MemoryFormat::Contiguous;
  return input.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// As many dimensions as torch's operations take whatever the strides; functional.py leaves tensors of more to torch.
constexpr int64_t kMaxDims = 64;

// The strides of a tensor without gaps in that format.
inline void dense_strides(const Tensor& like, MemoryFormat format, int64_t* strides) {
  const auto sizes = like.sizes();
  const int64_t dims = like.dim();
  int64_t step = 1;
  const auto place = [&](int64_t d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  };
  const bool channels_last = format != MemoryFormat::Contiguous;
  if (channels_last) place(1);
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (!channels_last || d != 1) place(d);
  }
}

inline bool is_dense(const Tensor& tensor, MemoryFormat format) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t expected[kMaxDims];
  dense_strides(tensor, format, expected);
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && strides[d] != expected[d]) return false;
  }
  return true;
}

}  // namespace resnet_fused
