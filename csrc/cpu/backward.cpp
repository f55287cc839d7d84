// Backward operators on the CPU.
//
// With batch statistics: a pass that reduces (the sums of grad and of grad (x - mean)) and one that applies. Planes stay in the cache
// between the two, so each tensor is read from memory once; rows are read twice. With constant statistics one pass suffices, and
// a reduction only where weight or bias want a gradient. A gradient in two parts is added as it is read, in either pass.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/branch.h"

namespace resnet_fused::cpu {

namespace {

struct ChannelSums {
  explicit ChannelSums(int64_t channels) : grad(channels), xmu(channels), xmu2(channels) {}
  std::vector<double> grad, xmu, xmu2;
};

// The tensors of one call, its kernels' arguments and its results.
template <typename T>
struct Gradients {
  using C = Compute<T>;

  Gradients(const Tensor& grad_output, const Branch<T>& branch, const Branch<T>* branch2, const MaybeTensor& mask,
            bool relu, const MaybeTensor& grad_output2 = std::nullopt)
      : grad_output(dense(grad_output, branch.format)),
        grad_output2(grad_output2 ? MaybeTensor(dense(*grad_output2, branch.format)) : std::nullopt),
        branch(branch),
        branch2(branch2),
        sums(branch.shape.channels) {
    const Shape& shape = branch.shape;
    a.shape = shape;
    a.grad_output = this->grad_output.template const_data_ptr<T>();
    if (grad_output2) a.grad_output2 = this->grad_output2->template const_data_ptr<T>();
    a.input = branch.data;
    a.affine = branch.affine();
    if (branch2) {
      a.input2 = branch2->data;
      a.mean2 = branch2->mean.data();
      a.scale2 = branch2->scale.data();
    }
    a.keep = KeepFrom::kAll;
    if (relu && mask) {
      this->mask = checked_mask(*mask, shape.outer(), shape.mask_bytes(), branch.tensor);
      a.keep = KeepFrom::kMask;
      a.mask = this->mask->template const_data_ptr<uint8_t>();
    } else if (relu) {
      STD_TORCH_CHECK(!branch2, "mask is needed for the ReLU's gradient");
      a.keep = KeepFrom::kInput;
    }
  }

  // Allocates what is asked for; `slot` is where the kernels write it.
  Tensor wanted(bool is, T*& slot) {
    if (!is) return nothing(branch.tensor.scalar_type());
    Tensor r = empty_like(branch.tensor, branch.format);
    slot = r.mutable_data_ptr<T>();
    return r;
  }

  void decide_stream() {
    a.stream = (a.grad_input || a.grad_input2 || a.grad_residual) &&
               should_stream<T>(a.shape, {a.grad_input, a.grad_input2, a.grad_residual});
  }

  // Of channels of planes, each in one piece.
  void reduce_channels(int64_t channel, int64_t channels) {
    double total[3 * kChannelsTogether] = {};
    kernels<T>().planes_reduce(a, channel, channels, 0, a.shape.count(), total);
    for (int64_t c = 0; c < channels; ++c) {
      sums.grad[channel + c] = total[3 * c];
      sums.xmu[channel + c] = total[3 * c + 1];
      sums.xmu2[channel + c] = total[3 * c + 2];
      centre(channel + c);
    }
  }

  // Pieces of a channel go through the kernels one by one.
  int64_t together(const PlanePieces& pieces) const {
    return pieces.count > 1 ? 1 : channels_together(a.shape, sizeof(T));
  }

  // From the origin of the kernels' sums to the mean.
  void centre(int64_t c) {
    if (kOriginIsMean<T>) return;
    if (!std::isfinite(sums.grad[c])) {
      sums.xmu[c] = infinite_xmu(c, branch);
      if (branch2) sums.xmu2[c] = infinite_xmu(c, *branch2);
      return;
    }
    sums.xmu[c] -= static_cast<double>(branch.mean[c]) * sums.grad[c];
    if (branch2) sums.xmu2[c] -= static_cast<double>(branch2->mean[c]) * sums.grad[c];
  }

