// The schemas of every operator, and nothing else. Each backend registers its kernels for these in a library of its own.
//
// Words used by all of them
//   input, residual   (N, C, *) tensors of one shape and dtype: float64, float32, bfloat16 or float16
//   weight, bias      (C,) of input's dtype or of the statistics' dtype; none stands for ones and zeros
//   mean, var, invstd (C,) statistics; var is the biased variance, invstd = 1 / sqrt(var + eps). Statistics are float64 for
//                     float64 input and float32 for every other
//   mask              packed bits, uint8 (outer, ceil(inner / 8)): bit i of byte j of a row says that the gradient passes at
//                     the row's element 8 j + i. A row is a pixel (inner = C) of a channels_last tensor or of one with a
//                     single position, and a plane (inner = H W) of any other. (0,) where the backward needs none
//   relu              whether the ReLU is part of the operator
//   save_mask         whether a backward will follow; without it no mask is written
//   channels_last     the memory format to work in: outputs and mask have it, and inputs of another one are copied to it. None for
//                     that of input (of grad_output in add_relu_backward). A graph gives it (ops/autograd.py), since its
//                     compiler may choose other strides for a tensor than it was traced with, and others in the backward than
//                     in the forward, while the mask of one is read by the other
//   needs_*_grad      which gradients to compute. One that is not asked for comes back with shape (0,)
//   grad_output2      a second gradient of the output, of grad_output's shape and dtype: what is differentiated is the sum of both,
//                     rounded to their dtype, which is read and not written
//
// All are functional but update_running_stats and the two operators with_update, which eager calls use: autograd knows nothing of
// them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(resnet_fused, m) {
  // Training: relu(batch_norm(input) + residual) with the batch's statistics.
  m.def(
      "batch_norm_add_relu_train(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu, "
      "bool save_mask, bool? channels_last=None) -> (Tensor output, Tensor mean, Tensor var, Tensor invstd, Tensor mask)");
  // The same and update_running_stats at once. saved_bias is a copy of bias where save_mask is given and no mask is needed, for
  // the backward then goes by it; else it has shape (0,).
  m.def(
      "batch_norm_add_relu_train_with_update(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, bool relu, bool save_mask) -> "
      "(Tensor output, Tensor mean, Tensor invstd, Tensor saved_bias, Tensor mask)");
  // Without a mask the ReLU's mask follows from input, weight and bias.
  m.def(
      "batch_norm_add_relu_train_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, Tensor? mask, bool relu, bool needs_input_grad, bool needs_residual_grad, bool needs_weight_grad, "
      "bool needs_bias_grad, Tensor? grad_output2=None, bool? channels_last=None) -> (Tensor grad_input, "
      "Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");

  // Training with a projection shortcut: relu(batch_norm(input) + batch_norm(input2)).
  m.def(
      "dual_batch_norm_add_relu_train(Tensor input, Tensor? weight, Tensor? bias, Tensor input2, Tensor? weight2, "
      "Tensor? bias2, float eps, float eps2, bool relu, bool save_mask, bool? channels_last=None) -> (Tensor output, "
      "Tensor mean, Tensor var, Tensor invstd, Tensor mean2, Tensor var2, Tensor invstd2, Tensor mask)");
  m.def(
      "dual_batch_norm_add_relu_train_with_update(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor input2, Tensor? weight2, Tensor? bias2, Tensor(c!)? running_mean2, "
      "Tensor(d!)? running_var2, float momentum, float momentum2, float eps, float eps2, bool relu, bool save_mask) -> "
      "(Tensor output, Tensor mean, Tensor invstd, Tensor mean2, Tensor invstd2, Tensor mask)");
  m.def(
      "dual_batch_norm_add_relu_train_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, "
      "Tensor input2, Tensor? weight2, Tensor mean2, Tensor invstd2, Tensor? mask, bool relu, bool needs_input_grad, "
      "bool needs_weight_grad, bool needs_bias_grad, bool needs_input2_grad, bool needs_weight2_grad, bool needs_bias2_grad, "
      "Tensor? grad_output2=None, bool? channels_last=None) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, "
      "Tensor grad_input2, Tensor grad_weight2, Tensor grad_bias2)");

  // Evaluation: the same with running statistics.
  m.def(
      "batch_norm_add_relu_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, "
      "Tensor running_var, float eps, bool relu, bool save_mask, bool? channels_last=None) -> (Tensor output, Tensor mask)");
  m.def(
      "batch_norm_add_relu_eval_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor running_mean, Tensor running_var, Tensor? mask, float eps, bool relu, bool needs_input_grad, "
      "bool needs_residual_grad, bool needs_weight_grad, bool needs_bias_grad, Tensor? grad_output2=None, "
      "bool? channels_last=None) -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "dual_batch_norm_add_relu_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor input2, Tensor? weight2, Tensor? bias2, Tensor running_mean2, Tensor running_var2, float eps, float eps2, "
      "bool relu, bool save_mask, bool? channels_last=None) -> (Tensor output, Tensor mask)");
  m.def(
      "dual_batch_norm_add_relu_eval_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor running_mean, "
      "Tensor running_var, Tensor input2, Tensor? weight2, Tensor running_mean2, Tensor running_var2, Tensor? mask, "
      "float eps, float eps2, bool relu, bool needs_input_grad, bool needs_weight_grad, bool needs_bias_grad, "
      "bool needs_input2_grad, bool needs_weight2_grad, bool needs_bias2_grad, Tensor? grad_output2=None, "
      "bool? channels_last=None) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_input2, "
      "Tensor grad_weight2, Tensor grad_bias2)");

  // relu(input + residual) for tensors of any shape; its mask has one row over the elements in memory order.
  m.def(
      "add_relu(Tensor input, Tensor residual, bool save_mask, bool? channels_last=None) -> (Tensor output, Tensor mask)");
  // The gradient of both operands; in the memory format that add_relu worked in.
  m.def("add_relu_backward(Tensor grad_output, Tensor mask, bool? channels_last=None) -> Tensor");

  // The pieces between whose reductions SyncBatchNorm communicates.
  m.def("batch_norm_statistics(Tensor input) -> (Tensor mean, Tensor var)");
  m.def(
      "batch_norm_add_relu_apply(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor invstd, "
      "bool relu, bool save_mask, bool? channels_last=None) -> (Tensor output, Tensor mask)");
  // Sums over N and positions of the gradient behind the ReLU, and of it times (input - mean).
  m.def(
      "batch_norm_add_relu_backward_reduce(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, Tensor? mask, bool relu, bool? channels_last=None) -> (Tensor sum_grad, Tensor sum_grad_xmu)");
  // The same sums divided by the count over all processes come back in.
  m.def(
      "batch_norm_add_relu_backward_apply(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, Tensor? mask, Tensor mean_grad, Tensor mean_grad_xmu, bool relu, bool needs_input_grad, "
      "bool needs_residual_grad, bool? channels_last=None) -> (Tensor grad_input, Tensor grad_residual)");

  // running = (1 - momentum) running + momentum batch, with the unbiased variance of count values a channel.
  m.def(
      "update_running_stats(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor mean, Tensor var, float momentum, "
      "SymInt count) -> ()");
}
