"""torchvision's layers around BatchNorm: FrozenBatchNorm2d and StochasticDepth."""

from torch import nn

from .kinds import NORM, SAME, Kind, frozen
from .source import is_known

# Digests of the forwards that were read, of each release that changed them (source.digest).
_FROZEN = ("6f2960b9246904cb",)
_STOCHASTIC_DEPTH = ("09a4f7ff0113c02e",)
_STOCHASTIC_DEPTH_FUNCTION = ("a8d6ca1b218cb65a",)


def kind(cls: type[nn.Module]) -> Kind | None:
    """What is known of a class of torchvision; None where nothing is."""
    forward = cls.forward
    if cls.__name__ == "FrozenBatchNorm2d" and is_known(forward, _FROZEN):
        return Kind(NORM, forward, norm=frozen)
    if cls.__name__ == "StochasticDepth" and is_known(forward, _STOCHASTIC_DEPTH):
        function = forward.__globals__.get("stochastic_depth")
        if is_known(function, _STOCHASTIC_DEPTH_FUNCTION):
            return Kind(SAME, forward, inactive=_inactive)
    return None


def _inactive(depth: nn.Module) -> bool:
    return not depth.training or depth.p == 0.0
