"""The values that a rewritten forward works with: BatchNorms and adds that wait for what their output goes to.

``relu(bn(x) + y)`` is three calls in a forward. In the rewritten one (:mod:`.rewriting`) the first gives a
:class:`Normalized`, which holds x, the second a :class:`Sum`, and the third finds both and runs one operator. Anything
else that the output goes to settles it: what waited runs, and the tensor is what it always was. All that decides is
asked at the moment of the call (:mod:`.kinds`, :mod:`resnet_fused.bypass`): hooks and modules put in later count.

A value that waits must not see a later state of what it holds, nor may anybody see that its BatchNorm has not run yet.
It is *owned* where nobody else can write its input, which a convolution has just made; such a value may wait while
modules run that cannot look at its BatchNorm (:mod:`.tameness`), as a projection shortcut does between the last
BatchNorm and the add. Any other waits only where the rewriting shows that nothing runs before it is used, which it
says with ``now``.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import bypass, functional, modules, tracing
from ..ops import recomputation
from . import families, kinds
from .classes import Fused
from .tameness import is_tame


class Deferred:
    """A value of which something is still to be done.

    Attributes:
        owned: whether it may wait while other modules run.
    """

    owned = False

    def settle(self) -> Tensor:
        """The tensor that the original forward has here; always the same one."""
        raise NotImplementedError  # each kind of value has its own, and this class no values


class Fresh(Deferred):
    """A tensor that a convolution has just made: done, and nobody else's."""

    def __init__(self, output: Tensor):
        self.output = output
        self.owned = True

    def settle(self) -> Tensor:
        """The tensor, which others may hold from now on."""
        self.owned = False
        return self.output


class Normalized(Deferred):
    """bn(input), still to be computed."""

    def __init__(self, bn: nn.Module, norm: object, input: Tensor, owned: bool):
        self.bn = bn
        self.norm = norm
        self.input = input
        self.owned = owned
        self.output: Tensor | None = None

    def settle(self) -> Tensor:
        """bn(input)."""
        if self.input is not None:
            self.output = modules.batch_norm_add_relu(self.norm, self.input, relu=False)
            self.take()
        return self.output

    def take(self) -> Tensor:
        """The input, for the operator that stands for this; a convolution's output is freed where nobody needs it."""
        input, self.input = self.input, None
        self.owned = False
        return input

    def waits(self) -> bool:
        """Whether it is still to be computed."""
        return self.input is not None


class Sum(Deferred):
    """left + right, still to be computed; ``add`` is ``operator.iadd`` where the original adds into left."""

    def __init__(self, add, left, right, owned: bool):
        self.add = add
        self.left = left
        self.right = right
        self.owned = owned
        self.output: Tensor | None = None

    def settle(self) -> Tensor:
        """left + right."""
        if self.left is not None:
            self.output = self.add(settle(self.left), settle(self.right))
            self.take()
        return self.output

    def take(self) -> tuple:
        """The function and both sides, for the operator that stands for this."""
        parts = self.add, self.left, self.right
        self.left = self.right = None
        self.owned = False
        return parts

    def waits(self) -> bool:
        """Whether it is still to be computed."""
        return self.left is not None


def settle(value):
    """The tensor that a value stands for; anything else as it is."""
    return value.settle() if isinstance(value, Deferred) else value


def call(now: bool, held: tuple, function, *args, **kwargs):
    """function(*args, **kwargs), where the first argument may be a value that waits and the result may be one.

    Args:
        now: whether nothing runs between this call and the use of its result.
        held: values that wait meanwhile and are used later.
        function: anything that can be called; known are modules (:mod:`.kinds`, fused ones) and torch's ReLU and add.
    """
    if isinstance(function, nn.Module):
        if held:
            return _call_beside(now, held, function, args, kwargs)
        if len(args) != 1 or kwargs:
            return function(*map(settle, args), **kwargs)
        result = call_module(function, args[0])
    elif function is F.relu or function is torch.relu or function is torch.relu_:
        result = _rectified(args[0])
        if result is None:
            return function(*map(settle, args), **kwargs)
    elif function is torch.add and len(args) == 2 and not kwargs:
        return add(now, operator.add, *args)
    else:
        for value in held:
            settle(value)
        return function(*map(settle, args), **kwargs)
    return result if now else fit_to_wait(result)


def _call_beside(now: bool, held: tuple, module: nn.Module, args: tuple, kwargs: dict):
    """The call of a module while values wait, which must not show in what it does."""
    tame = all(is_tame(part) and bypass.why_called(part) is None for part in module.modules())
    for value in held:
        if isinstance(value, Deferred) and not (tame and value.owned and _apart(value, module)):
            value.settle()
    try:
        return call(now, (), module, *args, **kwargs)
    except Exception:
        # Who catches it finds the running statistics that the original leaves.
        for value in held:
            settle(value)
        raise


def add(now: bool, add, left, right):
    """add(left, right), which waits where a ReLU may follow that it can run with.

    Args:
        now: as for :func:`call`.
        add: ``operator.add`` or ``operator.iadd``. What adds into a tensor that others hold does so at once.
    """
    into_its_own = add is operator.add or _waits(left) or _owned(left)
    if into_its_own and _is_tensor(left) and _is_tensor(right) and bypass.why_all_watched() is None:
        owned = _owned(left) and _owned(right)
        if now or owned:
            return Sum(add, left, right, owned)
    return add(settle(left), settle(right))


