"""Fake kernels: shapes, dtypes and strides of every operator's results, without data."""

import torch
from torch import Tensor

from . import checks, layout, library, reference


def _like(input: Tensor, channels_last: bool | None) -> Tensor:
    return torch.empty_like(input, memory_format=layout.format_of(input, channels_last))


def _or_empty(wanted: bool, input: Tensor, channels_last: bool | None) -> Tensor:
    return _like(input, channels_last) if wanted else input.new_empty(0)


def _statistic(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=layout.statistics_dtype(input.dtype))


def _mask(wanted: bool, input: Tensor, channels_last: bool | None) -> Tensor:
    return input.new_empty(layout.mask_shape(input, channels_last) if wanted else 0, dtype=torch.uint8)


def _output_and_mask(input: Tensor, save_mask: bool, channels_last: bool | None) -> tuple[Tensor, Tensor]:
    return _like(input, channels_last), _mask(save_mask, input, channels_last)


def _affine(wanted: bool, vector: Tensor | None, input: Tensor) -> Tensor:
    statistic = _statistic(input)
    if not wanted:
        return statistic.new_empty(0)
    return statistic if vector is None else torch.empty_like(vector, memory_format=torch.contiguous_format)


def batch_norm_statistics(input):
    checks.input_tensor(input)
    return _statistic(input), _statistic(input)


def batch_norm_add_relu_apply(input, weight, bias, residual, mean, invstd, relu, save_mask, channels_last=None):
    checks.batch_norm(input, weight, bias, residual)
    checks.per_channel(mean, "mean", input)
    checks.per_channel(invstd, "invstd", input)
    return _output_and_mask(input, relu and save_mask and residual is not None, channels_last)


def _check_backward(grad_output, input, weight, bias, mean, mask, channels_last, grad_output2=None):
    checks.batch_norm(input, weight, bias)
    checks.same_shape(grad_output, "grad_output", input)
    checks.same_shape(grad_output2, "grad_output2", input)
    checks.per_channel(mean, "mean", input)
    if mask is not None:
        checks.mask(mask, layout.mask_shape(input, channels_last))


def batch_norm_add_relu_backward_reduce(grad_output, input, weight, bias, mean, invstd, mask, relu, channels_last=None):
    _check_backward(grad_output, input, weight, bias, mean, mask, channels_last)
    return _statistic(input), _statistic(input)


def batch_norm_add_relu_backward_apply(
    grad_output,
    input,
    weight,
    bias,
    mean,
    invstd,
    mask,
    mean_grad,
    mean_grad_xmu,
    relu,
    needs_input_grad,
    needs_residual_grad,
    channels_last=None,
):
    _check_backward(grad_output, input, weight, bias, mean, mask, channels_last)
    return _or_empty(needs_input_grad, input, channels_last), _or_empty(needs_residual_grad, input, channels_last)


def batch_norm_add_relu_train(input, weight, bias, residual, eps, relu, save_mask, channels_last=None):
    library.note_distributed()  # a graph that was traced calls the operator without Python
    checks.batch_norm(input, weight, bias, residual)
    output, mask = _output_and_mask(input, relu and save_mask and residual is not None, channels_last)
    return output, _statistic(input), _statistic(input), _statistic(input), mask


def batch_norm_add_relu_train_backward(
    grad_output,
    input,
    weight,
    bias,
    mean,
    invstd,
    mask,
    relu,
    needs_input_grad,
    needs_residual_grad,
    needs_weight_grad,
    needs_bias_grad,
    grad_output2=None,
    channels_last=None,
):
    _check_backward(grad_output, input, weight, bias, mean, mask, channels_last, grad_output2)
    return (
        _or_empty(needs_input_grad, input, channels_last),
        _or_empty(needs_residual_grad, input, channels_last),
        _affine(needs_weight_grad, weight, input),
        _affine(needs_bias_grad, bias, input),
    )


def batch_norm_add_relu_eval(
    input, weight, bias, residual, running_mean, running_var, eps, relu, save_mask, channels_last=None
):
    checks.batch_norm(input, weight, bias, residual)
    checks.per_channel(running_mean, "running_mean", input)
    checks.per_channel(running_var, "running_var", input)
    checks.one_dtype(weight, bias, running_mean, running_var)
    return _output_and_mask(input, relu and save_mask and residual is not None, channels_last)


def batch_norm_add_relu_eval_backward(
    grad_output,
    input,
    weight,
    bias,
    running_mean,
    running_var,
    mask,
    eps,
    relu,
    needs_input_grad,
    needs_residual_grad,
    needs_weight_grad,
    needs_bias_grad,
    grad_output2=None,
    channels_last=None,
):
    return batch_norm_add_relu_train_backward(
        grad_output,
        input,
        weight,
        bias,
        running_mean,
        running_var,
        mask,
        relu,
        needs_input_grad,
        needs_residual_grad,
        needs_weight_grad,
        needs_bias_grad,
        grad_output2,
        channels_last,
    )


