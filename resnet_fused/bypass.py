"""Whether a fused operator may stand for the calls of some modules, or whether somebody would notice.

A fused forward computes what BatchNorm, ReLU and shortcut would have computed without calling them. That is right only
while nothing hangs on the calls themselves: hooks, a forward replaced on the instance or on torch's class, a module of
another class. Each forward asks again, so what comes later is honoured too. The checks read dictionaries: well below a
microsecond a module, and torch.compile guards on them.
"""

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from . import tracing

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
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records"
    return None


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
