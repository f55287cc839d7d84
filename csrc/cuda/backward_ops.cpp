// Backward operators on CUDA.
//
// Two launches: a pass that reduces (reduce.cu) and one that applies (backward.cu), or one of them where nothing of the
// other is asked for, such as gradients of weight and bias with constant statistics. One launch makes both passes where
// the tensors fit on chip (on_chip.cuh).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/tensors.h"

namespace resnet_fused::cuda {

namespace {

// The tensors of one call and its results.
struct Gradients {
  Gradients(const char* name, const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
            const MaybeTensor& bias, const MaybeTensor& mask, bool relu, std::optional<bool> channels_last,
            const MaybeTensor& input2 = std::nullopt, const MaybeTensor& weight2 = std::nullopt,
            const MaybeTensor& grad_output2 = std::nullopt)
      : call(name, input),
        format(format_of(input, channels_last)),
        x(dense(input, format)),
        x2(input2 ? MaybeTensor(dense(*input2, format)) : std::nullopt),
        grad(dense(grad_output, format)),
        grad2(grad_output2 ? MaybeTensor(dense(*grad_output2, format)) : std::nullopt),
        dtype(dtype_of(x)) {
    g.shape = shape_of(x, format);
    g.first = branch_of(x, weight, bias);
    if (x2) g.second = branch_of(*x2, weight2, std::nullopt);
    g.two = x2.has_value();
    g.grad_output = data_of(grad);
    if (grad2) g.grad_output2 = data_of(*grad2);
    g.keep = KeepFrom::kAll;
    if (relu && mask) {
      dense_mask = checked_mask(*mask, g.shape.runs(), g.shape.mask_bytes(), input);
      g.keep = KeepFrom::kMask;
      g.mask = static_cast<const uint8_t*>(data_of(*dense_mask));
    } else if (relu) {
      STD_TORCH_CHECK(!x2, "mask is needed for the ReLU's gradient");
      g.keep = KeepFrom::kInput;
    }
  }

  // Allocates what is asked for; `slot` is where the kernels write it.
  Tensor wanted(bool is, void*& slot) {
    if (!is) return nothing(x, x.scalar_type());
    Tensor r = empty_like(x, format);
    slot = mutable_data_of(r);
    return r;
  }

  // The gradient of a vector, of its dtype, or of the statistics' where there is none.
  Tensor wanted(bool is, const MaybeTensor& like, ChannelOutput& slot) {
    const ScalarType statistics = statistics_dtype(x.scalar_type());
    if (!is) return nothing(x, statistics);
    Tensor r = empty(x, {x.size(1)}, like ? like->scalar_type() : statistics);
    slot = output_of(r);
    return r;
  }

  // Both passes, or one of them where nothing of the other is asked for. Constant statistics do not depend on the sums,
  // but the sums are a pass of their own all the same (reduce.cu says why).
  void run(bool constant_statistics) {
    const bool first = g.grad_input != nullptr, second = g.grad_input2 != nullptr;
    const bool slopes = (first || second) && !constant_statistics;
    BackwardArguments backward{};
    if (slopes || needs_sums()) {
      sums.gradient = g;
      sums.read_input = (first && slopes) || sums.grad_weight.data || g.keep == KeepFrom::kInput;
      sums.read_input2 = (second && slopes) || sums.grad_weight2.data;
      if (slopes) backward.table = sums.table = call.new_table(x);
      cudaError_t error = cudaSuccess;
      if (slopes && !g.two && on_chip_wanted() && launch_on_chip_backward(dtype, sums, call.launch(), error)) {
        return call.check(error);
      }
      call.check(launch_reduce(dtype, sums, call.launch()));
    }
    backward.gradient = g;
    backward.constant_statistics = constant_statistics;
    call.check(launch_backward(dtype, backward, call.launch()));
  }

  bool needs_sums() const {
    return sums.grad_weight.data || sums.grad_bias.data || sums.grad_weight2.data || sums.grad_bias2.data;
  }