def _check_dual(input, weight, bias, input2, weight2, bias2):
    checks.batch_norm(input, weight, bias)
    checks.same_shape(input2, "input2", input)
    checks.per_channel(weight2, "weight2", input)
    checks.per_channel(bias2, "bias2", input)


def dual_batch_norm_add_relu_train(
    input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask, channels_last=None
):
    _check_dual(input, weight, bias, input2, weight2, bias2)
    output, mask = _output_and_mask(input, relu and save_mask, channels_last)
    return output, *[_statistic(input) for _ in range(6)], mask


def dual_batch_norm_add_relu_train_backward(
    grad_output,
    input,
    weight,
    mean,
    invstd,
    input2,
    weight2,
    mean2,
    invstd2,
    mask,
    relu,
    needs_input_grad,
    needs_weight_grad,
    needs_bias_grad,
    needs_input2_grad,
    needs_weight2_grad,
    needs_bias2_grad,
    grad_output2=None,
    channels_last=None,
):
    _check_dual(input, weight, None, input2, weight2, None)
    _check_backward(grad_output, input, weight, None, mean, mask, channels_last, grad_output2)
    return (
        _or_empty(needs_input_grad, input, channels_last),
        _affine(needs_weight_grad, weight, input),
        _affine(needs_bias_grad, weight, input),
        _or_empty(needs_input2_grad, input, channels_last),
        _affine(needs_weight2_grad, weight2, input),
        _affine(needs_bias2_grad, weight2, input),
    )


def dual_batch_norm_add_relu_eval(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    input2,
    weight2,
    bias2,
    running_mean2,
    running_var2,
    eps,
    eps2,
    relu,
    save_mask,
    channels_last=None,
):
    _check_dual(input, weight, bias, input2, weight2, bias2)
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("running_mean2", running_mean2),
        ("running_var2", running_var2),
    ):
        checks.per_channel(vector, name, input)
    checks.one_dtype(weight, bias, running_mean, running_var)
    checks.one_dtype(weight2, bias2, running_mean2, running_var2)
    return _output_and_mask(input, relu and save_mask, channels_last)


def dual_batch_norm_add_relu_eval_backward(
    grad_output,
    input,
    weight,
    running_mean,
    running_var,
    input2,
    weight2,
    running_mean2,
    running_var2,
    mask,
    eps,
    eps2,
    relu,
    *needs_and_more,
):
    return dual_batch_norm_add_relu_train_backward(
        grad_output,
        input,
        weight,
        running_mean,
        running_var,
        input2,
        weight2,
        running_mean2,
        running_var2,
        mask,
        relu,
        *needs_and_more,
    )


def add_relu(input, residual, save_mask, channels_last=None):
    checks.tensor(input, "input")
    checks.same_shape(residual, "residual", input)
    mask = input.new_empty((1, (input.numel() + 7) // 8) if save_mask else 0, dtype=torch.uint8)
    return _like(input, channels_last), mask


def add_relu_backward(grad_output, mask, channels_last=None):
    checks.tensor(grad_output, "grad_output")
    checks.mask(mask, (1, (grad_output.numel() + 7) // 8))
    return _like(grad_output, channels_last)


def update_running_stats(running_mean, running_var, mean, var, momentum, count):
    checks.running_update(running_mean, running_var, mean, var)


def _check_running(input, **vectors):
    for name, vector in vectors.items():
        checks.per_channel(vector, name, input)


def batch_norm_add_relu_train_with_update(
    input, weight, bias, residual, running_mean, running_var, momentum, eps, relu, save_mask
):
    _check_running(input, running_mean=running_mean, running_var=running_var)
    checks.one_dtype(weight, bias, running_mean, running_var)
    checks.more_than_one_value(input)
    output, mean, _, invstd, mask = batch_norm_add_relu_train(input, weight, bias, residual, eps, relu, save_mask)
    return output, mean, invstd, reference.saved_bias(input, bias, residual, relu, save_mask), mask


def dual_batch_norm_add_relu_train_with_update(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    input2,
    weight2,
    bias2,
    running_mean2,
    running_var2,
    momentum,
    momentum2,
    eps,
    eps2,
    relu,
    save_mask,
):
    _check_running(input, running_mean=running_mean, running_var=running_var)
    _check_running(input, running_mean2=running_mean2, running_var2=running_var2)
    checks.one_dtype(weight, bias, running_mean, running_var)
    checks.one_dtype(weight2, bias2, running_mean2, running_var2)
    checks.more_than_one_value(input)
    output, mean, _, invstd, mean2, _, invstd2, mask = dual_batch_norm_add_relu_train(
        input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask
    )
    return output, mean, invstd, mean2, invstd2, mask


OPERATORS = tuple(
    name for name, member in list(vars().items()) if getattr(member, "__module__", "") == __name__ and name[0] != "_"
)
