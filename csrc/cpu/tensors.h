// Tensors as the CPU kernels want them: without gaps, in one layout, vectors of channels in the type of the arithmetic.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "layout.h"

namespace resnet_fused::cpu {

// Sees an input of any number of positions' dimensions as rows or planes.
inline Shape shape_of(const Tensor& input, MemoryFormat format) {
  int64_t positions = 1;
  for (int64_t d = 2; d < input.dim(); ++d) positions *= input.size(d);
  const bool rows = positions == 1 || format != MemoryFormat::Contiguous;
  return {input.size(0), input.size(1), positions, rows};
}

// The tensor itself where it has no gaps in that format, else a copy.
inline Tensor dense(const Tensor& tensor, MemoryFormat format) {
  if (is_dense(tensor, format)) return tensor;
  return torch::stable::contiguous(tensor, format);
}

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype);

Tensor empty_like(const Tensor& input, MemoryFormat format);

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype);

// What an operator returns for a result nobody asked for.
inline Tensor nothing(ScalarType dtype) { return empty({0}, dtype); }

inline Tensor new_mask(bool wanted, const Shape& shape) {
  return wanted ? empty({shape.outer(), shape.mask_bytes()}, ScalarType::Byte) : nothing(ScalarType::Byte);
}

// One value a channel in the arithmetic's type, and a pack of zeros behind, which kernels may read.
template <typename C>
using Vector = std::vector<C>;

template <typename C>
Vector<C> vector_of(int64_t channels, C value = 0) {
  Vector<C> r(channels + 64 / sizeof(C), C(0));
  for (int64_t c = 0; c < channels; ++c) r[c] = value;
  return r;
}

template <typename C, typename T>
void copy_values(Vector<C>& to, const T* from, int64_t stride, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<C>(static_cast<float>(from[c * stride]));
}

// The values of a (C,) tensor of any stride, or `otherwise` where there is none.
template <typename C>
Vector<C> values(const MaybeTensor& tensor, int64_t channels, C otherwise) {
  if (!tensor) return vector_of<C>(channels, otherwise);
  Vector<C> r = vector_of<C>(channels);
  const int64_t stride = tensor->stride(0);
  switch (tensor->scalar_type()) {
    case ScalarType::Double: {
      const double* from = tensor->const_data_ptr<double>();
      for (int64_t c = 0; c < channels; ++c) r[c] = static_cast<C>(from[c * stride]);
      break;
    }
    case ScalarType::Float:
      copy_values(r, tensor->const_data_ptr<float>(), stride, channels);
      break;
    case ScalarType::BFloat16:
      copy_values(r, tensor->const_data_ptr<BFloat16>(), stride, channels);
      break;
    default:
      copy_values(r, tensor->const_data_ptr<Half>(), stride, channels);
      break;
  }
  return r;
}

// A (C,) tensor of the given dtype from double values.
Tensor vector_tensor(const double* from, int64_t channels, ScalarType dtype);

// Whether outputs of this size should go past the caches, and can: every run begins on a line's boundary.
template <typename T>
bool should_stream(const Shape& shape, std::initializer_list<const void*> outputs);

// Calls f.operator()<T>() for the dtype.
template <typename F>
auto dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    default:
      return f.template operator()<Half>();
  }
}

}  // namespace resnet_fused::cpu
