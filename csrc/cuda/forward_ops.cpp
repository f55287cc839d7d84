// Forward operators on CUDA: training (batch statistics), evaluation (running statistics), and with statistics given.
//
// Training is two launches: the statistics of all inputs, which read each once, and the pass that normalizes
// (forward.cu); or one, where a single input fits on chip (on_chip.cuh). The others are the second alone.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/tensors.h"

namespace resnet_fused::cuda {

namespace {

// The statistics of one training input, and what they are made for.
struct Trained {
  Trained(Call& call, const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
          bool with_var)
      : mean(statistic(input)),
        var(with_var ? MaybeTensor(statistic(input)) : std::nullopt),
        invstd(statistic(input)),
        branch(branch_of(input, weight, bias)) {
    take_invstd(branch, mean, invstd);
    statistics.input = branch.input;
    statistics.eps = eps;
    statistics.mean = mutable_data_of(mean);
    statistics.var = var ? mutable_data_of(*var) : nullptr;
    statistics.invstd = mutable_data_of(invstd);
    statistics.weight = branch.weight;
    statistics.bias = branch.bias;
    branch.table = statistics.table = call.new_table(input);
  }

  Tensor mean;
  MaybeTensor var;
  Tensor invstd;
  Branch branch;
  StatisticsBranch statistics;
};

struct Running {
  MaybeTensor mean, var;
  double momentum = 0;

  void give_to(StatisticsBranch& statistics) const {
    statistics.running_mean = output_of(mean);
    statistics.running_var = output_of(var);
    statistics.momentum = momentum;
  }
};

// The output and its mask, and the pass that makes them.
struct Output {
  // Of an input in that format.
  Output(const Tensor& input, MemoryFormat format, const MaybeTensor& residual, bool two, bool relu, bool save_mask)
      : residual(residual ? MaybeTensor(dense(*residual, format)) : std::nullopt),
        output(empty_like(input, format)),
        mask(new_mask(input, relu && save_mask && (residual || two), shape_of(input, format))) {
    arguments.shape = shape_of(input, format);
    arguments.residual = this->residual ? data_of(*this->residual) : nullptr;
    arguments.output = mutable_data_of(output);
    arguments.mask = mask.numel() ? static_cast<uint8_t*>(mutable_data_of(mask)) : nullptr;
    arguments.two = two;
    arguments.relu = relu;
  }

