"""transformers' frozen BatchNorm, of which each detection model has a class of its own."""

from torch import Tensor, nn

from .kinds import NORM, Frozen, Kind, frozen_with
from .source import is_known

# Digests of the forwards that were read, of each release that changed them (source.digest).
_FROZEN = ("875ab517502efbcb",)


def kind(cls: type[nn.Module]) -> Kind | None:
    """What is known of a class of transformers; None where nothing is."""
    if cls.__name__.endswith("FrozenBatchNorm2d") and is_known(cls.forward, _FROZEN):
        return Kind(NORM, cls.forward, norm=_frozen)
    return None


def _frozen(module: nn.Module, input: Tensor) -> Frozen | None:
    return frozen_with(module, input, 1e-5)  # a constant of the forward
