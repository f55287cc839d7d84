"""What torch.jit.script and torch.fx see of a fused model: the unfused one, and one warning that says so."""

import sys
import types
import warnings
import weakref
from collections.abc import Callable

from torch import nn
from torch.fx import Proxy

# Whose frames are passed over for the line that a warning names.
_PACKAGES = ("torch", "torchvision", "timm", "transformers", "resnet_fused")
# The model that a trace was warned of last.
_traced: "weakref.ref[nn.Module] | None" = None


class Scriptable:
    """A base of modules that run fused: torch.jit.script compiles them unfused, and says so once."""

    def __prepare_scriptable__(self):
        # torch.jit.script asks every module before it compiles any; what it asked before is in its caller's memo.
        memo = sys._getframe(1).f_locals.get("memo", {})
        if not any(isinstance(module, Scriptable) for module in memo.values()):
            _warn(
                "torch.jit.script compiles the unfused model: what it gives is that of torch.jit.script(unfuse(model))"
            )
        prepare = getattr(super(), "__prepare_scriptable__", None)
        return self if prepare is None else prepare()


def scripted_as(unfused: Callable) -> Callable:
    """Has torch.jit.script compile the source of ``unfused`` in the place of the decorated method."""

    def decorate(method):
        method.__wrapped__ = unfused  # where inspect finds the source
        return method

    return decorate


def in_the_scope_of(method: types.FunctionType, wrapper: types.FunctionType) -> types.FunctionType:
    """``wrapper``, which names nothing global, with the source and the names of ``method`` for torch.jit.script."""
    scope = method.__globals__
    closure = dict(zip(method.__code__.co_freevars, method.__closure__ or (), strict=True))
    if any(not name.startswith("_resnet_fused") for name in closure):
        scope = scope | {name: cell.cell_contents for name, cell in closure.items()}
    function = types.FunctionType(wrapper.__code__, scope, method.__name__, None, wrapper.__closure__)
    function.__dict__.update(method.__dict__)
    function.__doc__, function.__module__, function.__qualname__ = (
        method.__doc__,
        method.__module__,
        method.__qualname__,
    )
    function.__wrapped__ = method
    return function


def notice(value) -> None:
    """Warns, once a model, where ``value`` is what torch.fx traces with."""
    global _traced
    if isinstance(value, Proxy):
        root = getattr(value.tracer, "root", None)
        if root is None or _traced is None or _traced() is not root:
            _traced = None if root is None else weakref.ref(root)
            _warn(
                "torch.fx traces the unfused model, so the GraphModule is not fused: trace first, then fuse the "
                "GraphModule, as in fuse(torch.fx.symbolic_trace(model))"
            )


def notice_jit() -> None:
    """Warns where torch.jit.trace records."""
    _warn("torch.jit.trace records the unfused model: what it gives is that of torch.jit.trace(unfuse(model))")


def _warn(message: str) -> None:
    """Warns of the line that called the outermost function of torch.fx or torch.jit."""
    frame, level, found, inside = sys._getframe(1), 2, 1, False
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        inside = inside or name.startswith(("torch.fx.", "torch.jit."))
        if inside and name.partition(".")[0] not in _PACKAGES:
            found, inside = level, False
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=found)