  // The sum of grad (input - mean) where a gradient is infinite: it has the sign of input - mean there.
  double infinite_xmu(int64_t c, const Branch<T>& of) const {
    const Shape& shape = a.shape;
    double sum = 0;
    for (int64_t n = 0; n < shape.batch; ++n) {
      for (int64_t s = 0; s < shape.positions; ++s) {
        const int64_t run = shape.rows ? n * shape.positions + s : n * shape.channels + c;
        const int64_t i = shape.rows ? c : s;
        const int64_t at = run * shape.inner() + i;
        if (a.keep == KeepFrom::kMask && !(a.mask[run * shape.mask_bytes() + i / 8] >> i % 8 & 1)) continue;
        if (a.keep == KeepFrom::kInput) {
          const C y = std::fma(number(a.input[at]) - branch.mean[c], branch.scale[c], branch.bias[c]);
          if (number(T(y)) <= C(0)) continue;  // not NaN
        }
        C grad = number(a.grad_output[at]);
        if (a.grad_output2) grad = number(T(grad + number(a.grad_output2[at])));
        sum += static_cast<double>(grad) * (static_cast<double>(number(of.data[at])) - static_cast<double>(of.mean[c]));
      }
    }
    return sum;
  }

  void reduce() {
    const Shape& shape = a.shape;
    const int64_t channels = shape.channels;
    if (shape.numel() == 0) return;
    if (!shape.rows) {
      const PlanePieces pieces(shape);
      std::vector<double> parts(3 * channels * pieces.count);
      parallel(channels * pieces.count, shape.numel(), [&](int64_t begin, int64_t end) {
        for_channels(begin, end, together(pieces), [&](int64_t i, int64_t many) {
          const int64_t p = i % pieces.count;
          kernels<T>().planes_reduce(a, i / pieces.count, many, pieces.begin(p), pieces.begin(p + 1), &parts[3 * i]);
        });
      });
      for (int64_t i = 0; i < channels * pieces.count; ++i) {
        const int64_t c = i / pieces.count;
        sums.grad[c] += parts[3 * i];
        sums.xmu[c] += parts[3 * i + 1];
        sums.xmu2[c] += parts[3 * i + 2];
      }
      for (int64_t c = 0; c < channels; ++c) centre(c);
      return;
    }
    const RowPieces pieces(shape);
    const int64_t padded = channels + 64 / static_cast<int64_t>(sizeof(C));
    std::vector<double> parts(3 * padded * pieces.count);
    parallel(pieces.count, shape.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        double* part = &parts[3 * padded * p];
        kernels<T>().rows_reduce(a, pieces.begin(p), pieces.begin(p + 1), part, part + padded, part + 2 * padded);
      }
    });
    for (int64_t p = 0; p < pieces.count; ++p) {
      const double* part = &parts[3 * padded * p];
      for (int64_t c = 0; c < channels; ++c) {
        sums.grad[c] += part[c];
        sums.xmu[c] += part[padded + c];
        sums.xmu2[c] += part[2 * padded + c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) centre(c);
  }

  // The constants of the apply pass from the sums.
  void allocate_slopes() {
    mean_grad = vector_of<C>(a.shape.channels);
    slope = vector_of<C>(a.shape.channels);
    slope2 = vector_of<C>(a.shape.channels);
    a.mean_grad = mean_grad.data();
    a.slope = slope.data();
    a.slope2 = slope2.data();
  }

  void set_slopes(int64_t c, double grad, double xmu, double xmu2) {
    const double invstd = branch.invstd[c];
    mean_grad[c] = static_cast<C>(grad);
    slope[c] = static_cast<C>(xmu * invstd * invstd);
    if (branch2) {
      const double invstd2 = branch2->invstd[c];
      slope2[c] = static_cast<C>(xmu2 * invstd2 * invstd2);
    }
  }

  void set_slopes_from_sums(int64_t c) {
    const double count = static_cast<double>(a.shape.count());
    set_slopes(c, sums.grad[c] / count, sums.xmu[c] / count, sums.xmu2[c] / count);
  }

  void apply() {
    const Shape& shape = a.shape;
    if (shape.numel() == 0 || !(a.grad_input || a.grad_input2 || a.grad_residual)) return;
    if (shape.rows) {
      const RowPieces pieces(shape);
      parallel(pieces.count, shape.numel(), [&](int64_t begin, int64_t end) {
        kernels<T>().rows_backward(a, pieces.begin(begin), pieces.begin(end));
      });
    } else {
      const PlanePieces pieces(shape);
      parallel(shape.channels * pieces.count, shape.numel(), [&](int64_t begin, int64_t end) {
        for_channels(begin, end, together(pieces), [&](int64_t i, int64_t many) {
          const int64_t p = i % pieces.count;
          kernels<T>().planes_backward(a, i / pieces.count, many, pieces.begin(p), pieces.begin(p + 1));
        });
      });
    }
  }

  // Both passes, batch statistics.
  void train() {
    const Shape& shape = a.shape;
    decide_stream();
    allocate_slopes();
    const PlanePieces pieces(shape);
    if (shape.rows || pieces.count > 1 || shape.numel() == 0) {
      reduce();
      for (int64_t c = 0; c < shape.channels; ++c) set_slopes_from_sums(c);
      return apply();
    }
    const bool writes = a.grad_input || a.grad_input2 || a.grad_residual;
    parallel(shape.channels, shape.numel(), [&](int64_t begin, int64_t end) {
      for_channels(begin, end, together(pieces), [&](int64_t channel, int64_t many) {
        reduce_channels(channel, many);
        for (int64_t c = channel; c < channel + many; ++c) set_slopes_from_sums(c);
        if (writes) kernels<T>().planes_backward(a, channel, many, 0, shape.count());
      });
    });
  }

  // Constant statistics.
  void eval(bool needs_sums) {
    a.constant_statistics = true;
    decide_stream();
    if (needs_sums) reduce();
    apply();
  }

  Tensor weight_gradient(bool is, const std::vector<double>& xmu, const Branch<T>& of, const MaybeTensor& like) const {
    const ScalarType dtype = like ? like->scalar_type() : statistics_dtype(branch.tensor.scalar_type());
    if (!is) return nothing(statistics_dtype(branch.tensor.scalar_type()));
    std::vector<double> r(xmu.size());
    for (size_t c = 0; c < r.size(); ++c) r[c] = xmu[c] * static_cast<double>(of.invstd[c]);
    return vector_tensor(r.data(), a.shape.channels, dtype);
  }

  Tensor bias_gradient(bool is, const MaybeTensor& like) const {
    if (!is) return nothing(statistics_dtype(branch.tensor.scalar_type()));
    const ScalarType dtype = like ? like->scalar_type() : statistics_dtype(branch.tensor.scalar_type());
    return vector_tensor(sums.grad.data(), a.shape.channels, dtype);
  }

  Tensor grad_output;
  MaybeTensor grad_output2, mask;
  const Branch<T>& branch;
  const Branch<T>* branch2;
  ChannelSums sums;
  Vector<C> mean_grad, slope, slope2;
  BackwardArguments<T> a{};
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
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, 0);
    branch.take_invstd(mean, invstd);
    Gradients<T> g(grad_output, branch, nullptr, mask, relu, grad_output2);
    const Tensor grad_input = g.wanted(needs_input_grad, g.a.grad_input);
    const Tensor grad_residual = g.wanted(needs_residual_grad, g.a.grad_residual);
    g.train();
    return Four(grad_input, grad_residual, g.weight_gradient(needs_weight_grad, g.sums.xmu, branch, weight),
                g.bias_gradient(needs_bias_grad, bias));
  });
}