  Call call;
  MemoryFormat format;
  Tensor x;
  MaybeTensor x2;
  Tensor grad;
  MaybeTensor grad2, dense_mask;
  Dtype dtype;
  Gradient g{};
  ReduceArguments sums{};
};

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace

Four batch_norm_add_relu_train_backward(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                        const MaybeTensor& bias, const Tensor& mean, const Tensor& invstd,
                                        const MaybeTensor& mask, bool relu, bool needs_input_grad,
                                        bool needs_residual_grad, bool needs_weight_grad, bool needs_bias_grad,
                                        const MaybeTensor& grad_output2, std::optional<bool> channels_last) {
  check_backward(grad_output, input, weight, bias, mean, invstd);
  check_same(grad_output2, "grad_output2", input);
  Gradients r("batch_norm_add_relu_train_backward", grad_output, input, weight, bias, mask, relu, channels_last,
              std::nullopt, std::nullopt, grad_output2);
  take_invstd(r.g.first, mean, invstd);
  const Tensor grad_input = r.wanted(needs_input_grad, r.g.grad_input);
  const Tensor grad_residual = r.wanted(needs_residual_grad, r.g.grad_residual);
  const Tensor grad_weight = r.wanted(needs_weight_grad, weight, r.sums.grad_weight);
  const Tensor grad_bias = r.wanted(needs_bias_grad, bias, r.sums.grad_bias);
  r.run(false);
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

Four batch_norm_add_relu_eval_backward(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                       const MaybeTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                                       const MaybeTensor& mask, double eps, bool relu, bool needs_input_grad,
                                       bool needs_residual_grad, bool needs_weight_grad, bool needs_bias_grad,
                                       const MaybeTensor& grad_output2, std::optional<bool> channels_last) {
  check_backward(grad_output, input, weight, bias, running_mean, running_var);
  check_same(grad_output2, "grad_output2", input);
  Gradients r("batch_norm_add_relu_eval_backward", grad_output, input, weight, bias, mask, relu, channels_last,
              std::nullopt, std::nullopt, grad_output2);
  take_var(r.g.first, running_mean, running_var, eps);
  const Tensor grad_input = r.wanted(needs_input_grad, r.g.grad_input);
  const Tensor grad_residual = r.wanted(needs_residual_grad, r.g.grad_residual);
  const Tensor grad_weight = r.wanted(needs_weight_grad, weight, r.sums.grad_weight);
  const Tensor grad_bias = r.wanted(needs_bias_grad, bias, r.sums.grad_bias);
  r.run(true);
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

namespace {

// Both duals: `statistics` gives the branches theirs, `run` makes the passes.
template <typename Statistics, typename Run>
Six dual_backward(const char* name, const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                  const Tensor& input2, const MaybeTensor& weight2, const MaybeTensor& mask, bool relu,
                  bool needs_input_grad, bool needs_weight_grad, bool needs_bias_grad, bool needs_input2_grad,
                  bool needs_weight2_grad, bool needs_bias2_grad, const MaybeTensor& grad_output2,
                  std::optional<bool> channels_last, const Statistics& statistics, const Run& run) {
  check_same(grad_output2, "grad_output2", input);
  check_same(input2, "input2", input);
  check_per_channel(weight2, "weight2", input);
  Gradients r(name, grad_output, input, weight, std::nullopt, mask, relu, channels_last, input2, weight2, grad_output2);
  statistics(r.g.first, r.g.second);
  const Tensor grad_input = r.wanted(needs_input_grad, r.g.grad_input);
  const Tensor grad_weight = r.wanted(needs_weight_grad, weight, r.sums.grad_weight);
  const Tensor grad_bias = r.wanted(needs_bias_grad, weight, r.sums.grad_bias);
  const Tensor grad_input2 = r.wanted(needs_input2_grad, r.g.grad_input2);
  const Tensor grad_weight2 = r.wanted(needs_weight2_grad, weight2, r.sums.grad_weight2);
  const Tensor grad_bias2 = r.wanted(needs_bias2_grad, weight2, r.sums.grad_bias2);
  run(r);
  return {grad_input, grad_weight, grad_bias, grad_input2, grad_weight2, grad_bias2};
}

}  // namespace

Six dual_batch_norm_add_relu_train_backward(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                            const Tensor& mean, const Tensor& invstd, const Tensor& input2,
                                            const MaybeTensor& weight2, const Tensor& mean2, const Tensor& invstd2,
                                            const MaybeTensor& mask, bool relu, bool needs_input_grad,
                                            bool needs_weight_grad, bool needs_bias_grad, bool needs_input2_grad,
                                            bool needs_weight2_grad, bool needs_bias2_grad,
                                            const MaybeTensor& grad_output2, std::optional<bool> channels_last) {
  check_backward(grad_output, input, weight, std::nullopt, mean, invstd);
  check_per_channel(mean2, "mean2", input);
  check_per_channel(invstd2, "invstd2", input);
  return dual_backward(
      "dual_batch_norm_add_relu_train_backward", grad_output, input, weight, input2, weight2, mask, relu,
      needs_input_grad, needs_weight_grad, needs_bias_grad, needs_input2_grad, needs_weight2_grad, needs_bias2_grad,
      grad_output2, channels_last,
      [&](Branch& first, Branch& second) {
        take_invstd(first, mean, invstd);
        take_invstd(second, mean2, invstd2);
      },
      [](Gradients& gradients) { gradients.run(false); });
}

Six dual_batch_norm_add_relu_eval_backward(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                           const Tensor& running_mean, const Tensor& running_var, const Tensor& input2,
                                           const MaybeTensor& weight2, const Tensor& running_mean2,
                                           const Tensor& running_var2, const MaybeTensor& mask, double eps, double eps2,
                                           bool relu, bool needs_input_grad, bool needs_weight_grad,
                                           bool needs_bias_grad, bool needs_input2_grad, bool needs_weight2_grad,
                                           bool needs_bias2_grad, const MaybeTensor& grad_output2,
                                           std::optional<bool> channels_last) {
  check_backward(grad_output, input, weight, std::nullopt, running_mean, running_var);
  check_per_channel(running_mean2, "running_mean2", input);
  check_per_channel(running_var2, "running_var2", input);
  return dual_backward(
      "dual_batch_norm_add_relu_eval_backward", grad_output, input, weight, input2, weight2, mask, relu,
      needs_input_grad, needs_weight_grad, needs_bias_grad, needs_input2_grad, needs_weight2_grad, needs_bias2_grad,
      grad_output2, channels_last,
      [&](Branch& first, Branch& second) {
        take_var(first, running_mean, running_var, eps);
        take_var(second, running_mean2, running_var2, eps2);
      },
      [](Gradients& gradients) { gradients.run(true); });
}

std::tuple<Tensor, Tensor> batch_norm_add_relu_backward_reduce(const Tensor& grad_output, const Tensor& input,
                                                               const MaybeTensor& weight, const MaybeTensor& bias,
                                                               const Tensor& mean, const Tensor& invstd,
                                                               const MaybeTensor& mask, bool relu,
                                                               std::optional<bool> channels_last) {
  check_backward(grad_output, input, weight, bias, mean, invstd);
  Gradients r("batch_norm_add_relu_backward_reduce", grad_output, input, weight, bias, mask, relu, channels_last);
  take_invstd(r.g.first, mean, invstd);
  const Tensor sum_grad = statistic(r.x), sum_grad_xmu = statistic(r.x);
  r.sums.gradient = r.g;
  r.sums.read_input = true;
  r.sums.sum_grad = mutable_data_of(sum_grad);
  r.sums.sum_grad_xmu = mutable_data_of(sum_grad_xmu);
  r.call.check(launch_reduce(r.dtype, r.sums, r.call.launch()));
  return {sum_grad, sum_grad_xmu};
}

std::tuple<Tensor, Tensor> batch_norm_add_relu_backward_apply(const Tensor& grad_output, const Tensor& input,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              const Tensor& mean, const Tensor& invstd,
                                                              const MaybeTensor& mask, const Tensor& mean_grad,
                                                              const Tensor& mean_grad_xmu, bool relu,
                                                              bool needs_input_grad, bool needs_residual_grad,
                                                              std::optional<bool> channels_last) {
  check_backward(grad_output, input, weight, bias, mean, invstd);
  check_per_channel(mean_grad, "mean_grad", input);
  check_per_channel(mean_grad_xmu, "mean_grad_xmu", input);
  Gradients r("batch_norm_add_relu_backward_apply", grad_output, input, weight, bias, mask, relu, channels_last);
  take_invstd(r.g.first, mean, invstd);
  const Tensor grad_input = r.wanted(needs_input_grad, r.g.grad_input);
  const Tensor grad_residual = r.wanted(needs_residual_grad, r.g.grad_residual);
  BackwardArguments backward{};
  backward.gradient = r.g;
  backward.mean_grad = values(mean_grad);
  backward.mean_grad_xmu = values(mean_grad_xmu);
  r.call.check(launch_backward(r.dtype, backward, r.call.launch()));
  return {grad_input, grad_residual};
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, RESNET_FUSED_CUDA_DISPATCH_KEY, m) {
  m.impl("batch_norm_add_relu_train_backward", TORCH_BOX(&batch_norm_add_relu_train_backward));
  m.impl("batch_norm_add_relu_eval_backward", TORCH_BOX(&batch_norm_add_relu_eval_backward));
  m.impl("dual_batch_norm_add_relu_train_backward", TORCH_BOX(&dual_batch_norm_add_relu_train_backward));
  m.impl("dual_batch_norm_add_relu_eval_backward", TORCH_BOX(&dual_batch_norm_add_relu_eval_backward));
  m.impl("batch_norm_add_relu_backward_reduce", TORCH_BOX(&batch_norm_add_relu_backward_reduce));
  m.impl("batch_norm_add_relu_backward_apply", TORCH_BOX(&batch_norm_add_relu_backward_apply));
}

}  // namespace resnet_fused::cuda
