"""``python -m resnet_fused report MODEL``: builds a model without weights, fuses it and shows its fusion report."""

import copy
import difflib
import importlib
import inspect
from collections.abc import Callable

import torch
from torch import nn

from . import fuse, fusion_report


class ModelError(Exception):
    """A model that cannot be had; its message is one sentence for a person."""


def report(name: str) -> str:
    """The fusion report of a copy of the model called ``name``, as it would run on the CPU.

    Args:
        name: a torchvision model such as ``resnet50``, or ``module:callable`` for a callable that returns a module.

    Raises:
        ModelError: there is no such model, or it cannot be built.
    """
    # A copy, for a callable may hand out a model that somebody else uses.
    model = copy.deepcopy(build(name))
    return str(fusion_report(fuse(model), device="cpu"))


def build(name: str) -> nn.Module:
    """The model called ``name``, on the CPU, in most cases with no values in its weights.

    Raises:
        ModelError: there is no such model, or it cannot be built.
    """
    builder = _imported(name) if ":" in name else torchvision_builder(name)
    try:
        try:
            # Neither time nor memory for weights that nobody reads.
            with torch.device("meta"):
                model = builder()
        except Exception:
            # Constructors that look at values need real ones.
            model = builder()
    except Exception as error:
        raise ModelError(f"{name} could not be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, which is no torch.nn.Module.")
    return model.to_empty(device="cpu") if any(p.is_meta for p in model.parameters()) else model


def torchvision_builder(name: str) -> Callable[..., nn.Module]:
    """torchvision's builder of the model called ``name``, bound to random weights: nothing is downloaded.

    Raises:
        ModelError: torchvision is not installed, or has no such model.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise ModelError(f"{name} is looked for in torchvision, which cannot be imported: {error}.") from error
    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        close = difflib.get_close_matches(name.lower(), models.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "give module:callable for a model of your own."
        raise ModelError(f"torchvision has no model called {name!r}; {hint}") from error
    arguments = [key for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters]
    return lambda **more: builder(**dict.fromkeys(arguments), **more)


def _imported(name: str) -> Callable[..., nn.Module]:
    module_name, _, path = name.partition(":")
    try:
        member = importlib.import_module(module_name)
    except Exception as error:
        raise ModelError(f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(member, part):
            raise ModelError(f"module {module_name!r} has no {path!r}.")
        member = getattr(member, part)
    if not callable(member):
        raise ModelError(f"{name} is a {type(member).__name__}, which cannot be called to build a model.")
    return member