Four batch_norm_add_relu_eval_backward(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                       const MaybeTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                                       const MaybeTensor& mask, double eps, bool relu, bool needs_input_grad,
                                       bool needs_residual_grad, bool needs_weight_grad, bool needs_bias_grad,
                                       const MaybeTensor& grad_output2, std::optional<bool> channels_last) {
  check_backward(grad_output, input, weight, bias, running_mean, running_var);
  check_same(grad_output2, "grad_output2", input);
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, eps);
    branch.take_var(running_mean, running_var);
    Gradients<T> g(grad_output, branch, nullptr, mask, relu, grad_output2);
    const Tensor grad_input = g.wanted(needs_input_grad, g.a.grad_input);
    const Tensor grad_residual = g.wanted(needs_residual_grad, g.a.grad_residual);
    g.eval(needs_weight_grad || needs_bias_grad);
    return Four(grad_input, grad_residual, g.weight_gradient(needs_weight_grad, g.sums.xmu, branch, weight),
                g.bias_gradient(needs_bias_grad, bias));
  });
}

namespace {

// Both duals: `statistics` fills the two branches, `run` makes the passes.
template <typename Statistics, typename Run>
Six dual_backward(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight, const Tensor& input2,
                  const MaybeTensor& weight2, const MaybeTensor& mask, double eps, double eps2, bool relu,
                  bool needs_input_grad, bool needs_weight_grad, bool needs_bias_grad, bool needs_input2_grad,
                  bool needs_weight2_grad, bool needs_bias2_grad, const MaybeTensor& grad_output2,
                  std::optional<bool> channels_last, const Statistics& statistics, const Run& run) {
  check_same(grad_output2, "grad_output2", input);
  check_same(input2, "input2", input);
  check_per_channel(weight2, "weight2", input);
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, std::nullopt, eps);
    Branch<T> branch2(input2, branch.format, weight2, std::nullopt, eps2);
    statistics(branch, branch2);
    Gradients<T> g(grad_output, branch, &branch2, mask, relu, grad_output2);
    const Tensor grad_input = g.wanted(needs_input_grad, g.a.grad_input);
    const Tensor grad_input2 = g.wanted(needs_input2_grad, g.a.grad_input2);
    run(g);
    return Six(grad_input, g.weight_gradient(needs_weight_grad, g.sums.xmu, branch, weight),
               g.bias_gradient(needs_bias_grad, weight), grad_input2,
               g.weight_gradient(needs_weight2_grad, g.sums.xmu2, branch2, weight2),
               g.bias_gradient(needs_bias2_grad, weight2));
  });
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
      grad_output, input, weight, input2, weight2, mask, 0, 0, relu, needs_input_grad, needs_weight_grad,
      needs_bias_grad, needs_input2_grad, needs_weight2_grad, needs_bias2_grad, grad_output2, channels_last,
      [&](auto& branch, auto& branch2) {
        branch.take_invstd(mean, invstd);
        branch2.take_invstd(mean2, invstd2);
      },
      [](auto& gradients) { gradients.train(); });
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
  const bool sums = needs_weight_grad || needs_bias_grad || needs_weight2_grad || needs_bias2_grad;
  return dual_backward(
      grad_output, input, weight, input2, weight2, mask, eps, eps2, relu, needs_input_grad, needs_weight_grad,
      needs_bias_grad, needs_input2_grad, needs_weight2_grad, needs_bias2_grad, grad_output2, channels_last,
      [&](auto& branch, auto& branch2) {
        branch.take_var(running_mean, running_var);
        branch2.take_var(running_mean2, running_var2);
      },
      [&](auto& gradients) { gradients.eval(sums); });
}