  MaybeTensor residual;
  Tensor output;
  Tensor mask;
  ForwardArguments arguments{};
};

// One branch in training. `running` is updated and `saved_bias` becomes a copy of the bias, where there are such.
std::tuple<Output, Trained> train(const char* name, const Tensor& input, const MaybeTensor& weight,
                                  const MaybeTensor& bias, const MaybeTensor& residual, const Running* running,
                                  double eps, bool relu, bool save_mask, std::optional<bool> channels_last,
                                  const MaybeTensor& saved_bias = std::nullopt) {
  check_branch(input, weight, bias);
  check_same(residual, "residual", input);
  Call call(name, input);
  const MemoryFormat format = format_of(input, channels_last);
  const Tensor x = dense(input, format);
  Trained trained(call, x, weight, bias, eps, running == nullptr);
  if (running != nullptr) running->give_to(trained.statistics);
  trained.statistics.saved_bias = output_of(saved_bias);
  Output out(x, format, residual, false, relu, save_mask);
  StatisticsArguments statistics{out.arguments.shape, trained.statistics, {}, 1};
  out.arguments.first = trained.branch;
  cudaError_t error = cudaSuccess;
  if (on_chip_wanted() && launch_on_chip_forward(dtype_of(x), statistics, out.arguments, call.launch(), error)) {
    call.check(error);
    return {out, trained};
  }
  call.check(launch_statistics(dtype_of(x), statistics, call.launch()));
  call.check(launch_forward(dtype_of(x), out.arguments, call.launch()));
  return {out, trained};
}

// Whether both branches update the same running statistics. Then one update must come after the other.
bool share_memory(const Running& a, const Running& b) {
  for (const void* of_a : {output_of(a.mean).data, output_of(a.var).data}) {
    for (const void* of_b : {output_of(b.mean).data, output_of(b.var).data}) {
      if (of_a != nullptr && of_a == of_b) return true;
    }
  }
  return false;
}

// The same for two branches.
std::tuple<Output, Trained, Trained> train_dual(const char* name, const Tensor& input, const MaybeTensor& weight,
                                                const MaybeTensor& bias, const Running* running, const Tensor& input2,
                                                const MaybeTensor& weight2, const MaybeTensor& bias2,
                                                const Running* running2, double eps, double eps2, bool relu,
                                                bool save_mask, std::optional<bool> channels_last) {
  check_branch(input, weight, bias);
  check_second(input, input2, weight2, bias2);
  Call call(name, input);
  const MemoryFormat format = format_of(input, channels_last);
  const Tensor x = dense(input, format), x2 = dense(input2, format);
  const bool shared = running != nullptr && share_memory(*running, *running2);
  const bool with_var = running == nullptr || shared;
  Trained first(call, x, weight, bias, eps, with_var), second(call, x2, weight2, bias2, eps2, with_var);
  if (running != nullptr) {
    running->give_to(first.statistics);
    running2->give_to(second.statistics);
  }
  Output out(x, format, std::nullopt, true, relu, save_mask);
  StatisticsArguments statistics{out.arguments.shape, first.statistics, second.statistics, 2};
  if (shared) statistics.second.running_mean = statistics.second.running_var = {};
  call.check(launch_statistics(dtype_of(x), statistics, call.launch()));
  if (shared) {
    const StatisticsBranch& b = second.statistics;
    call.check(launch_running_stats({b.running_mean, b.running_var, values(second.mean), values(*second.var), x.size(1),
                                     out.arguments.shape.count(), b.momentum},
                                    call.launch()));
  }
  out.arguments.first = first.branch;
  out.arguments.second = second.branch;
  call.check(launch_forward(dtype_of(x), out.arguments, call.launch()));
  return {out, first, second};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_add_relu_train(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
    bool relu, bool save_mask, std::optional<bool> channels_last) {
  const auto [out, branch] =
      train("batch_norm_add_relu_train", input, weight, bias, residual, nullptr, eps, relu, save_mask, channels_last);
  return {out.output, branch.mean, *branch.var, branch.invstd, out.mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_add_relu_train_with_update(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& running_mean, const MaybeTensor& running_var, double momentum, double eps, bool relu,
    bool save_mask) {
  check_input(input);
  check_running(input, weight, bias, running_mean, running_var, "");
  check_count(input);
  const bool save_bias = bias && save_mask && !(relu && residual);
  const ScalarType dtype = bias ? bias->scalar_type() : statistics_dtype(input.scalar_type());
  const Tensor saved_bias = save_bias ? empty(input, {input.size(1)}, dtype) : nothing(input, dtype);
  const Running running{running_mean, running_var, momentum};
  const auto [out, branch] =
      train("batch_norm_add_relu_train_with_update", input, weight, bias, residual, &running, eps, relu, save_mask,
            std::nullopt, save_bias ? MaybeTensor(saved_bias) : std::nullopt);
  return {out.output, branch.mean, branch.invstd, saved_bias, out.mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_batch_norm_add_relu_train(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& input2,
    const MaybeTensor& weight2, const MaybeTensor& bias2, double eps, double eps2, bool relu, bool save_mask,
    std::optional<bool> channels_last) {
  const auto [out, first, second] = train_dual("dual_batch_norm_add_relu_train", input, weight, bias, nullptr, input2,
                                               weight2, bias2, nullptr, eps, eps2, relu, save_mask, channels_last);
  return {out.output, first.mean, *first.var, first.invstd, second.mean, *second.var, second.invstd, out.mask};
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
  const Running running{running_mean, running_var, momentum}, running2{running_mean2, running_var2, momentum2};
  const auto [out, first, second] =
      train_dual("dual_batch_norm_add_relu_train_with_update", input, weight, bias, &running, input2, weight2, bias2,
                 &running2, eps, eps2, relu, save_mask, std::nullopt);
  return {out.output, first.mean, first.invstd, second.mean, second.invstd, out.mask};
}

std::tuple<Tensor, Tensor> batch_norm_add_relu_eval(const Tensor& input, const MaybeTensor& weight,
                                                    const MaybeTensor& bias, const MaybeTensor& residual,
                                                    const Tensor& running_mean, const Tensor& running_var, double eps,
                                                    bool relu, bool save_mask, std::optional<bool> channels_last) {
  check_branch(input, weight, bias);
  check_same(residual, "residual", input);
  check_running(input, weight, bias, running_mean, running_var, "");
  const Call call("batch_norm_add_relu_eval", input);
  const MemoryFormat format = format_of(input, channels_last);
  const Tensor x = dense(input, format);
  Output out(x, format, residual, false, relu, save_mask);
  out.arguments.first = branch_of(x, weight, bias);
  take_var(out.arguments.first, running_mean, running_var, eps);
  call.check(launch_forward(dtype_of(x), out.arguments, call.launch()));
  return {out.output, out.mask};
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
  const Call call("dual_batch_norm_add_relu_eval", input);
  const MemoryFormat format = format_of(input, channels_last);
  const Tensor x = dense(input, format), x2 = dense(input2, format);
  Output out(x, format, std::nullopt, true, relu, save_mask);
  out.arguments.first = branch_of(x, weight, bias);
  out.arguments.second = branch_of(x2, weight2, bias2);
  take_var(out.arguments.first, running_mean, running_var, eps);
  take_var(out.arguments.second, running_mean2, running_var2, eps2);
  call.check(launch_forward(dtype_of(x), out.arguments, call.launch()));
  return {out.output, out.mask};
}

std::tuple<Tensor, Tensor> batch_norm_add_relu_apply(const Tensor& input, const MaybeTensor& weight,
                                                     const MaybeTensor& bias, const MaybeTensor& residual,
                                                     const Tensor& mean, const Tensor& invstd, bool relu,
                                                     bool save_mask, std::optional<bool> channels_last) {
  check_branch(input, weight, bias);
  check_same(residual, "residual", input);
  check_per_channel(mean, "mean", input);
  check_per_channel(invstd, "invstd", input);
  const Call call("batch_norm_add_relu_apply", input);
  const MemoryFormat format = format_of(input, channels_last);
  const Tensor x = dense(input, format);
  Output out(x, format, residual, false, relu, save_mask);
  out.arguments.first = branch_of(x, weight, bias);
  take_invstd(out.arguments.first, mean, invstd);
  call.check(launch_forward(dtype_of(x), out.arguments, call.launch()));
  return {out.output, out.mask};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& input) {
  check_input(input);
  const Call call("batch_norm_statistics", input);
  const MemoryFormat format = memory_format(input);
  const Tensor x = dense(input, format);
  const Tensor mean = statistic(x), var = statistic(x);
  StatisticsArguments arguments{shape_of(x, format), {}, {}, 1};
  arguments.first.input = data_of(x);
  arguments.first.mean = mutable_data_of(mean);
  arguments.first.var = mutable_data_of(var);
  call.check(launch_statistics(dtype_of(x), arguments, call.launch()));
  return {mean, var};
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, RESNET_FUSED_CUDA_DISPATCH_KEY, m) {
  m.impl("batch_norm_add_relu_train", TORCH_BOX(&batch_norm_add_relu_train));
  m.impl("batch_norm_add_relu_train_with_update", TORCH_BOX(&batch_norm_add_relu_train_with_update));
  m.impl("dual_batch_norm_add_relu_train", TORCH_BOX(&dual_batch_norm_add_relu_train));
  m.impl("dual_batch_norm_add_relu_train_with_update", TORCH_BOX(&dual_batch_norm_add_relu_train_with_update));
  m.impl("batch_norm_add_relu_eval", TORCH_BOX(&batch_norm_add_relu_eval));
  m.impl("dual_batch_norm_add_relu_eval", TORCH_BOX(&dual_batch_norm_add_relu_eval));
  m.impl("batch_norm_add_relu_apply", TORCH_BOX(&batch_norm_add_relu_apply));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
}

}  // namespace resnet_fused::cuda
