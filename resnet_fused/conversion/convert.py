"""fuse() and unfuse(): change the classes of modules to ones with rewritten forwards, and change them back."""

import sys
import warnings
from typing import TypeVar

from torch import jit, nn

from .. import bypass
from ..ops.recomputation import checked
from ..tracing import Scriptable
from . import families
from .classes import is_changed, is_fused
from .flow import Flow
from .fused_class import class_for
from .report import fusion_report
from .selection import Selection
from .verification import verify as verify_conversion

Model = TypeVar("Model", bound=nn.Module)


def fuse(
    model: Model,
    recompute: bool | str = False,
    verify: bool = False,
    example_inputs=None,
    include=None,
    exclude=None,
) -> Model:
    """Lets BatchNorm, add and ReLU of ``model`` run on fused operators; changes it in place and returns it.

    Where the output of a BatchNorm goes to a ReLU, or to an add and a ReLU behind it, in whatever spelling, also of a
    BatchNorm that ends a shortcut, one operator computes all of it. That is read in the source of each module's
    forward, which is not run; only the classes of the modules whose forwards have such places change, to subclasses
    with these forwards rewritten. Parameters, submodules, state_dict, hooks and attributes stay the objects they are,
    so an optimizer made before goes on. What cannot be fused is left alone; :func:`fusion_report` says what and why.
    Fusing twice is fusing once, with the ``recompute`` of the last call.

    A rewritten forward asks at every call what its modules are and whether they may be bypassed: one that got a hook,
    was replaced or converted to SyncBatchNorm is called as it was before; so is a function of torch, or a method of the
    class, that was replaced.

    The order of wrappers: ``model`` itself is fused, not what ``torch.compile`` made of it; code compiled from it
    earlier notices and is compiled again. Fuse before FSDP's ``fully_shard``, which changes classes itself, and after
    ``torch.fx``: a GraphModule is fused as any other module, and one that is traced from a fused model is not.
    ``torch.jit.script`` and ``torch.jit.trace`` compile the unfused model. A model inside DistributedDataParallel can
    be fused at any time: DDP holds parameters and the hooks of their gradients, none of which change.

    Args:
        model: changed in place.
        recompute: whether the fused forwards run inside :class:`resnet_fused.recompute`: activations are not kept for
            the backward but made again there; with "convolutions" also the outputs of 1x1 convolutions that are larger
            than their inputs, for which these run again. Blocks that are not fused, and FusedResidualBlock and
            FusedBottleneck, which have a setting of their own, stay as they are.
        verify: first run a fused and an unfused copy, in evaluation and training, forward and backward, and change
            nothing unless they agree, also in buffers and in the attributes that forwards set. Needs memory for two
            copies and their gradients.
        example_inputs: what ``verify`` runs on: a tensor, a tuple of arguments or a dict of keyword arguments; by
            default made up from the first convolution.
        include, exclude: limit what is changed: a name as in ``named_modules()`` with ``*`` and ``?``, a predicate
            ``(name, module) -> bool``, or several of these. A module stands for all within it.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, is a ScriptModule, or it or a part of it is compiled already; a
            pattern of another type.
        ValueError: ``recompute`` is none of True, False and "convolutions"; a pattern that matches nothing; no input to
            verify with could be made up.
        VerificationError: the fused and the unfused copy differ.

    Warns where there is nothing to fuse, and says why.
    """
    _check(model)
    checked(recompute)
    selection = Selection(model, include, exclude)
    _check_changed(model, lambda module: module._fusion_recompute == recompute and id(module) not in selection.limited)
    if verify:
        verify_conversion(
            model, lambda copied: _convert(copied, recompute, Selection(copied, include, exclude)), example_inputs
        )
    _convert(model, recompute, selection)
    if not any(isinstance(module, Scriptable) for module in model.modules()):
        warnings.warn(_why_nothing(model), stacklevel=2)
    return model


def _why_nothing(model: nn.Module) -> str:
    """Why nothing of ``model`` is fused."""
    rows = {row.reason: row.name for row in reversed(fusion_report(model, device="cpu").rows)}
    if not rows:
        why = "it has no BatchNorm"
    else:
        reason, name = rows.popitem()
        why = f"of {name} {reason}" if name and reason.startswith("its ") else reason
        why += f"; fusion_report() has {len(rows)} more reasons for others" if rows else ""
    return f"fuse() found nothing to fuse in {type(model).__name__}: {why}"


def _convert(model: nn.Module, recompute: bool | str, selection: Selection) -> None:
    before = [type(module) for module in model.modules()]  # the same classes serve again where nothing changed
    for module in model.modules():
        module.__dict__.pop(bypass.EXCLUDED, None)
        if id(module) in selection.limited:
            # Also the parts that the forward around them would bypass ask for it.
            module.__dict__[bypass.EXCLUDED] = True
        if not _is_fixed(module):
            _unfuse(module)
    families.learn({type(module) for module in model.modules()})
    needed = Flow(model, selection.allows, hopeful=True).needed
    for module in list(model.modules()):
        if id(module) in needed and selection.allows(module) and not _is_fixed(module):
            # Not by a __setattr__ of the class's own.
            object.__setattr__(module, "__class__", class_for(type(module), recompute))
    del before


def _is_fixed(module: nn.Module) -> bool:
    """Whether a fused module keeps the class that somebody made of its fused one."""
    return is_fused(module) and is_changed(module)


def _unfuse(module: nn.Module) -> None:
    if is_fused(module):
        object.__setattr__(module, "__class__", type(module)._fusion_base)


def unfuse(model: Model) -> Model:
    """Undoes :func:`fuse` in place and returns ``model``; a model that is not fused stays as it is.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or the class of a fused module was changed again (by ``fully_shard``,
            by a parametrization); nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse() takes a torch.nn.Module, got {type(model).__name__}")
    _check_changed(model)
    for module in model.modules():
        _unfuse(module)
        module.__dict__.pop(bypass.EXCLUDED, None)
    return model


def _check_changed(model: nn.Module, keeps=lambda module: False) -> None:
    for name, module in model.named_modules():
        if _is_fixed(module) and not keeps(module):
            raise TypeError(
                f"the class of {name or 'the model'} was changed to {type(module).__name__} after fuse(): "
                "undo that first"
            )


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse() takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, jit.ScriptModule):
        raise TypeError("fuse() cannot change a ScriptModule, and what is scripted runs unfused")
    # Importing torch._dynamo takes seconds; without it nothing is compiled.
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or (eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)):
            raise TypeError(
                f"{name or 'the model'} is compiled already: fuse what was compiled, as in torch.compile(fuse(model))"
            )
