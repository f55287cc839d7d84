"""Fake kernels: shapes, dtypes and strides of every operator's results, without data."""

import torch
from torch import Tensor

from . import checks, layout


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=layout.suggest_memory_format(input))


def _or_empty(wanted: bool, input: Tensor) -> Tensor:
    return _like(input) if wanted else input.new_empty(0)


def _statistic(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=layout.statistics_dtype(input.dtype))


def _mask(wanted: bool, input: Tensor) -> Tensor:
    return input.new_empty(layout.mask_shape(input) if wanted else 0, dtype=torch.uint8)


def _affine(wanted: bool, vector: Tensor | None, input: Tensor) -> Tensor:
    statistic = _statistic(input)
    if not wanted:
        return statistic.new_empty(0)
    return statistic if vector is None else torch.empty_like(vector, memory_format=torch.contiguous_format)


def batch_norm_statistics(input):
    checks.input_tensor(input)
    return _statistic(input), _statistic(input)


def batch_norm_add_relu_apply(input, weight, bias, residual, mean, invstd, relu, save_mask):
    checks.batch_norm(input, weight, bias, residual)
    checks.per_channel(mean, "mean", input)
    checks.per_channel(invstd, "invstd", input)
    return _like(input), _mask(relu and save_mask and residual is not None, input)


def _check_backward(grad_output, input, weight, bias, mean, mask, grad_output2=None):
    checks.batch_norm(input, weight, bias)
    checks.same_shape(grad_output, "grad_output", input)
    checks.same_shape(grad_output2, "grad_output2", input)
    checks.per_channel(mean, "mean", input)
    if mask is not None:
        checks.mask(mask, layout.mask_shape(input))


def batch_norm_add_relu_backward_reduce(grad_output, input, weight, bias, mean, invstd, mask, relu):
    _check_backward(grad_output, input, weight, bias, mean, mask)
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
):
    _check_backward(grad_output, input, weight, bias, mean, mask)
    return _or_empty(needs_input_grad, input), _or_empty(needs_residual_grad, input)


def batch_norm_add_relu_train(input, weight, bias, residual, eps, relu, save_mask):
    checks.batch_norm(input, weight, bias, residual)
    mask = _mask(relu and save_mask and residual is not None, input)
    return _like(input), _statistic(input), _statistic(input), _statistic(input), mask


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
):
    _check_backward(grad_output, input, weight, bias, mean, mask, grad_output2)
    return (
        _or_empty(needs_input_grad, input),
        _or_empty(needs_residual_grad, input),
        _affine(needs_weight_grad, weight, input),
        _affine(needs_bias_grad, bias, input),
    )


def batch_norm_add_relu_eval(input, weight, bias, residual, running_mean, running_var, eps, relu, save_mask):
    checks.batch_norm(input, weight, bias, residual)
    checks.per_channel(running_mean, "running_mean", input)
    checks.per_channel(running_var, "running_var", input)
    checks.one_dtype(weight, bias, running_mean, running_var)
    return _like(input), _mask(relu and save_mask and residual is not None, input)


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
    )


def _check_dual(input, weight, bias, input2, weight2, bias2):
    checks.batch_norm(input, weight, bias)
    checks.same_shape(input2, "input2", input)
    checks.per_channel(weight2, "weight2", input)
    checks.per_channel(bias2, "bias2", input)


def dual_batch_norm_add_relu_train(input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask):
    _check_dual(input, weight, bias, input2, weight2, bias2)
    return _like(input), *[_statistic(input) for _ in range(6)], _mask(relu and save_mask, input)


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
):
    _check_dual(input, weight, None, input2, weight2, None)
    _check_backward(grad_output, input, weight, None, mean, mask, grad_output2)
    return (
        _or_empty(needs_input_grad, input),
        _affine(needs_weight_grad, weight, input),
        _affine(needs_bias_grad, weight, input),
        _or_empty(needs_input2_grad, input),
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
    return _like(input), _mask(relu and save_mask, input)


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
    *needs_and_grad_output2,
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
        *needs_and_grad_output2,
    )


def add_relu(input, residual, save_mask):
    torch._check(
        input.dtype in checks.DTYPES,
        lambda: f"input must be float64, float32, bfloat16 or float16, got {input.dtype}",
    )
    checks.same_shape(residual, "residual", input)
    mask = input.new_empty((1, (input.numel() + 7) // 8) if save_mask else 0, dtype=torch.uint8)
    return _like(input), mask


def add_relu_backward(grad_output, mask):
    checks.mask(mask, (1, (grad_output.numel() + 7) // 8))
    return _like(grad_output)


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
    return output, mean, invstd, mask


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
