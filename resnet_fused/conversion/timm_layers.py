"""timm's layers around BatchNorm: BatchNormAct2d and its frozen form, DropPath and DropBlock2d."""

from torch import nn

from .kinds import NORM, SAME, Kind, frozen, synchronizes
from .source import is_known

# Digests of the forwards that were read, of each release that changed them (source.digest).
_BATCH_NORM_ACT = ("15c9a4c501e7151f",)
_SYNC_ACT = ("f0f9a1b71a4c62cf",)
_FROZEN_ACT = ("e25202482e08f92f",)
_DROP_PATH = ("1270979aad2e9889",)
_DROP_PATH_FUNCTION = ("4f5afd298e74d5b3",)
_DROP_BLOCK = ("a06f1dfd8094facd",)
_TAIL = ("drop", "act")


def kind(cls: type[nn.Module]) -> Kind | None:
    """What is known of a class of timm; None where nothing is."""
    name, forward = cls.__name__, cls.forward
    if name == "BatchNormAct2d" and is_known(forward, _BATCH_NORM_ACT):
        return Kind(NORM, forward, tail=_TAIL)
    if name == "SyncBatchNormAct" and is_known(forward, _SYNC_ACT) and cls.__base__ is nn.SyncBatchNorm:
        return Kind(NORM, forward, tail=_TAIL, why_not=synchronizes)
    if name == "FrozenBatchNormAct2d" and is_known(forward, _FROZEN_ACT):
        return Kind(NORM, forward, norm=frozen, tail=_TAIL)
    path = name == "DropPath" and is_known(forward, _DROP_PATH)
    path = path and is_known(forward.__globals__.get("drop_path"), _DROP_PATH_FUNCTION)
    if path or (name == "DropBlock2d" and is_known(forward, _DROP_BLOCK)):
        return Kind(SAME, forward, inactive=_inactive)
    return None


def _inactive(drop: nn.Module) -> bool:
    return not drop.training or drop.drop_prob == 0.0
