"""What the report says of this package's own modules, which are fused as they stand, and with hooks too."""

from collections.abc import Iterator

from torch import nn

from .. import bypass
from ..modules import BatchNormAddReLU2d, FusedBottleneck, FusedResidualBlock
from .sites import BATCH_NORM, BATCH_NORM_ADD_RELU, BATCH_NORM_RELU, Verdict, end_verdicts, named


def judge(module: nn.Module) -> Iterator[Verdict]:
    """The verdict on each BatchNorm of a FusedResidualBlock or FusedBottleneck; none for any other module."""
    if isinstance(module, FusedBottleneck):
        yield _inner(module, "bn1")
        yield _inner(module, "bn2")
        yield from _end(module, "bn3")
    elif isinstance(module, FusedResidualBlock):
        yield _inner(module, "bn1")
        if module.bn2_before_conv2:
            yield _inner(module, "bn2")
            yield from end_verdicts(module, None, "shortcut", BATCH_NORM_ADD_RELU, None)
        else:
            yield from _end(module, "bn2")


def alone(bn: BatchNormAddReLU2d) -> str:
    """The operator that one runs as when a module calls it with one input."""
    return BATCH_NORM_RELU if bn.relu else BATCH_NORM


def _inner(block: nn.Module, name: str) -> Verdict:
    bn = getattr(block, name)
    if isinstance(bn, BatchNormAddReLU2d):
        return name, alone(bn), None
    return name, None, f"{name} is a {type(bn).__name__}, not a BatchNormAddReLU2d"


def _end(block: nn.Module, name: str) -> Iterator[Verdict]:
    bn = getattr(block, name)
    if not isinstance(bn, BatchNormAddReLU2d):
        yield from end_verdicts(block, name, "shortcut", BATCH_NORM_ADD_RELU, _inner(block, name)[2])
        return
    # A hook keeps the two BatchNorms apart, and each is called then.
    apart = "; ".join(named(name, bypass.why_not(bn, BatchNormAddReLU2d))) or bypass.why_watched(bn.weight)
    if apart is None:
        yield from end_verdicts(block, name, "shortcut", BATCH_NORM_ADD_RELU, None)
    else:
        yield name, BATCH_NORM_ADD_RELU, None
        yield from end_verdicts(block, None, "shortcut", BATCH_NORM_ADD_RELU, apart)
