// add_relu, its gradient and the running statistics on CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/tensors.h"

namespace resnet_fused::cuda {

std::tuple<Tensor, Tensor> add_relu(const Tensor& input, const Tensor& residual, bool save_mask,
                                    std::optional<bool> channels_last) {
  check_tensor(input, "input");
  check_same(residual, "residual", input);
  const Call call("add_relu", input);
  const MemoryFormat format = format_of(input, channels_last);
  const Tensor x = dense(input, format), r = dense(residual, format);
  const int64_t numel = x.numel();
  const Tensor output = empty_like(x, format);
  const Tensor mask = save_mask ? empty(x, {1, (numel + 7) / 8}, ScalarType::Byte) : nothing(x, ScalarType::Byte);
  uint8_t* bits = save_mask ? static_cast<uint8_t*>(mutable_data_of(mask)) : nullptr;
  call.check(launch_add_relu(dtype_of(x), data_of(x), data_of(r), mutable_data_of(output), bits, numel, call.launch()));
  return {output, mask};
}

Tensor add_relu_backward(const Tensor& grad_output, const Tensor& mask, std::optional<bool> channels_last) {
  check_tensor(grad_output, "grad_output");
  const Tensor dense_mask = checked_mask(mask, 1, (grad_output.numel() + 7) / 8, grad_output);
  const Call call("add_relu_backward", grad_output);
  const MemoryFormat format = format_of(grad_output, channels_last);
  const Tensor g = dense(grad_output, format);
  const Tensor grad_input = empty_like(g, format);
  call.check(launch_add_relu_backward(dtype_of(g), data_of(g), static_cast<const uint8_t*>(data_of(dense_mask)),
                                      mutable_data_of(grad_input), g.numel(), call.launch()));
  return grad_input;
}

namespace {

void update_running_stats(const MaybeTensor& running_mean, const MaybeTensor& running_var, const Tensor& mean,
                          const Tensor& var, double momentum, int64_t count) {
  check_running_update(running_mean, running_var, mean, var);
  const Call call("update_running_stats", mean);
  call.check(launch_running_stats(
      {output_of(running_mean), output_of(running_var), values(mean), values(var), mean.size(0), count, momentum},
      call.launch()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, RESNET_FUSED_CUDA_DISPATCH_KEY, m) {
  m.impl("add_relu", TORCH_BOX(&add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats));
}

}  // namespace resnet_fused::cuda
