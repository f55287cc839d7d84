// Forward operators on the CPU: training (batch statistics), evaluation (running statistics), and with statistics given.
//
// Passes over memory in training: planes read x, residual and write y, for a channel stays in the cache between its statistics and its
// normalization; rows read x twice, the second time backwards to meet what the cache still has.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/branch.h"
#include "cpu/running_stats.h"

namespace resnet_fused::cpu {

namespace {

// y and the mask of one call, and the arguments of its kernels.
template <typename T>
struct Output {
  Output(const Branch<T>& branch, const MaybeTensor& residual, const Branch<T>* branch2, bool relu, bool save_mask)
      : residual(residual ? std::optional(dense(*residual, branch.format)) : std::nullopt),
        output(empty_like(branch.tensor, branch.format)),
        mask(new_mask(relu && save_mask && (residual || branch2), branch.shape)) {
    arguments.shape = branch.shape;
    arguments.input = branch.data;
    arguments.residual = branch2          ? branch2->data
                         : this->residual ? this->residual->template const_data_ptr<T>()
                                          : nullptr;
    arguments.output = output.mutable_data_ptr<T>();
    arguments.mask = mask.numel() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
    arguments.affine = branch.affine();
    if (branch2) arguments.affine2 = branch2->affine();
    arguments.relu = relu;
    arguments.stream = should_stream<T>(branch.shape, {arguments.output});
  }

  MaybeTensor residual;
  Tensor output;
  Tensor mask;
  ForwardArguments<T> arguments{};
};

// The normalization alone, statistics being known.
template <typename T>
void run(const ForwardArguments<T>& arguments) {
  const Shape& shape = arguments.shape;
  if (shape.numel() == 0) return;
  if (shape.rows) {
    const RowPieces pieces(shape);
    parallel(pieces.count, shape.numel(), [&](int64_t begin, int64_t end) {
      kernels<T>().rows_forward(arguments, pieces.begin(begin), pieces.begin(end));
    });
    return;
  }
  const PlanePieces pieces(shape);
  const int64_t together = pieces.count > 1 ? 1 : channels_together(shape, sizeof(T));
  parallel(shape.channels * pieces.count, shape.numel(), [&](int64_t begin, int64_t end) {
    for_channels(begin, end, together, [&](int64_t i, int64_t channels) {
      const int64_t p = i % pieces.count;
      kernels<T>().planes_forward(arguments, i / pieces.count, channels, pieces.begin(p), pieces.begin(p + 1));
    });
  });
}

// Statistics and normalization.
template <typename T>
void run_training(const ForwardArguments<T>& arguments, Branch<T>& branch, Branch<T>* branch2) {
  const Shape& shape = arguments.shape;
  if (shape.rows || PlanePieces(shape).count > 1 || shape.numel() == 0) {
    all_statistics(branch);
    if (branch2) all_statistics(*branch2);
    return run(arguments);
  }
  parallel(shape.channels, shape.numel(), [&](int64_t begin, int64_t end) {
    for_channels(begin, end, channels_together(shape, sizeof(T)), [&](int64_t c, int64_t channels) {
      planes_statistics(branch, c, channels);
      if (branch2) planes_statistics(*branch2, c, channels);
      kernels<T>().planes_forward(arguments, c, channels, 0, shape.count());
    });
  });
}

// One branch in training; `results` picks what comes back, and may update running statistics.
template <typename Results>
auto train(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
           double eps, bool relu, bool save_mask, std::optional<bool> channels_last, const Results& results) {
  check_branch(input, weight, bias);
  check_same(residual, "residual", input);
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, eps);
    Output<T> out(branch, residual, nullptr, relu, save_mask);
    run_training<T>(out.arguments, branch, nullptr);
    return results(branch, out);
  });
}

