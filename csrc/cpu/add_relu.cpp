// relu(input + residual) and its gradient on the CPU, over elements in memory order.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace resnet_fused::cpu {

namespace {

// Pieces of whole mask bytes and cache lines.
constexpr int64_t kPiece = 16384;

template <typename F>
void parallel_elements(int64_t numel, const F& f) {
  parallel((numel + kPiece - 1) / kPiece, numel,
           [&](int64_t begin, int64_t end) { f(begin * kPiece, std::min(end * kPiece, numel)); });
}

}  // namespace

std::tuple<Tensor, Tensor> add_relu(const Tensor& input, const Tensor& residual, bool save_mask,
                                    std::optional<bool> channels_last) {
  check_tensor(input, "input");
  check_same(residual, "residual", input);
  return dispatch(input.scalar_type(), [&]<typename T>() {
    const MemoryFormat format = format_of(input, channels_last);
    const Tensor x = dense(input, format), r = dense(residual, format);
    const int64_t numel = x.numel();
    const Tensor output = empty_like(x, format);
    const Tensor mask = save_mask ? empty({1, (numel + 7) / 8}, ScalarType::Byte) : nothing(ScalarType::Byte);
    uint8_t* bits = save_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
    const T* from = x.const_data_ptr<T>();
    const T* other = r.const_data_ptr<T>();
    T* to = output.mutable_data_ptr<T>();
    parallel_elements(numel,
                      [&](int64_t begin, int64_t end) { kernels<T>().add_relu(from, other, to, bits, begin, end); });
    return std::tuple(output, mask);
  });
}

Tensor add_relu_backward(const Tensor& grad_output, const Tensor& mask, std::optional<bool> channels_last) {
  check_tensor(grad_output, "grad_output");
  const Tensor dense_mask = checked_mask(mask, 1, (grad_output.numel() + 7) / 8, grad_output);
  return dispatch(grad_output.scalar_type(), [&]<typename T>() {
    const MemoryFormat format = format_of(grad_output, channels_last);
    const Tensor g = dense(grad_output, format);
    const Tensor grad_input = empty_like(g, format);
    const uint8_t* bits = dense_mask.const_data_ptr<uint8_t>();
    const T* from = g.const_data_ptr<T>();
    T* to = grad_input.mutable_data_ptr<T>();
    parallel_elements(g.numel(),
                      [&](int64_t begin, int64_t end) { kernels<T>().add_relu_backward(from, bits, to, begin, end); });
    return grad_input;
  });
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("add_relu", TORCH_BOX(&add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward));
}

}  // namespace resnet_fused::cpu
