"""The operators in plain torch operations: the maths that every backend repeats.

It serves devices without kernels of their own, and is differentiable any number of times, so the autograd formulas
turn to it when a graph of the gradient is asked for. Signatures and results are those of ``csrc/ops.cpp``.

The formulas are those of Ioffe and Szegedy, Batch Normalization (2015), section 3, and their gradient.
"""

import torch
from torch import Tensor

from . import layout


def _channel(vector: Tensor | None, input: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A (C,) vector in a shape that broadcasts over ``input``."""
    return None if vector is None else vector.to(dtype).reshape(1, -1, *[1] * (input.dim() - 2))


def _over_channels(input: Tensor) -> list[int]:
    return [d for d in range(input.dim()) if d != 1]


def _normalize(input, weight, bias, mean, invstd):
    dtype = layout.statistics_dtype(input.dtype)
    output = (input.to(dtype) - _channel(mean, input, dtype)) * _channel(invstd, input, dtype)
    if weight is not None:
        output = output * _channel(weight, input, dtype)
    if bias is not None:
        output = output + _channel(bias, input, dtype)
    return output


def _rectify(value, like, relu, save_mask, channels_last):
    """Rounds to the dtype of ``like``, applies the ReLU and packs its mask where one is asked for."""
    output = layout.dense(value.to(like.dtype), like, channels_last)
    mask = output.new_empty(0, dtype=torch.uint8)
    if relu:
        output = output.relu()
        if save_mask:
            # Not "> 0": torch's ReLU lets the gradient pass where its result is NaN.
            mask = layout.pack(~(layout.rows(output.detach(), channels_last) <= 0))
    return output, mask


def _added(grad_output, grad_output2):
    """The gradient, or the sum of two of them, rounded to their dtype."""
    return grad_output if grad_output2 is None else grad_output + grad_output2


def _behind_relu(grad_output, input, keep):
    """The gradient before the ReLU, in the dtype of the statistics."""
    grad = grad_output.to(layout.statistics_dtype(input.dtype))
    return grad if keep is None else torch.where(keep, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


def _keep(mask, input, relu, weight, bias, mean, invstd, channels_last):
    """Where the gradient passes: from the mask if there is one, else from the forward made again."""
    if not relu:
        return None
    if mask is not None:
        in_rows = layout.channels_innermost(input, channels_last)
        inner = input.shape[1] if in_rows else input[0, 0].numel() if input.numel() else 0
        return layout.unrows(layout.unpack(mask, inner), input, channels_last)
    with torch.no_grad():
        return ~(_normalize(input, weight, bias, mean, invstd).to(input.dtype) <= 0)


def _sums(grad, input, mean):
    dtype = grad.dtype
    dims = _over_channels(input)
    return grad.sum(dims), (grad * (input.to(dtype) - _channel(mean, input, dtype))).sum(dims)


def _count(input: Tensor) -> int:
    return input.numel() // input.shape[1] if input.shape[1] else 0


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _affine_gradients(sum_grad, sum_grad_xmu, weight, bias, invstd, needs_weight_grad, needs_bias_grad):
    dtype = invstd.dtype
    grad_weight = (sum_grad_xmu * invstd).to(dtype if weight is None else weight.dtype) if needs_weight_grad else None
    grad_bias = sum_grad.to(dtype if bias is None else bias.dtype) if needs_bias_grad else None
    return _empty(invstd) if grad_weight is None else grad_weight, _empty(invstd) if grad_bias is None else grad_bias


def _input_gradient(grad, input, weight, mean, invstd, mean_grad, mean_grad_xmu, channels_last):
    dtype = grad.dtype
    xmu = input.to(dtype) - _channel(mean, input, dtype)
    slope = mean_grad_xmu * invstd * invstd
    scale = invstd if weight is None else invstd * weight.to(dtype)
    value = (grad - _channel(mean_grad, input, dtype) - xmu * _channel(slope, input, dtype)) * _channel(
        scale, input, dtype
    )
    return layout.dense(value.to(input.dtype), input, channels_last)


def _invstd(running_var, eps, input):
    return (running_var.to(layout.statistics_dtype(input.dtype)) + eps).rsqrt()


def batch_norm_statistics(input):
    dtype = layout.statistics_dtype(input.dtype)
    if input.numel() == 0:
        # Not the NaN of an empty mean: the gradients of weight and bias over an empty batch are zero.
        return tuple(input.new_zeros(input.shape[1], dtype=dtype) for _ in range(2))
    var, mean = torch.var_mean(input.to(dtype), _over_channels(input), correction=0)
    return mean, var


def batch_norm_add_relu_apply(input, weight, bias, residual, mean, invstd, relu, save_mask, channels_last=None):
    value = _normalize(input, weight, bias, mean, invstd)
    if residual is not None:
        value = value + residual.to(value.dtype)
    return _rectify(value, input, relu, save_mask and residual is not None, channels_last)


def batch_norm_add_relu_backward_reduce(grad_output, input, weight, bias, mean, invstd, mask, relu, channels_last=None):
    keep = _keep(mask, input, relu, weight, bias, mean, invstd, channels_last)
    return _sums(_behind_relu(grad_output, input, keep), input, mean)


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
    keep = _keep(mask, input, relu, weight, bias, mean, invstd, channels_last)
    grad = _behind_relu(grad_output, input, keep)
    grad_input = _empty(input)
    if needs_input_grad:
        grad_input = _input_gradient(grad, input, weight, mean, invstd, mean_grad, mean_grad_xmu, channels_last)
    if not needs_residual_grad:
        return grad_input, _empty(input)
    return grad_input, layout.dense(grad.to(input.dtype), input, channels_last).clone()


def batch_norm_add_relu_train(input, weight, bias, residual, eps, relu, save_mask, channels_last=None):
    mean, var = batch_norm_statistics(input)
    invstd = (var + eps).rsqrt()
    output, mask = batch_norm_add_relu_apply(
        input, weight, bias, residual, mean, invstd, relu, save_mask, channels_last
    )
    return output, mean, var, invstd, mask


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
    grad_output = _added(grad_output, grad_output2)
    sum_grad, sum_grad_xmu = batch_norm_add_relu_backward_reduce(
        grad_output, input, weight, bias, mean, invstd, mask, relu, channels_last
    )
    count = max(_count(input), 1)
    grad_input, grad_residual = batch_norm_add_relu_backward_apply(
        grad_output,
        input,
        weight,
        bias,
        mean,
        invstd,
        mask,
        sum_grad / count,
        sum_grad_xmu / count,
        relu,
        needs_input_grad,
        needs_residual_grad,
        channels_last,
    )
    affine = _affine_gradients(sum_grad, sum_grad_xmu, weight, bias, invstd, needs_weight_grad, needs_bias_grad)
    return grad_input, grad_residual, *affine


def batch_norm_add_relu_eval(
    input, weight, bias, residual, running_mean, running_var, eps, relu, save_mask, channels_last=None
):
    invstd = _invstd(running_var, eps, input)
    return batch_norm_add_relu_apply(
        input, weight, bias, residual, running_mean, invstd, relu, save_mask, channels_last
    )


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
    grad_output = _added(grad_output, grad_output2)
    invstd = _invstd(running_var, eps, input)
    zeros = torch.zeros_like(invstd)
    grad_input, grad_residual = batch_norm_add_relu_backward_apply(
        grad_output,
        input,
        weight,
        bias,
        running_mean,
        invstd,
        mask,
        zeros,
        zeros,
        relu,
        needs_input_grad,
        needs_residual_grad,
        channels_last,
    )
    sums = (None, None)
    if needs_weight_grad or needs_bias_grad:
        sums = batch_norm_add_relu_backward_reduce(
            grad_output, input, weight, bias, running_mean, invstd, mask, relu, channels_last
        )
    return (
        grad_input,
        grad_residual,
        *_affine_gradients(*sums, weight, bias, invstd, needs_weight_grad, needs_bias_grad),
    )


def _dual_apply(
    input, weight, bias, mean, invstd, input2, weight2, bias2, mean2, invstd2, relu, save_mask, channels_last
):
    value = _normalize(input, weight, bias, mean, invstd) + _normalize(input2, weight2, bias2, mean2, invstd2)
    return _rectify(value, input, relu, save_mask, channels_last)


def dual_batch_norm_add_relu_train(
    input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask, channels_last=None
):
    mean, var = batch_norm_statistics(input)
    mean2, var2 = batch_norm_statistics(input2)
    invstd, invstd2 = (var + eps).rsqrt(), (var2 + eps2).rsqrt()
    output, mask = _dual_apply(
        input, weight, bias, mean, invstd, input2, weight2, bias2, mean2, invstd2, relu, save_mask, channels_last
    )
    return output, mean, var, invstd, mean2, var2, invstd2, mask


def _format_of_both(input: Tensor, channels_last: bool | None) -> bool:
    """The second branch has the format of the first, as the mask has."""
    return layout.is_channels_last(input) if channels_last is None else channels_last


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
    grad_output = _added(grad_output, grad_output2)
    channels_last = _format_of_both(input, channels_last)
    branches = (
        (input, weight, mean, invstd, needs_input_grad, needs_weight_grad, needs_bias_grad),
        (input2, weight2, mean2, invstd2, needs_input2_grad, needs_weight2_grad, needs_bias2_grad),
    )
    gradients = []
    for branch, w, m, i, *needs in branches:
        # The bias has no part but its dtype, which is that of the weight.
        grad_input, _, *affine = batch_norm_add_relu_train_backward(
            grad_output, branch, w, w, m, i, mask, relu, needs[0], False, *needs[1:], None, channels_last
        )
        gradients += [grad_input, *affine]
    return tuple(gradients)


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
    invstd, invstd2 = _invstd(running_var, eps, input), _invstd(running_var2, eps2, input2)
    return _dual_apply(
        input,
        weight,
        bias,
        running_mean,
        invstd,
        input2,
        weight2,
        bias2,
        running_mean2,
        invstd2,
        relu,
        save_mask,
        channels_last,
    )


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
    needs_input_grad,
    needs_weight_grad,
    needs_bias_grad,
    needs_input2_grad,
    needs_weight2_grad,
    needs_bias2_grad,
    grad_output2=None,
    channels_last=None,
):
    grad_output = _added(grad_output, grad_output2)
    channels_last = _format_of_both(input, channels_last)
    branches = (
        (input, weight, running_mean, running_var, eps, needs_input_grad, needs_weight_grad, needs_bias_grad),
        (input2, weight2, running_mean2, running_var2, eps2, needs_input2_grad, needs_weight2_grad, needs_bias2_grad),
    )
    gradients = []
    for branch, w, m, v, e, *needs in branches:
        grad_input, _, *affine = batch_norm_add_relu_eval_backward(
            grad_output, branch, w, w, m, v, mask, e, relu, needs[0], False, *needs[1:], None, channels_last
        )
        gradients += [grad_input, *affine]
    return tuple(gradients)


def add_relu(input, residual, save_mask, channels_last=None):
    output = layout.dense((input + residual).relu(), input, channels_last)
    mask = output.new_empty(0, dtype=torch.uint8)
    if save_mask:
        mask = layout.pack(~(layout.flat(output.detach(), channels_last) <= 0))
    return output, mask


def add_relu_backward(grad_output, mask, channels_last=None):
    keep = layout.unflat(layout.unpack(mask, grad_output.numel()), grad_output, channels_last)
    grad_output = layout.dense(grad_output, grad_output, channels_last)
    return torch.where(keep, grad_output, torch.zeros((), dtype=grad_output.dtype, device=grad_output.device))


def update_running_stats(running_mean, running_var, mean, var, momentum, count):
    # torch leaves the running statistics alone where the batch is empty.
    if count == 0:
        return
    unbiased = var * (count / (count - 1)) if count != 1 else var * float("nan")
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            dtype = torch.promote_types(running.dtype, batch.dtype)
            running.copy_((1 - momentum) * running.to(dtype) + momentum * batch)


def batch_norm_add_relu_train_with_update(
    input, weight, bias, residual, running_mean, running_var, momentum, eps, relu, save_mask
):
    output, mean, var, invstd, mask = batch_norm_add_relu_train(input, weight, bias, residual, eps, relu, save_mask)
    update_running_stats(running_mean, running_var, mean, var, momentum, _count(input))
    return output, mean, invstd, saved_bias(input, bias, residual, relu, save_mask), mask


def saved_bias(input, bias, residual, relu, save_mask):
    """A copy of the bias where the backward goes by it, for whoever trains on may step the bias before."""
    if bias is None or not save_mask or (relu and residual is not None):
        return input.new_empty(0, dtype=layout.statistics_dtype(input.dtype) if bias is None else bias.dtype)
    return bias.detach().clone()


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
    output, mean, var, invstd, mean2, var2, invstd2, mask = dual_batch_norm_add_relu_train(
        input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask
    )
    update_running_stats(running_mean, running_var, mean, var, momentum, _count(input))
    update_running_stats(running_mean2, running_var2, mean2, var2, momentum2, _count(input2))
    return output, mean, invstd, mean2, invstd2, mask
