"""What a forward sees of the attributes of its module, read without running anything of the module's."""

import inspect
import types
from typing import Any

from torch import nn

from .classes import Refused

_MISSING = object()
_CONSTANTS = (bool, int, float, str, types.NoneType)


def read(module: nn.Module, name: str) -> Any:
    """The submodule or constant that ``module.name`` gives.

    Raises:
        Refused: it gives something else, or code of the class decides what it gives.
    """
    if name == "training":
        raise Refused("its forward differs between training and evaluation")
    if name.startswith("__"):
        raise Refused(f"its forward uses {name!r}, whose name Python changes or gives a meaning")
    of_class = inspect.getattr_static(type(module), name, _MISSING)
    if isinstance(of_class, property | classmethod | staticmethod | types.FunctionType):
        raise Refused(f"its forward uses {name!r}, defined in its own class")
    if name in module._parameters or name in module._buffers:
        raise Refused(f"its forward uses {name!r}: it has parameters or buffers of its own")
    members = vars(module)
    if name in members and not hasattr(type(of_class), "__set__"):
        value = members[name]
    elif of_class is not _MISSING:
        value = of_class
    else:
        value = module._modules.get(name, _MISSING)
    if value is _MISSING:
        raise Refused(f"its forward uses {name!r}, which it does not have")
    if not isinstance(value, nn.Module) and not _is_constant(value):
        raise Refused(f"its forward uses {name!r}, which is no module but a {type(value).__name__}")
    return value


def seen(value: Any) -> Any:
    """What a branch can tell of an attribute: the constant, of a Sequential how long it is, of a module that it is one.

    A plan keeps it, and the fused forward compares: after a change the original forward could branch the other way.
    """
    if isinstance(value, nn.Module):
        return ("Sequential", len(value)) if type(value) is nn.Sequential else ("Module",)
    if type(value) is tuple:
        return "tuple", *(seen(item) for item in value)
    return type(value).__name__, value


def _is_constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(_is_constant(item) for item in value)
    return type(value) in _CONSTANTS
