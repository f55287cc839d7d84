"""Functional forms of the fused operators, in the manner of :mod:`torch.nn.functional`."""

import sys

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from .ops import autograd, backend, checks, recomputation
from .ops.torch_private import NO_TASK, graph_task

_OPS = torch.ops.resnet_fused
# Without gradients: the operators themselves, looked up once.
_OPERATORS = {name: getattr(_OPS, name).default for name in autograd.FUNCTIONS}
_NUMBERS = (float, int, torch.SymFloat)
_CHECKPOINT = torch.utils.checkpoint.CheckpointFunction.backward.__code__.co_filename


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
    """relu(batch_norm(input) + residual) in one operator.

    The arguments and their order are those of :func:`torch.nn.functional.batch_norm`, with two more.

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
        TypeError, AttributeError: an argument that is no tensor or no number, as from ``F.batch_norm``.
        RuntimeError: shapes, dtypes or devices that do not fit (NotImplementedError, its subclass, for a dtype that
            torch has no kernels for).

        Nothing has been written then.
    """
    if _eligible(input, residual, running_mean, running_var, training, momentum, eps) and (
        not torch.compiler.is_compiling() or _fit_a_graph(training, (input, weight, bias, running_mean, running_var))
    ):
        try:
            save = torch.is_grad_enabled() and _requires_grad(input, weight, bias, residual)
            if not training:
                return _call(
                    "batch_norm_add_relu_eval",
                    save,
                    (input, weight, bias, residual, running_mean, running_var, eps, relu, save),
                )
            tensors, settings = (input, weight, bias, residual), (eps, relu, save)
            running = (running_mean, running_var, momentum)
            return _call_training("batch_norm_add_relu_train", save, tensors, settings, running)
        except (RuntimeError, TypeError, AttributeError):
            # The operator refuses before it writes. What it refuses torch may accept, or refuse in its own way.
            if (
                input.dim() <= checks.MAX_DIMS
                and _fits(residual, input)
                and _vectors_fit(input, weight, bias, running_mean, running_var)
                and not _is_single_value(input, training)
            ):
                raise
    if training:
        F._verify_batch_size(input.size())
    if residual is not None and isinstance(input, Tensor):
        _check_residual(residual, "residual", input, relu)
        if residual.dtype != input.dtype and backend.is_fused(input):
            # torch adds in the wider dtype, after it rounded the normalized value to the narrower one.
            output = batch_norm_add_relu(
                input, running_mean, running_var, weight, bias, None, training, momentum, eps, relu=False
            )
            return _add_relu_unfused(output, residual, relu)
    checks.unfused_batch_norm(input, running_mean, running_var, weight, bias)
    running_mean, running_var = _updated_once(training, running_mean, running_var)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _add_relu_unfused(output, residual, relu)


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

    Each branch has the arguments of :func:`batch_norm_add_relu`; ``input2`` has the shape of ``input``, and the
    result has the memory format of ``input``. Raises as :func:`batch_norm_add_relu` does.
    """
    branch = (input, weight, bias, running_mean, running_var)
    branch2 = (input2, weight2, bias2, running_mean2, running_var2)
    if (
        _eligible(input, input2, running_mean, running_var, training, momentum, eps)
        and _eligible(input2, None, running_mean2, running_var2, training, momentum2, eps2)
        and (not torch.compiler.is_compiling() or _fit_a_graph(training, branch, branch2))
    ):
        try:
            save = torch.is_grad_enabled() and (
                _requires_grad(input, weight, bias, input2) or _requires_grad(weight2, bias2)
            )
            if not training:
                return _call("dual_batch_norm_add_relu_eval", save, (*branch, *branch2, eps, eps2, relu, save))
            tensors, settings = (input, weight, bias, input2, weight2, bias2), (eps, eps2, relu, save)
            running = (running_mean, running_var, momentum, running_mean2, running_var2, momentum2)
            return _call_training("dual_batch_norm_add_relu_train", save, tensors, settings, running)
        except (RuntimeError, TypeError, AttributeError):
            fit = _fits(input2, input) and _vectors_fit(*branch) and _vectors_fit(*branch2)
            if fit and not _is_single_value(input, training):
                raise
    if training:
        F._verify_batch_size(input.size())
    check_branches(branch, branch2, relu)
    checks.unfused_batch_norm_options(running_mean, running_var, weight, bias, training, momentum, eps)
    running_mean2, running_var2 = _updated_once(training, running_mean2, running_var2)
    shortcut = F.batch_norm(input2, running_mean2, running_var2, weight2, bias2, training, momentum2, eps2)
    return batch_norm_add_relu(input, running_mean, running_var, weight, bias, shortcut, training, momentum, eps, relu)


def check_branches(branch: tuple, branch2: tuple, relu: bool) -> None:
    """Refuses what either of two branches would, before the one that runs first writes its running statistics.

    A branch: input, weight, bias, running mean and running variance.
    """
    _check_residual(branch2[0], "input2", branch[0], relu)
    for (input, weight, bias, running_mean, running_var), suffix in ((branch2, "2"), (branch, "")):
        checks.unfused_batch_norm(input, running_mean, running_var, weight, bias, suffix=suffix)


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """relu(input + residual) in one operator, which keeps one bit an element for its backward.

    Args:
        input: a tensor of any shape; the result has its memory format.
        residual: a tensor of the shape of ``input``; it is not broadcast.

    Raises:
        TypeError: ``input`` or ``residual`` is no tensor.
        RuntimeError: shapes or devices that do not fit.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    _check_residual(residual, "residual", input, True)
    if input.dtype != residual.dtype or not backend.is_fused(input) or input.dim() > checks.MAX_DIMS:
        return _add_relu_unfused(input, residual, True)
    save = torch.is_grad_enabled() and _requires_grad(input, residual)
    return _call("add_relu", save, (input, residual, save))


