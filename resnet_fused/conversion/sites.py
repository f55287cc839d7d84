"""The places in a forward where a fused operator stands for several module calls.

Each function computes what the modules given to it would, through one operator where nothing hangs on their calls
(:mod:`resnet_fused.bypass`) and by calling them in their original order otherwise. :func:`judge` tells the report what
they would do, from the same checks.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from .. import bypass, functional, modules
from ..ops import recomputation

BATCH_NORM = "batch_norm"
BATCH_NORM_RELU = "batch_norm+relu"
BATCH_NORM_ADD_RELU = "batch_norm+add+relu"
DUAL_BATCH_NORM_ADD_RELU = "batch_norm+batch_norm+add+relu"


@dataclasses.dataclass(frozen=True)
class Site:
    """One such place, in names of submodules of the module it belongs to.

    Attributes:
        bn: the BatchNorm, or None where only the shortcut may end with one.
        relu: the ReLU; None where the forward calls a function or has no ReLU.
        rectifies: whether a ReLU follows.
        adds: whether a shortcut is added.
        shortcut: the module on the shortcut; None for the input itself.
    """

    bn: str | None
    relu: str | None = None
    rectifies: bool = True
    adds: bool = False
    shortcut: str | None = None


# Name of a BatchNorm, the operator it is part of (None: it is called by itself), and why it is not fused.
Verdict = tuple[str, str | None, str | None]


@dataclasses.dataclass(frozen=True)
class FunctionalReLU:
    """``F.relu``, ``torch.relu`` or ``Tensor.relu`` in a forward: no module whose call could be watched."""

    inplace: bool

    def __call__(self, input: Tensor) -> Tensor:
        """relu(input)."""
        return F.relu(input, inplace=self.inplace)


class EarlyShortcut:
    """A shortcut that ran before the main branch, as in the original; ``bn``, if any, is still to be applied."""

    def __init__(self, output: Tensor, bn: nn.Module | None):
        self.output = output
        self.bn = bn

    def __call__(self, x: Tensor) -> Tensor:
        """shortcut(x), for the x that it ran with."""
        return self.output if self.bn is None else self.bn(self.output)


Activation = nn.Module | FunctionalReLU
Shortcut = nn.Module | EarlyShortcut


def batch_norm(bn: nn.Module, input: Tensor) -> Tensor:
    """bn(input)."""
    if bypass.why_watched(input) or bypass.why_not(bn, nn.BatchNorm2d):
        return bn(input)
    return modules.batch_norm_add_relu(bn, input, relu=False)


def batch_norm_relu(bn: nn.Module, relu: Activation, input: Tensor) -> Tensor:
    """relu(bn(input))."""
    if bypass.why_watched(input) or bypass.why_not(bn, nn.BatchNorm2d) or _why_not_relu(relu):
        return relu(bn(input))
    return modules.batch_norm_add_relu(bn, input)


def batch_norm_add_relu(
    bn: nn.Module, relu: Activation, add: Callable, input: Tensor, x: Tensor, shortcut: Shortcut | None
) -> Tensor:
    """relu(add(bn(input), shortcut(x))).

    Args:
        add: ``operator.add``, or ``operator.iadd`` where the original adds in place: the two differ where dtypes do.
        shortcut: None for the input itself.
    """
    if bypass.why_watched(input) or bypass.why_not(bn, nn.BatchNorm2d) or _why_not_relu(relu):
        return relu(add(bn(input), x if shortcut is None else shortcut(x)))
    residual, bn2 = _run(shortcut, x)
    if not _alike(input, residual):
        return relu(add(bn(input), residual if bn2 is None else bn2(residual)))
    if bn2 is None:
        return modules.batch_norm_add_relu(bn, input, residual)
    return modules.dual_batch_norm_add_relu(bn, input, bn2, residual)


def add_relu(relu: Activation, add: Callable, input: Tensor, x: Tensor, shortcut: Shortcut | None) -> Tensor:
    """relu(add(input, shortcut(x))), where the shortcut may end with a BatchNorm; arguments as above."""
    if bypass.why_watched(input) or _why_not_relu(relu):
        return relu(add(input, x if shortcut is None else shortcut(x)))
    residual, bn2 = _run(shortcut, x)
    if not _alike(input, residual):
        return relu(add(input, residual if bn2 is None else bn2(residual)))
    if bn2 is None:
        return functional.add_relu(input, residual)
    return modules.batch_norm_add_relu(bn2, residual, input)


def max_pool(pool: nn.Module, input: Tensor) -> Tensor:
    """pool(input); where activations are recomputed, without keeping indices."""
    if (
        not recomputation.is_on()
        or bypass.why_watched(input)
        or bypass.why_not(pool, nn.MaxPool2d)
        or pool.return_indices
    ):
        return pool(input)
    return functional.max_pool2d(
        input, pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode
    )


def early(shortcut: nn.Module, x: Tensor, bns: list[nn.Module]) -> EarlyShortcut:
    """The shortcut, run at once but for a BatchNorm at its end, which can wait for one operator.

    Args:
        bns: the BatchNorms of the main branch. One that also ends the shortcut does not wait: its running statistics
            see the shortcut first.
    """
    if bypass.why_watched(x) or bypass.why_not_projection(shortcut):
        return EarlyShortcut(shortcut(x), None)
    output, last = bypass.before_last(shortcut, x), shortcut[-1]
    if any(last is bn for bn in bns):
        return EarlyShortcut(batch_norm(last, output), None)
    return EarlyShortcut(output, last)


def _run(shortcut: Shortcut | None, x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """The output of the shortcut but for a BatchNorm at its end, and that BatchNorm."""
    if shortcut is None:
        return x, None
    if type(shortcut) is EarlyShortcut:
        return shortcut.output, shortcut.bn
    if bypass.why_not_projection(shortcut):
        return shortcut(x), None
    return bypass.before_last(shortcut, x), shortcut[-1]


def judge(module: nn.Module, site: Site, obstacle: str | None = None) -> Iterator[Verdict]:
    """The verdict on each BatchNorm of a site; ``obstacle`` is why the forward that has it does not run."""
    watched = bypass.why_watched(_A_TENSOR)
    obstacles = [reason for reason in (obstacle, watched) if reason is not None]
    bn = None if site.bn is None else module.get_submodule(site.bn)
    if bn is not None:
        obstacles += named(site.bn, bypass.why_not(bn, nn.BatchNorm2d))
    if site.relu is not None:
        obstacles += named(site.relu, bypass.why_not(module.get_submodule(site.relu), nn.ReLU))
    reason = "; ".join(obstacles) or None
    operator = BATCH_NORM_ADD_RELU if site.adds else BATCH_NORM_RELU if site.rectifies else BATCH_NORM
    yield from end_verdicts(module, site.bn, site.shortcut, operator, reason)


def end_verdicts(
    module: nn.Module, bn: str | None, shortcut: str | None, operator: str, reason: str | None
) -> Iterator[Verdict]:
    """The verdict on ``bn``, from its ``operator`` and ``reason``, and that on the BatchNorm that ends the shortcut."""
    main = None if bn is None else module.get_submodule(bn)
    end = None if shortcut is None else _last_batch_norm(module.get_submodule(shortcut))
    if end is not None:
        name = f"{shortcut}.{end}"
        sequential = module.get_submodule(shortcut)
        obstacles = named(shortcut, bypass.why_not(sequential, nn.Sequential))
        obstacles = obstacles or named(name, bypass.why_not_projection(sequential))
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


def named(name: str, reason: str | None) -> list[str]:
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


_A_TENSOR = Tensor()


def _why_not_relu(relu: Activation) -> str | None:
    return None if type(relu) is FunctionalReLU else bypass.why_not(relu, nn.ReLU)


def _alike(input: Tensor, residual: Tensor) -> bool:
    """Whether the residual can be added in the operator. torch also broadcasts and promotes: left to torch."""
    return input.shape == residual.shape and input.dtype == residual.dtype and input.device == residual.device
