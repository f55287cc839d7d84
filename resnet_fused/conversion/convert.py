"""fuse() and unfuse(): changes the classes of modules whose forward is known, and changes them back.

A family is a module here with ``recognize(module)``, which returns the fused forward and its plan, None for a module
that is none of its own, or raises Refused with a reason.
"""

import sys
from typing import TypeVar

from torch import jit, nn

from . import residual_block, torchvision_resnet
from .classes import Fused, Refused, fused_class, is_fused
from .tracing import trace

FAMILIES = (torchvision_resnet, residual_block)

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Lets the residual blocks of ``model`` run on fused operators; changes it in place and returns it.

    Only the classes of blocks (and of a torchvision ResNet, for its stem) change, to subclasses with a fused forward.
    Parameters, submodules, state_dict, hooks and attributes stay the objects they are, so an optimizer made before goes
    on. What cannot be fused is left alone; :func:`fusion_report` says what and why. Fusing twice is fusing once. A
    fused block asks at every call whether its BatchNorms and ReLUs may be bypassed: one that got a hook, was replaced
    or converted to SyncBatchNorm is called as it was before. The forward is read when fuse() runs; after a change to an
    attribute that a block's own forward branches on, unfuse() and fuse() again.

    The order of wrappers: fuse before ``torch.compile``, whose compiled code would go on unfused, before ``torch.jit``,
    and before FSDP's ``fully_shard``, which changes classes itself. A model inside DistributedDataParallel can be fused
    at any time: DDP holds parameters and the hooks of their gradients, none of which change.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, is a ScriptModule, or it or a part of it is compiled already.
    """
    _check(model)
    for module in model.modules():
        if not is_fused(module):
            try:
                cls = conversion_of(module)
            except Refused:
                continue
            if cls is not None:
                module.__class__ = cls
    return model


def unfuse(model: Model) -> Model:
    """Undoes :func:`fuse` in place and returns ``model``; a model that is not fused stays as it is.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or the class of a fused module was changed again (by ``fully_shard``,
            by a parametrization); nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse() takes a torch.nn.Module, got {type(model).__name__}")
    fused = [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]
    for name, module in fused:
        if not is_fused(module):
            raise TypeError(
                f"the class of {name or 'the model'} was changed to {type(module).__name__} after fuse(): "
                "undo that first"
            )
    for _, module in fused:
        module.__class__ = type(module)._fusion_base
    return model


def conversion_of(module: nn.Module) -> type[nn.Module] | None:
    """The fused class for ``module``; None where it is of no family.

    Raises:
        Refused: the module looks like one of a family, but its forward is not what the fused one computes.
    """
    for family in FAMILIES:
        recognized = family.recognize(module)
        if recognized is not None:
            cls = fused_class(recognized[0], type(module), recognized[1])
            _prove(module, cls)
            return cls
    return None


def _prove(module: nn.Module, cls: type[nn.Module]) -> None:
    """Holds the fused forward, traced with all its sites unfused, against the forward of the original."""
    if "forward" in vars(module):
        raise Refused("its forward was replaced on the instance")
    expected, original = trace(module), type(module)
    try:
        module.__class__ = cls
    except TypeError as error:
        raise Refused(f"its class cannot be changed: {error}") from error
    try:
        same = trace(module) == expected
    finally:
        module.__class__ = original
    if not same:
        raise Refused(f"the forward of this {original.__name__} is not the one known here")


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse() takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, jit.ScriptModule):
        raise TypeError("fuse() cannot change a ScriptModule: unfused models can be scripted, fused ones not")
    # Importing torch._dynamo takes seconds; without it nothing is compiled.
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or (eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)):
            raise TypeError(f"{name or 'the model'} is compiled already: fuse first, as in torch.compile(fuse(model))")
