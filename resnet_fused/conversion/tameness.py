"""Whether a module could look at a BatchNorm that is none of its own parts while that waits (:mod:`.deferred`)."""

import types

import torch
from torch import nn

from . import families
from .classes import Fused

# Whose layers hold modules as their parts alone.
_PACKAGES = ("torchvision", "timm", "transformers", "segmentation_models_pytorch", "monai")
# What is asked of objects of these runs no code of the user's.
PLAIN = (bool, int, float, str, types.NoneType, torch.dtype, torch.device, torch.Size, types.BuiltinFunctionType)
_OF_ALL_MODULES = frozenset(vars(nn.Module()))


def is_tame(module: nn.Module) -> bool:
    """Whether the forward of ``module`` by itself, without its parts, sees no other module.

    One of a class of the user's might keep another module in a list, or in a function: its attributes tell.
    """
    home = (module._fusion_base if isinstance(module, Fused) else type(module)).__module__
    if home.startswith("torch.nn.modules.") or home.partition(".")[0] in _PACKAGES:
        return True
    if families.kind_of(module) is not None:
        return True
    return all(_is_plain(value) for name, value in vars(module).items() if name not in _OF_ALL_MODULES)


def _is_plain(value) -> bool:
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    if type(value) in (list, tuple):
        return len(value) < 100 and all(type(item) in PLAIN for item in value)
    return type(value) in PLAIN
