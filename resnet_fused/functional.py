"""Functional forms of the fused operators, in the manner of :mod:`torch.nn.functional`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import autograd, backend, checks

_OPS = torch.ops.resnet_fused
_NUMBERS = (int, float, torch.SymFloat)


def batch_norm_add_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(input) + residual) in one operator; the arguments are those of :func:`torch.nn.functional.batch_norm`.

    Args:
        input: (N, C, *), float64, float32, bfloat16 or float16, in any layout. The result has its memory format.
        running_mean, running_var: (C,), updated in place where ``training``; both may be None there.
        weight, bias: (C,) or None.
        residual: None, or a tensor of the shape of ``input``; it is not broadcast.
        training: normalize with the statistics of the batch (True) or with the running ones (False).
        momentum: the share of the batch in the running statistics.
        eps: added to the variance.
        relu: whether to apply the ReLU.

    Raises:
        ValueError: one value a channel where ``training``, or an ``eps`` that torch refuses.
        TypeError: an argument that is no tensor or no number.
        RuntimeError: shapes, dtypes or devices that do not fit (NotImplementedError, its subclass, for a dtype that
            torch has no kernels for).

        Nothing has been written then.
    """
    if residual is not None:
        _check_residual(residual, "residual", input, relu)
    if training:
        F._verify_batch_size(input.size())
    if not _fusible(input, weight, bias, running_mean, running_var, training, momentum, eps):
        checks.unfused_batch_norm(input, running_mean, running_var, weight, bias)
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return _add_relu_unfused(output, residual, relu)
    if residual is not None and residual.dtype != input.dtype:
        # torch adds in the wider dtype, after it rounded the normalized value to the narrower one.
        output = batch_norm_add_relu(
            input, running_mean, running_var, weight, bias, None, training, momentum, eps, relu=False
        )
        return _add_relu_unfused(output, residual, relu)

    save = torch.is_grad_enabled() and _requires_grad(input, weight, bias, residual)
    if not training:
        arguments = (input, weight, bias, residual, running_mean, running_var, eps, relu, save)
        return _call("batch_norm_add_relu_eval", save, arguments)[0]
    output, mean, var, _, _ = _call("batch_norm_add_relu_train", save, (input, weight, bias, residual, eps, relu, save))
    _update_running_stats(running_mean, running_var, mean, var, momentum, input)
    return output


def dual_batch_norm_add_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    input2: Tensor,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    momentum2: float = 0.1,
    eps2: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(input) + batch_norm(input2)) in one operator: a block's end with a projection shortcut.

    Each branch has the arguments of :func:`batch_norm_add_relu`; ``input2`` has the shape of ``input``, and the result has the
    memory format of ``input``. Raises as :func:`batch_norm_add_relu` does.
    """
    _check_residual(input2, "input2", input, relu)
    if training:
        F._verify_batch_size(input.size())
    if (
        not _fusible(input, weight, bias, running_mean, running_var, training, momentum, eps)
        or not _fusible(input2, weight2, bias2, running_mean2, running_var2, training, momentum2, eps2)
        or input.dtype != input2.dtype
    ):
        # All of the first branch is checked before the second writes its running statistics.
        checks.unfused_batch_norm(input2, running_mean2, running_var2, weight2, bias2, suffix="2")
        checks.unfused_batch_norm(input, running_mean, running_var, weight, bias)
        checks.unfused_batch_norm_options(running_mean, running_var, weight, bias, training, momentum, eps)
        shortcut = F.batch_norm(input2, running_mean2, running_var2, weight2, bias2, training, momentum2, eps2)
        return batch_norm_add_relu(
            input, running_mean, running_var, weight, bias, shortcut, training, momentum, eps, relu
        )

    save = torch.is_grad_enabled() and (_requires_grad(input, weight, bias, input2) or _requires_grad(weight2, bias2))
    if not training:
        arguments = (input, weight, bias, running_mean, running_var)
        arguments += (input2, weight2, bias2, running_mean2, running_var2, eps, eps2, relu, save)
        return _call("dual_batch_norm_add_relu_eval", save, arguments)[0]
    arguments = (input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save)
    output, mean, var, _, mean2, var2, _, _ = _call("dual_batch_norm_add_relu_train", save, arguments)
    _update_running_stats(running_mean, running_var, mean, var, momentum, input)
    _update_running_stats(running_mean2, running_var2, mean2, var2, momentum2, input2)
    return output


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """relu(input + residual) in one operator, which keeps one bit an element for its backward.

    Args:
        input: a tensor of any shape; the result has its memory format.
        residual: a tensor of the shape of ``input``; it is not broadcast.

    Raises:
        TypeError: ``residual`` is no tensor.
        RuntimeError: shapes or devices that do not fit.
    """
    _check_residual(residual, "residual", input, True)
    if input.dtype != residual.dtype or not backend.is_fused(input):
        return _add_relu_unfused(input, residual, True)
    save = torch.is_grad_enabled() and _requires_grad(input, residual)
    return _call("add_relu", save, (input, residual, save))[0]


def in_recomputation() -> bool:
    """Whether this forward runs inside a backward, as activation checkpointing does to make activations again.

    Running statistics must not be updated there: the batch has been counted when the forward ran first.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _call(name: str, save: bool, arguments: tuple):
    if torch.compiler.is_compiling():
        return getattr(_OPS, name)(*arguments)
    if save:
        return autograd.FUNCTIONS[name].apply(*arguments)
    with autograd.below_autograd():
        return getattr(_OPS, name).default(*arguments)


def _update_running_stats(running_mean, running_var, mean, var, momentum, input) -> None:
    if (running_mean is None and running_var is None) or in_recomputation():
        return
    count = input.numel() // input.shape[1] if input.shape[1] else 0
    _OPS.update_running_stats.default(running_mean, running_var, mean, var, momentum, count)


def _add_relu_unfused(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        output = output + residual
    return F.relu(output) if relu else output


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _fusible(input: Tensor, weight, bias, running_mean, running_var, training: bool, momentum, eps) -> bool:
    """Whether the fused operator serves these; where not, torch's own operations do, or raise their own errors."""
    if not isinstance(input, Tensor) or not backend.is_fused(input) or input.dim() < 2:
        return False
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return False
    if not isinstance(momentum, _NUMBERS) or not eps > 0:
        return False
    dtype, channels = None, input.shape[1]
    for vector in (weight, bias, running_mean, running_var):
        if vector is None:
            continue
        if not isinstance(vector, Tensor) or vector.layout is not torch.strided:
            return False
        if dtype is None:
            dtype = vector.dtype
            if dtype != input.dtype and (dtype != torch.float32 or input.dtype == torch.float64):
                return False
        if vector.dtype != dtype or vector.device != input.device or vector.dim() != 1 or vector.shape[0] != channels:
            return False
    return not (torch.is_grad_enabled() and _requires_grad(running_mean, running_var))


def _check_residual(residual: Tensor, name: str, input: Tensor, relu: bool) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(residual).__name__}")
    if not isinstance(input, Tensor):
        return
    if residual.shape != input.shape:
        raise RuntimeError(
            f"{name} must have the shape of input (it is not broadcast), "
            f"got {list(residual.shape)} and {list(input.shape)}"
        )
    if residual.device != input.device:
        raise RuntimeError(f"{name} must be on the device of input, got {residual.device} and {input.device}")
    if residual.layout != input.layout:
        raise RuntimeError(f"{name} must have the layout of input, got {residual.layout} and {input.layout}")
    if residual.dtype != input.dtype:
        checks.promotes(residual, name, input, relu)
