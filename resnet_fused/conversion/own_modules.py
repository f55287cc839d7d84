"""What the report says of this package's own modules, which are fused as they stand, and with hooks too."""

from collections.abc import Iterator

from torch import nn

from .. import bypass, modules
from ..modules import BatchNormAddReLU2d, FusedBottleneck, FusedResidualBlock
from .verdicts import BATCH_NORM, BATCH_NORM_ADD_RELU, BATCH_NORM_RELU, DUAL_BATCH_NORM_ADD_RELU

# Name of a BatchNorm, the operator it is part of (None: it is called by itself), and why it is not fused.
Verdict = tuple[str, str | None, str | None]


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
            yield from _end_verdicts(module, None, "shortcut", BATCH_NORM_ADD_RELU, None)
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
        yield from _end_verdicts(block, name, "shortcut", BATCH_NORM_ADD_RELU, _inner(block, name)[2])
        return
    # A hook keeps the two BatchNorms apart, and each is called then.
    apart = "; ".join(_named(name, bypass.why_not(bn, BatchNormAddReLU2d))) or bypass.why_watched(bn.weight)
    if apart is None:
        yield from _end_verdicts(block, name, "shortcut", BATCH_NORM_ADD_RELU, None)
    else:
        yield name, BATCH_NORM_ADD_RELU, None
        yield from _end_verdicts(block, None, "shortcut", BATCH_NORM_ADD_RELU, apart)


def _end_verdicts(
    module: nn.Module, bn: str | None, shortcut: str | None, operator: str, reason: str | None
) -> Iterator[Verdict]:
    """The verdict on ``bn``, from its ``operator`` and ``reason``, and that on the BatchNorm that ends the shortcut."""
    main = None if bn is None else module.get_submodule(bn)
    end = None if shortcut is None else _last_batch_norm(module.get_submodule(shortcut))
    if end is not None:
        name = f"{shortcut}.{end}"
        sequential = module.get_submodule(shortcut)
        obstacles = _named(shortcut, bypass.why_not(sequential, nn.Sequential))
        obstacles = obstacles or _named(name, bypass.why_not_projection(sequential))
        end_reason = reason or "; ".join(obstacles) or None
        end_operator = operator
        if main is not None and end_reason is None:
            joined = modules.can_join(main, sequential[-1])
            operator = end_operator = DUAL_BATCH_NORM_ADD_RELU if joined else operator
            if not joined:
                end_operator = BATCH_NORM
        yield name, None if end_reason else end_operator, end_reason
    if bn is not None:
        yield bn, None if reason else operator, reason


def _named(name: str, reason: str | None) -> list[str]:
    """A reason of :mod:`resnet_fused.bypass` with its subject, in a list that is empty where there is no reason."""
    if reason is None:
        return []
    return [f"{name} {'is ' if reason.startswith('a ') else ''}{reason}"]


def _last_batch_norm(shortcut: nn.Module) -> str | None:
    children = list(shortcut.named_children())
    if isinstance(shortcut, nn.Sequential) and children:
        name, last = children[-1]
        return name if isinstance(last, nn.modules.batchnorm._BatchNorm) else None
    return None
