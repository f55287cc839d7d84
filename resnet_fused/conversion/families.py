"""What is known of classes that are not torch's: subclasses that change nothing, and the layers of model packages."""

from collections.abc import Iterable

import torch
from torch import nn

from . import kinds, timm_layers, torchvision_ops, transformers_layers
from .classes import Fused
from .remembered import remember

_PACKAGES = {
    "timm": timm_layers.kind,
    "torchvision": torchvision_ops.kind,
    "transformers": transformers_layers.kind,
}


def kind_of(module: nn.Module) -> kinds.Kind | None:
    """What is known of the class of ``module``; None where nothing is.

    A class that is new, for a parametrization made it or a BatchNorm was frozen since, is looked at once. Not while
    torch.compile traces: reading its source is none of the model's work.
    """
    cls = type(module)
    kind = kinds.known(cls)
    if kind is None and not torch.compiler.is_compiling() and not kinds.is_known(cls):
        learn([cls])
        return kinds.known(cls)
    return kind


def learn(classes: Iterable[type[nn.Module]]) -> None:
    """Adds to :mod:`.kinds` what is known of some classes, or that nothing is."""
    for cls in classes:
        if not kinds.is_known(cls) and not issubclass(cls, Fused):
            package = _PACKAGES.get(cls.__module__.partition(".")[0])
            kind = kinds.inherited(cls) or (None if package is None else package(cls))
            remember(cls, kinds.MEMORY, cls, kind)