def max_pool2d(input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode: bool = False) -> Tensor:
    """:func:`torch.nn.functional.max_pool2d` that keeps its indices in half the bytes, and not its input.

    The gradient is torch's, ties included. Inside :class:`resnet_fused.recompute` it keeps its input and no indices,
    and not even that where a fused operator made it: the backward looks for the maxima again, in what the input is
    then. It is refused if it was changed in place, but a change through ``.data`` is not noticed.

    Args:
        input: (N, C, H, W) or (C, H, W). The others are those of :func:`torch.nn.functional.max_pool2d`, whose errors
            are raised.
    """
    arguments = (kernel_size, stride, padding, dilation, ceil_mode)
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or not isinstance(input, Tensor)
        or not input.requires_grad
        or not backend.is_fused(input)
    ):
        return F.max_pool2d(input, *arguments)
    return autograd.MaxPool2d.apply(input, arguments, recomputation.is_on())


def in_recomputation() -> bool:
    """Whether ``torch.utils.checkpoint`` runs this forward, inside a backward, to make activations again.

    Running statistics must not be updated there: the batch has been counted when the forward ran first. Any other
    forward inside a backward, of a hook or of a network trained there, counts.
    """
    if torch.compiler.is_compiling() or graph_task() == NO_TASK:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def _call(name: str, save: bool, arguments: tuple) -> Tensor:
    if torch.compiler.is_compiling():
        return getattr(_OPS, name).default(*arguments)[0]
    if save:
        return autograd.FUNCTIONS[name].apply(*arguments)
    with autograd.below_autograd():
        return _OPERATORS[name](*arguments)[0]


def _call_training(name: str, save: bool, tensors: tuple, settings: tuple, running: tuple) -> Tensor:
    """``running``: running mean, running variance and momentum, of each branch."""
    if torch.compiler.is_compiling():
        # A graph takes the functional operator, whose gradient it knows, and the update beside it.
        output, *statistics = getattr(_OPS, name).default(*tensors, *settings)
        count = output.numel() // output.shape[1] if output.shape[1] else 0
        for i in range(0, len(running), 3):
            mean, var, momentum = running[i : i + 3]
            _OPS.update_running_stats.default(mean, var, *statistics[i : i + 2], momentum, count)
        return output
    if graph_task() != NO_TASK and in_recomputation():
        running = tuple(None if isinstance(value, Tensor) else value for value in running)
    if save:
        return autograd.FUNCTIONS_WITH_UPDATE[name].apply(*tensors, (*settings, *running))
    return autograd.WITH_UPDATE[name](None, *tensors, (*settings, *running))


def _updated_once(training: bool, *running: Tensor | None) -> tuple[Tensor | None, ...]:
    """Copies in a recomputation: they take the second update where torch's own operation runs."""
    if not training or not in_recomputation():
        return running
    return tuple(None if statistic is None else statistic.clone() for statistic in running)


def _add_relu_unfused(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        output = output + residual
    return F.relu(output) if relu else output


def _is_single_value(input: Tensor, training: bool) -> bool:
    """Whether a channel has one value, of which torch makes no statistics."""
    return training and input.numel() == input.shape[1]


def _fits(residual: Tensor | None, input: Tensor) -> bool:
    """Whether ``residual`` is none or what the fused operator takes, for an input that it takes."""
    return input.dim() <= checks.MAX_DIMS and (
        residual is None
        or (
            isinstance(residual, Tensor)
            and residual.shape == input.shape
            and residual.dtype == input.dtype
            and residual.device == input.device
        )
    )


def _requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110  (any() takes three times as long)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _eligible(input, residual, running_mean, running_var, training: bool, momentum, eps) -> bool:
    """Whether the fused operator may be tried: what it cannot see by itself is as it needs it."""
    if (
        not isinstance(input, Tensor)
        or not backend.is_fused(input)
        or not isinstance(momentum, _NUMBERS)
        or not eps > 0
    ):
        return False
    if residual is not None and not (isinstance(residual, Tensor) and residual.layout is torch.strided):
        return False
    if not isinstance(running_mean, Tensor) or not isinstance(running_var, Tensor):
        return running_mean is None and running_var is None and training
    return not ((running_mean.requires_grad or running_var.requires_grad) and torch.is_grad_enabled())


def _fit_a_graph(training: bool, *branches: tuple) -> bool:
    """Whether the fused operators take a call that is being compiled.

    They refuse as the graph runs, or never, what they would refuse at once in eager: a graph has the update of running
    statistics in an operator of its own, which does not know the input.
    """
    return all(
        _vectors_fit(*branch) and not _is_single_value(branch[0], training) and branch[0].dim() <= checks.MAX_DIMS
        for branch in branches
    )


def _vectors_fit(input: Tensor, *vectors: Tensor | None) -> bool:
    """Whether vectors of channels are what the fused operator takes."""
    dtype = None
    for vector in vectors:
        if vector is None:
            continue
        if not isinstance(vector, Tensor) or vector.layout is not torch.strided:
            return False
        dtype = dtype or vector.dtype
        if vector.dtype != dtype or vector.device != input.device or vector.shape != input.shape[1:2]:
            return False
    return dtype is None or dtype == input.dtype or (dtype == torch.float32 and input.dtype != torch.float64)


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
