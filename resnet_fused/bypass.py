"""Whether a fused operator may stand for the calls of some modules, or whether somebody would notice.

A fused forward computes what BatchNorm, ReLU and shortcut would have computed without calling them. That is right only
while nothing hangs on the calls themselves: hooks, a forward replaced on the instance or on torch's class, one of
torch's functions replaced, a module of another class. Each forward asks again, so what comes later is honoured too. The
checks compare and read dictionaries: well below a microsecond a module, and torch.compile guards on them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from . import tracing
from .ops.torch_private import DeviceContext, function_mode_stack, function_modes, tracing_state

# In the attributes of a module that fuse() was not to include, or to exclude.
EXCLUDED = "_fusion_excluded"
_HOOKS = {
    "_forward_hooks": "has a forward hook",
    "_forward_pre_hooks": "has a forward pre-hook",
    "_backward_hooks": "has a backward hook",
    "_backward_pre_hooks": "has a backward pre-hook",
}
# What a fused operator computes; somebody may put another in place, on the class or on a base of it.
_FORWARDS = {kind: kind.forward for kind in (nn.BatchNorm2d, nn.Sequential)}
# The functions that a fused operator stands for, as torch has them. A profiler or a test may have put others there.
RELU, TORCH_RELU, TORCH_RELU_, ADD = F.relu, torch.relu, torch.relu_, torch.add
RELUS = (RELU, TORCH_RELU, TORCH_RELU_)
_TENSOR_RELU, _TENSOR_RELU_ = Tensor.relu, Tensor.relu_
_BATCH_NORM, _TORCH_BATCH_NORM = F.batch_norm, torch.batch_norm
_TENSOR_ADD, _TENSOR_ADD_ = Tensor.add, Tensor.add_
_PLUS, _RIGHT_PLUS, _PLUS_EQUALS = Tensor.__add__, Tensor.__radd__, Tensor.__iadd__
_DROPOUTS = (F.dropout, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout)
_MAX_POOL, _TORCH_MAX_POOL = F.max_pool2d, torch.max_pool2d
_Module, _CALL, _CALL_IMPL = nn.Module, nn.Module.__call__, nn.Module._call_impl


def why_watched(input) -> str | None:
    """Why all modules must be called for ``input`` at this moment; None where nothing asks for it."""
    if not isinstance(input, torch.Tensor):
        tracing.notice(input)
        return "a symbolic trace is recorded"
    return why_all_watched()


def why_all_watched() -> str | None:
    """Why all modules must be called at this moment, whatever for; None where nothing asks for it."""
    if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
        return "a hook on all modules is registered"
    if tracing_state() is not None:
        tracing.notice_jit()
        return "torch.jit.trace records"
    # torch.export puts in a call and a mode of its own.
    called = _Module.__call__ is _CALL and _Module._call_impl is _CALL_IMPL
    if not called and not torch.compiler.is_compiling():
        return "the call of all modules was replaced"
    if function_modes() and not torch.compiler.is_compiling() and _a_mode_looks():
        return "a torch function mode looks on"
    return None


def has_global_forward_hooks() -> bool:
    """Whether a hook sees, and may replace, what every module gives."""
    return bool(_global_forward_hooks)


def _a_mode_looks() -> bool:
    """Whether a mode may see calls of torch's functions: not one that only chooses a device, nor this package's own."""
    kinds = map(type, function_mode_stack())
    return any(kind is not DeviceContext and not kind.__module__.startswith(f"{__package__}.") for kind in kinds)


def is_relu_replaced() -> bool:
    """Whether somebody put another function in the place of a ReLU of torch's, which then has to be called."""
    return not (
        F.relu is RELU
        and torch.relu is TORCH_RELU
        and torch.relu_ is TORCH_RELU_
        and Tensor.relu is _TENSOR_RELU
        and Tensor.relu_ is _TENSOR_RELU_
    )


def is_batch_norm_replaced() -> bool:
    """The same of what an ``nn.BatchNorm2d`` calls."""
    return F.batch_norm is not _BATCH_NORM or torch.batch_norm is not _TORCH_BATCH_NORM


def is_add_replaced() -> bool:
    """The same of an add."""
    return not (
        Tensor.__add__ is _PLUS
        and Tensor.__iadd__ is _PLUS_EQUALS
        and Tensor.__radd__ is _RIGHT_PLUS
        and torch.add is ADD
        and Tensor.add is _TENSOR_ADD
        and Tensor.add_ is _TENSOR_ADD_
    )


def is_dropout_replaced() -> bool:
    """The same of what torch's dropouts call."""
    now = (F.dropout, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout)
    return any(function is not known for function, known in zip(now, _DROPOUTS, strict=True))


def is_max_pool_replaced() -> bool:
    """The same of what an ``nn.MaxPool2d`` calls."""
    return F.max_pool2d is not _MAX_POOL or torch.max_pool2d is not _TORCH_MAX_POOL


def why_not(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why the call of ``module`` may not give way to the maths of the class ``kind``; None where it may."""
    if type(module) is not kind:
        return f"a {type(module).__name__}, not a {kind.__name__}"
    reason = why_called(module)
    if reason is not None:
        return reason
    forward = _FORWARDS.get(kind)
    if forward is not None and kind.forward is not forward:
        return f"is of {kind.__name__}, whose forward was replaced"
    return None


def why_called(module: nn.Module) -> str | None:
    """Why somebody would notice that ``module`` was not called; None where nothing hangs on its call."""
    members = module.__dict__
    if (
        members["_forward_hooks"]
        or members["_forward_pre_hooks"]
        or members["_backward_hooks"]
        or members["_backward_pre_hooks"]
    ):
        return next(reason for name, reason in _HOOKS.items() if members[name])
    if "forward" in members:
        return "has a forward replaced on the instance"
    if EXCLUDED in members:
        return "was excluded from fuse()"
    if members.get("_compiled_call_impl") is not None:
        return "is compiled on its own"
    return None


def why_not_projection(shortcut: nn.Module) -> str | None:
    """Why the BatchNorm that ends ``shortcut`` may not be part of an operator; None where it may."""
    reason = why_not(shortcut, nn.Sequential)
    if reason is not None:
        return reason
    if len(shortcut) == 0:
        return "is empty"
    return why_not(shortcut[-1], nn.BatchNorm2d)


def before_last(shortcut: nn.Sequential, x):
    """The output of all modules of ``shortcut`` but the last."""
    for index in range(len(shortcut) - 1):
        x = shortcut[index](x)
    return x