std::tuple<Tensor, Tensor> batch_norm_add_relu_backward_reduce(const Tensor& grad_output, const Tensor& input,
                                                               const MaybeTensor& weight, const MaybeTensor& bias,
                                                               const Tensor& mean, const Tensor& invstd,
                                                               const MaybeTensor& mask, bool relu,
                                                               std::optional<bool> channels_last) {
  check_backward(grad_output, input, weight, bias, mean, invstd);
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, 0);
    branch.take_invstd(mean, invstd);
    Gradients<T> g(grad_output, branch, nullptr, mask, relu);
    g.reduce();
    const ScalarType dtype = statistics_dtype(input.scalar_type());
    return std::tuple(vector_tensor(g.sums.grad.data(), branch.shape.channels, dtype),
                      vector_tensor(g.sums.xmu.data(), branch.shape.channels, dtype));
  });
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
  return dispatch(input.scalar_type(), [&]<typename T>() {
    Branch<T> branch(input, format_of(input, channels_last), weight, bias, 0);
    const Shape& shape = branch.shape;
    branch.take_invstd(mean, invstd);
    Gradients<T> g(grad_output, branch, nullptr, mask, relu);
    const Tensor grad_input = g.wanted(needs_input_grad, g.a.grad_input);
    const Tensor grad_residual = g.wanted(needs_residual_grad, g.a.grad_residual);
    const auto grads = values<Compute<T>>(mean_grad, shape.channels, 0);
    const auto xmus = values<Compute<T>>(mean_grad_xmu, shape.channels, 0);
    g.allocate_slopes();
    for (int64_t c = 0; c < shape.channels; ++c) g.set_slopes(c, grads[c], xmus[c], 0);
    g.decide_stream();
    g.apply();
    return std::tuple(grad_input, grad_residual);
  });
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("batch_norm_add_relu_train_backward", TORCH_BOX(&batch_norm_add_relu_train_backward));
  m.impl("batch_norm_add_relu_eval_backward", TORCH_BOX(&batch_norm_add_relu_eval_backward));
  m.impl("dual_batch_norm_add_relu_train_backward", TORCH_BOX(&dual_batch_norm_add_relu_train_backward));
  m.impl("dual_batch_norm_add_relu_eval_backward", TORCH_BOX(&dual_batch_norm_add_relu_eval_backward));
  m.impl("batch_norm_add_relu_backward_reduce", TORCH_BOX(&batch_norm_add_relu_backward_reduce));
  m.impl("batch_norm_add_relu_backward_apply", TORCH_BOX(&batch_norm_add_relu_backward_apply));
}

}  // namespace resnet_fused::cpu
