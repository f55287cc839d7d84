"""fuse() and unfuse(): changes the classes of modules whose forward is known, and changes them back.

A family is a module here with ``recognize(module)``, which returns the fused forward and its plan, None for a module
that is none of its own, or raises Refused with a reason. It looks, and neither runs nor changes anything.
"""

import sys
from typing import Any, TypeVar

from torch import jit, nn

from ..ops.recomputation import checked
from . import residual_block, torchvision_resnet
from .classes import Fused, Refused, check_class, fused_class, is_fused

FAMILIES = (torchvision_resnet, residual_block)

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, recompute: bool | str = False) -> Model:
    """Lets the residual blocks of ``model`` run on fused operators; changes it in place and returns it.

    Only the classes of blocks (and of a torchvision ResNet, for its stem) change, to subclasses with a fused forward.
    Parameters, submodules, state_dict, hooks and attributes stay the objects they are, so an optimizer made before goes
    on. What cannot be fused is left alone; :func:`fusion_report` says what and why. Fusing twice is fusing once, with
    the ``recompute`` of the last call.

    A block's forward is read, in its source, and not run. Fused is what consists of calls of submodules, ReLU, add and
    branches on constants and on which submodules there are; where such an attribute changes later, the block runs
    unfused. A fused block also asks at every call whether its BatchNorms and ReLUs may be bypassed: one that got a
    hook, was replaced or converted to SyncBatchNorm is called as it was before.

    The order of wrappers: ``model`` itself is fused, not what ``torch.compile`` made of it; code compiled from it
    earlier notices and is compiled again. Fuse before ``torch.jit``, and before FSDP's ``fully_shard``, which changes
    classes itself. A model inside DistributedDataParallel can be fused at any time: DDP holds parameters and the hooks
    of their gradients, none of which change.

    Args:
        model: changed in place.
        recompute: whether the fused forwards run inside :class:`resnet_fused.recompute`: activations are not kept for
            the backward but made again there; with "convolutions" also the outputs of 1x1 convolutions that are larger
            than their inputs, for which these run again. Blocks that are not fused, and FusedResidualBlock and
            FusedBottleneck, which have a setting of their own, stay as they are.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, is a ScriptModule, or it or a part of it is compiled already.
        ValueError: ``recompute`` is none of True, False and "convolutions".
    """
    _check(model)
    checked(recompute)
    for module in model.modules():
        if is_fused(module):
            cls = type(module)
            module.__class__ = fused_class(cls._fusion_family, cls._fusion_base, cls._fusion_plan, recompute)
        else:
            try:
                conversion = conversion_of(module)
            except Refused:
                continue
            if conversion is not None:
                family, plan = conversion
                module.__class__ = fused_class(family, type(module), plan, recompute)
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


def conversion_of(module: nn.Module) -> tuple[type[Fused], Any] | None:
    """The fused forward for ``module`` and its plan; None where it is of no family.

    Raises:
        Refused: the module looks like one of a family, but its forward is not what the fused one computes.
    """
    for family in FAMILIES:
        conversion = family.recognize(module)
        if conversion is not None:
            check_class(type(module))
            obstacle = conversion[0]._fusion_obstacle(module, conversion[1])
            if obstacle is not None:
                raise Refused(obstacle)
            return conversion
    return None


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
            raise TypeError(
                f"{name or 'the model'} is compiled already: fuse what was compiled, as in torch.compile(fuse(model))"
            )
