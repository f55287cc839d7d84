"""Whether a module could look at a BatchNorm that is none of its own parts while that waits (:mod:`.deferred`)."""

import sys
import types

import torch
from torch import nn

from . import families
from .classes import Fused
from .remembered import recall, remember

# Whose layers hold modules as their parts alone.
_PACKAGES = ("torchvision", "timm", "transformers", "segmentation_models_pytorch", "monai")
# What is asked of objects of these runs no code of the user's.
PLAIN = (bool, int, float, str, types.NoneType, torch.dtype, torch.device, torch.Size, types.BuiltinFunctionType)
_OF_ALL_MODULES = frozenset(vars(nn.Module()))
# The attribute of a class with whether its methods see no module but their own.
_MEMORY = "_resnet_fused_tame"


def is_tame(module: nn.Module) -> bool:
    """Whether the forward of ``module`` by itself, without its parts, sees no other module.

    One of a class of the user's might keep another module in a list, in a function, in its class or in a global: its
    attributes tell, and what its methods name.
    """
    cls = module._fusion_base if isinstance(module, Fused) else type(module)
    if cls.__module__.startswith("torch.nn.modules.") or _is_of_a_package(cls.__module__):
        return True
    if families.kind_of(module) is not None:
        return True
    if not all(_is_plain(value) for name, value in vars(module).items() if name not in _OF_ALL_MODULES):
        return False
    known = recall(cls, _MEMORY, cls)
    if known is None and not torch.compiler.is_compiling():
        remember(cls, _MEMORY, cls, _sees_nothing(cls, set()))
        known = recall(cls, _MEMORY, cls)
    return known is not None and known.value


def _is_of_a_package(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES


def _is_plain(value) -> bool:
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    if type(value) in (list, tuple):
        return len(value) < 100 and all(type(item) in PLAIN for item in value)
    return type(value) in PLAIN


def _sees_nothing(value, seen: set[int]) -> bool:
    """Whether a class, a function or another value that a method may name leads to no module."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        return all(_sees_nothing(function, seen) for function in (value.fget, value.fset) if function is not None)
    if _is_plain(value) and not isinstance(value, types.FunctionType):
        return True
    home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    if isinstance(value, types.ModuleType | type | types.FunctionType) and _is_foreign(home):
        return True
    if id(value) in seen:
        return True
    seen.add(id(value))
    if isinstance(value, type):
        return all(
            _sees_nothing(member, seen)
            for base in value.__mro__
            if not _is_foreign(base.__module__)
            for name, member in vars(base).items()
            if not (name.startswith("__") and name.endswith("__") and not callable(member)) and name[:6] != "_resne"
        )
    if isinstance(value, types.FunctionType):
        if any(name != "__class__" for name in value.__code__.co_freevars):
            return False
        names = _names(value.__code__)
        return all(_sees_nothing(value.__globals__[name], seen) for name in names if name in value.__globals__)
    return isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType)


def _is_foreign(module: str) -> bool:
    """Whether a module is of Python's library, torch's or a package's, which know nothing of the user's modules."""
    top = module.partition(".")[0]
    return top in ("torch", "numpy", *_PACKAGES) or (top in sys.stdlib_module_names and top != "__main__")


def _names(code: types.CodeType) -> set[str]:
    """The names of globals, and of attributes, that code and the functions in it use."""
    return set(code.co_names).union(*(_names(one) for one in code.co_consts if isinstance(one, types.CodeType)))