// The same for two branches.
template <typename Results>
auto train_dual(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& input2,
                const MaybeTensor& weight2, const MaybeTensor& bias2, double eps, double eps2, bool relu,
                bool save_mask, std::optional<bool> channels_last, const Results& results) {
  check_branch(input, weight, bias);
  check_second(input, input2, weight2, bias2);
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, eps);
    Branch<T> branch2(input2, branch.format, weight2, bias2, eps2);
    branch.add_bias_of(branch2);
    Output<T> out(branch, std::nullopt, &branch2, relu, save_mask);
    run_training<T>(out.arguments, branch, &branch2);
    return results(branch, branch2, out);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_add_relu_train(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
    bool relu, bool save_mask, std::optional<bool> channels_last) {
  return train(
      input, weight, bias, residual, eps, relu, save_mask, channels_last, [](const auto& branch, const auto& out) {
        return std::tuple(out.output, branch.mean_tensor(), branch.var_tensor(), branch.invstd_tensor(), out.mask);
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_add_relu_train_with_update(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& running_mean, const MaybeTensor& running_var, double momentum, double eps, bool relu,
    bool save_mask) {
  check_input(input);
  check_running(input, weight, bias, running_mean, running_var, "");
  check_count(input);
  const Tensor saved_bias = bias && save_mask && !(relu && residual)
                                ? torch::stable::clone(*bias)
                                : nothing(bias ? bias->scalar_type() : statistics_dtype(input.scalar_type()));
  return train(input, weight, bias, residual, eps, relu, save_mask, std::nullopt,
               [&](const auto& branch, const auto& out) {
                 branch.update(running_mean, running_var, momentum);
                 return std::tuple(out.output, branch.mean_tensor(), branch.invstd_tensor(), saved_bias, out.mask);
               });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_batch_norm_add_relu_train(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& input2,
    const MaybeTensor& weight2, const MaybeTensor& bias2, double eps, double eps2, bool relu, bool save_mask,
    std::optional<bool> channels_last) {
  const auto results = [](const auto& branch, const auto& branch2, const auto& out) {
    return std::tuple(out.output, branch.mean_tensor(), branch.var_tensor(), branch.invstd_tensor(),
                      branch2.mean_tensor(), branch2.var_tensor(), branch2.invstd_tensor(), out.mask);
  };
  return train_dual(input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask, channels_last, results);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_batch_norm_add_relu_train_with_update(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, const Tensor& input2, const MaybeTensor& weight2, const MaybeTensor& bias2,
    const MaybeTensor& running_mean2, const MaybeTensor& running_var2, double momentum, double momentum2, double eps,
    double eps2, bool relu, bool save_mask) {
  check_input(input);
  check_running(input, weight, bias, running_mean, running_var, "");
  check_running(input, weight2, bias2, running_mean2, running_var2, "2");
  check_count(input);
  const auto results = [&](const auto& branch, const auto& branch2, const auto& out) {
    branch.update(running_mean, running_var, momentum);
    branch2.update(running_mean2, running_var2, momentum2);
    return std::tuple(out.output, branch.mean_tensor(), branch.invstd_tensor(), branch2.mean_tensor(),
                      branch2.invstd_tensor(), out.mask);
  };
  return train_dual(input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask, std::nullopt, results);
}

std::tuple<Tensor, Tensor> batch_norm_add_relu_eval(const Tensor& input, const MaybeTensor& weight,
                                                    const MaybeTensor& bias, const MaybeTensor& residual,
                                                    const Tensor& running_mean, const Tensor& running_var, double eps,
                                                    bool relu, bool save_mask, std::optional<bool> channels_last) {
  check_branch(input, weight, bias);
  check_same(residual, "residual", input);
  check_running(input, weight, bias, running_mean, running_var, "");
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, eps);
    branch.take_var(running_mean, running_var);
    Output<T> out(branch, residual, nullptr, relu, save_mask);
    run<T>(out.arguments);
    return std::tuple(out.output, out.mask);
  });
}

std::tuple<Tensor, Tensor> dual_batch_norm_add_relu_eval(const Tensor& input, const MaybeTensor& weight,
                                                         const MaybeTensor& bias, const Tensor& running_mean,
                                                         const Tensor& running_var, const Tensor& input2,
                                                         const MaybeTensor& weight2, const MaybeTensor& bias2,
                                                         const Tensor& running_mean2, const Tensor& running_var2,
                                                         double eps, double eps2, bool relu, bool save_mask,
                                                         std::optional<bool> channels_last) {
  check_branch(input, weight, bias);
  check_second(input, input2, weight2, bias2);
  check_running(input, weight, bias, running_mean, running_var, "");
  check_running(input, weight2, bias2, running_mean2, running_var2, "2");
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, eps);
    Branch<T> branch2(input2, branch.format, weight2, bias2, eps2);
    branch.add_bias_of(branch2);
    branch.take_var(running_mean, running_var);
    branch2.take_var(running_mean2, running_var2);
    Output<T> out(branch, std::nullopt, &branch2, relu, save_mask);
    run<T>(out.arguments);
    return std::tuple(out.output, out.mask);
  });
}

std::tuple<Tensor, Tensor> batch_norm_add_relu_apply(const Tensor& input, const MaybeTensor& weight,
                                                     const MaybeTensor& bias, const MaybeTensor& residual,
                                                     const Tensor& mean, const Tensor& invstd, bool relu,
                                                     bool save_mask, std::optional<bool> channels_last) {
  check_branch(input, weight, bias);
  check_same(residual, "residual", input);
  check_per_channel(mean, "mean", input);
  check_per_channel(invstd, "invstd", input);
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, 0);
    branch.take_invstd(mean, invstd);
    Output<T> out(branch, residual, nullptr, relu, save_mask);
    run<T>(out.arguments);
    return std::tuple(out.output, out.mask);
  });
}

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& input) {
  check_input(input);
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, memory_format(input), std::nullopt, std::nullopt, 0);
    all_statistics(branch);
    return std::tuple(branch.mean_tensor(), branch.var_tensor());
  });
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("batch_norm_add_relu_train", TORCH_BOX(&batch_norm_add_relu_train));
  m.impl("batch_norm_add_relu_train_with_update", TORCH_BOX(&batch_norm_add_relu_train_with_update));
  m.impl("dual_batch_norm_add_relu_train_with_update", TORCH_BOX(&dual_batch_norm_add_relu_train_with_update));
  m.impl("dual_batch_norm_add_relu_train", TORCH_BOX(&dual_batch_norm_add_relu_train));
  m.impl("batch_norm_add_relu_eval", TORCH_BOX(&batch_norm_add_relu_eval));
  m.impl("dual_batch_norm_add_relu_eval", TORCH_BOX(&dual_batch_norm_add_relu_eval));
  m.impl("batch_norm_add_relu_apply", TORCH_BOX(&batch_norm_add_relu_apply));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
}

}  // namespace resnet_fused::cpu