def method(now: bool, name: str, value, *args):
    """value.name(*args), for a name of METHODS."""
    if name in _RELU_METHODS and not args:
        result = _rectified(value)
        if result is not None:
            return result
    elif name in _ADD_METHODS and len(args) == 1 and isinstance(value, Deferred):
        return add(now, _ADD_METHODS[name], value, args[0])
    return getattr(settle(value), name)(*map(settle, args))


_RELU_METHODS = ("relu", "relu_")
_ADD_METHODS = {"add": operator.add, "add_": operator.iadd}
METHODS = (*_RELU_METHODS, *_ADD_METHODS)


def call_module(module: nn.Module, value):
    """module(value), where both value and result may wait; the result must be used before anything else runs."""
    if not _is_tensor(value) or bypass.why_all_watched() is not None:
        tracing.notice(value)
        return module(settle(value))
    if isinstance(module, Fused):
        if module._fusion_open is None or bypass.why_called(module) is not None:
            return module(settle(value))
        return module._fusion_open(value if module._fusion_is_chain else settle(value))
    kind = families.kind_of(module)
    if kind is None:
        return module(settle(value))
    role = kind.role
    if role == kinds.FRESH:
        output = module(settle(value))
        return Fresh(output) if kinds.makes_fresh(module, kind) and isinstance(output, Tensor) else output
    if kinds.why_not(module, kind) is not None:
        return module(settle(value))
    if role == kinds.NORM:
        return _normalized(module, kind, value)
    if role == kinds.RELU:
        result = _rectified(value)
        return module(settle(value)) if result is None else result
    if role == kinds.SAME and (kind.inactive is None or kind.inactive(module)):
        return value
    if role == kinds.CHAIN:
        return walk(module, value)
    if role == kinds.POOL:
        return _pooled(module, settle(value))
    return module(settle(value))


def walk(chain: nn.Sequential, value):
    """What the children of a Sequential compute, one after another."""
    for module in chain:
        value = call_module(module, value)
    return value


def fit_to_wait(value):
    """The value, settled where it must not wait while other modules run."""
    return value.settle() if isinstance(value, Deferred) and not value.owned else value


def _normalized(bn: nn.Module, kind: kinds.Kind, value):
    owned, input = _owned(value), settle(value)
    if kind.tail and input.dim() != 4:
        return bn(input)  # which has an error of its own for it
    norm = bn if kind.norm is None else kind.norm(bn, input)
    if norm is None:
        return bn(input)
    value = Normalized(bn, norm, input, owned)
    for name in kind.tail:
        if hasattr(bn, name):
            value = call_module(getattr(bn, name), value)
    return value


def _pooled(pool: nn.MaxPool2d, input: Tensor) -> Tensor:
    """pool(input); where activations are recomputed, without keeping indices."""
    if not recomputation.is_on() or pool.return_indices:
        return pool(input)
    return functional.max_pool2d(
        input, pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode
    )


def _rectified(value) -> Tensor | None:
    """relu(value) in one operator with what waits; None where nothing does."""
    if not _waits(value) or bypass.why_all_watched() is not None:
        return None
    if isinstance(value, Normalized):
        return modules.batch_norm_add_relu(value.norm, value.take())
    add, left, right = value.take()
    if isinstance(left, Sum):
        left = left.settle()
    if isinstance(right, Sum):
        right = right.settle()
    if _waits(left) and _waits(right):
        if _alike(left.input, right.input):
            return modules.dual_batch_norm_add_relu(left.norm, left.take(), right.norm, right.take())
    elif _waits(left):
        residual = settle(right)
        if _alike(left.input, residual):
            return modules.batch_norm_add_relu(left.norm, left.take(), residual)
    elif _waits(right):
        residual = settle(left)
        if _alike(right.input, residual):
            return modules.batch_norm_add_relu(right.norm, right.take(), residual)
    elif _alike(settle(left), settle(right)):
        return functional.add_relu(settle(left), settle(right))
    return F.relu(add(settle(left), settle(right)))


def _alike(input: Tensor, residual: Tensor) -> bool:
    """Whether two tensors are added without broadcasting and promotion, which are left to torch."""
    return input.shape == residual.shape and input.dtype == residual.dtype and input.device == residual.device


def _apart(value: Deferred, module: nn.Module) -> bool:
    """Whether no BatchNorm that waits in ``value`` is part of ``module``, which would update its statistics first."""
    if isinstance(value, Sum):
        return all(_apart(part, module) for part in (value.left, value.right) if isinstance(part, Deferred))
    if isinstance(value, Normalized) and value.bn.training:
        statistics = value.bn.running_mean
        return not any(
            part is value.bn or (statistics is not None and getattr(part, "running_mean", None) is statistics)
            for part in module.modules()
        )
    return True


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor | Deferred)


def _waits(value) -> bool:
    return isinstance(value, Normalized | Sum) and value.waits()


def _owned(value) -> bool:
    return isinstance(value, Deferred) and value.owned


# The names by which a rewritten forward knows these functions.
HELPERS = {
    "_resnet_fused_call": call,
    "_resnet_fused_add": add,
    "_resnet_fused_method": method,
    "_resnet_fused_settle": settle,
    "_resnet_fused_operator": operator,
}
