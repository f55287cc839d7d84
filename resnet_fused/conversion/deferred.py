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

Nor may the strides tell: what is fused is what torch would put into the memory format of the input, that is where the
input has no gaps and lies in NCHW or channels_last, and both sides of an add alike. Anything else than a plain tensor
of floating values is torch's.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import bypass, functional, modules, tracing
from ..ops import backend, recomputation
from ..ops.torch_private import no_torch_function, peek_interpreter_stack
from . import families, kinds
from .classes import Fused, base_of
from .tameness import PLAIN, is_tame


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

    def waits(self) -> bool:
        """It is there already."""
        return False


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
            # Taken first: what raises is not run again by who cleans up behind it.
            self.output = modules.batch_norm_add_relu(self.norm, self.take(), relu=False)
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


# isinstance() makes a union of classes anew at every call.
_VALUES = (Deferred, Tensor)


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
            _settle_beside(held, function, args, kwargs)
        if len(args) != 1 or kwargs:
            return function(*map(settle, args), **kwargs)
        result = call_module(function, args[0])
    elif function is bypass.RELU or function is bypass.TORCH_RELU or function is bypass.TORCH_RELU_:
        result = None if _is_relu_seen() else _rectified(args[0])
        if result is None:
            for value in held:
                settle(value)
            return function(*map(settle, args), **kwargs)
    elif function is bypass.ADD and len(args) == 2 and not kwargs and not bypass.is_add_replaced():
        for value in held:
            settle(value)
        return add(now, operator.add, *args)
    else:
        for value in held:
            settle(value)
        return function(*map(settle, args), **kwargs)
    return result if now else fit_to_wait(result)


def call_alone(now: bool, function, value):
    """:func:`call` of one argument while nothing waits: what a forward has most of."""
    kind = kinds.OF_TORCH.get(type(function))
    if kind is not None:
        result = _call_known(function, kind, value)
    elif isinstance(function, nn.Module):
        result = call_module(function, value)
    else:
        return call(now, (), function, value)
    return result if now else fit_to_wait(result)


def _settle_beside(held: tuple, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Settles what may not wait while a module is called, for it would show in what that does."""
    waiting = [value for value in held if isinstance(value, Deferred)]
    if not waiting:
        return
    tame = not kwargs and all(_is_tensor(value) or type(value) in PLAIN for value in args)
    tame = tame and all(is_tame(part) and bypass.why_called(part) is None for part in module.modules())
    for value in waiting:
        if not (tame and value.owned and _apart(value, module, args)):
            value.settle()


def look(held: tuple, value, into: str):
    """The value, of which an operator asks something: of an object of the user's, that runs code of the user's.

    Args:
        held: values that wait meanwhile.
        into: what containers have without more: "truth" where it is only asked for its truth, its length or an item by
            index or key, "items" where it is searched; empty where it is an operand.
    """
    if not is_quiet(value, False, into):
        for one in held:
            settle(one)
    return value


def attribute(held: tuple, value):
    """The value, of which an attribute is read: as :func:`look`."""
    if not is_quiet(value, True, ""):
        for one in held:
            settle(one)
    return value


def is_quiet(value, read: bool, into: str) -> bool:
    """Whether a value runs no code of the user's where an operator asks it something.

    Args:
        read: whether an attribute of it is read.
        into: as for :func:`look`.
    """
    kind = type(value)
    if kind in PLAIN:
        return True
    if read:
        return _is_tensor(value) or kind.__module__.startswith("torch.nn.modules.")
    if not into:
        return False
    if kind in _CONTAINERS:
        return into == "truth" or (len(value) < 100 and all(type(item) in PLAIN for item in value))
    return _is_asked_of_torch(kind)


_CONTAINERS = (list, tuple, dict, range, set, frozenset)


def _is_asked_of_torch(kind: type) -> bool:
    """Whether truth, length and items of a class of modules are torch's matter, or Python's."""
    return issubclass(kind, nn.Module) and all(
        getattr(getattr(kind, name, None), "__module__", "torch.").startswith("torch.") for name in _ASKED
    )


_ASKED = ("__bool__", "__len__", "__getitem__", "__iter__", "__contains__", "items", "values", "keys", "children")


def abandoned(error: BaseException) -> None:
    """Settles what still waits in the frames that an exception leaves: who catches it finds what the original left."""
    trace = error.__traceback__
    while trace is not None:
        for value in list(trace.tb_frame.f_locals.values()):
            if isinstance(value, Deferred):
                value.settle()
        trace = trace.tb_next


def add(now: bool, add, left, right):
    """add(left, right), which waits where a ReLU may follow that it can run with.

    Args:
        now: as for :func:`call`.
        add: ``operator.add`` or ``operator.iadd``. What adds into a tensor that others hold does so at once.
    """
    one, other = isinstance(left, Deferred), isinstance(right, Deferred)
    owned = one and other and left.owned and right.owned
    into_its_own = add is operator.add or (one and (left.owned or left.waits()))
    if (
        into_its_own
        and (now or owned)
        and (one or _is_tensor(left))
        and (other or _is_tensor(right))
        and not bypass.is_add_replaced()
        and bypass.why_all_watched() is None
    ):
        return Sum(add, left, right, owned)
    return add(settle(left), settle(right))


def method(now: bool, name: str, value, *args):
    """value.name(*args), for a name of METHODS."""
    if name in _RELU_METHODS and not args:
        result = None if _is_relu_seen() else _rectified(value)
        if result is not None:
            return result
    elif name in _ADD_METHODS and len(args) == 1 and isinstance(value, Deferred) and not bypass.is_add_replaced():
        return add(now, _ADD_METHODS[name], value, args[0])
    return getattr(settle(value), name)(*map(settle, args))


_RELU_METHODS = ("relu", "relu_")
_ADD_METHODS = {"add": operator.add, "add_": operator.iadd}
METHODS = (*_RELU_METHODS, *_ADD_METHODS)


def call_module(module: nn.Module, value):
    """module(value), where both value and result may wait; the result must be used before anything else runs."""
    kind = families.kind_of(module)
    if kind is None:
        return _call_fused(module, value) if isinstance(module, Fused) else module(settle(value))
    return _call_known(module, kind, value)


def _call_known(module: nn.Module, kind: kinds.Kind, value):
    """The same of a module of that kind."""
    role = kind.role
    if role is kinds.FRESH:
        output = module(settle(value))
        return Fresh(output) if _is_tensor(output) and kinds.makes_fresh(module, kind) else output
    if not isinstance(value, _VALUES) or bypass.why_all_watched() is not None:
        tracing.notice(value)
        return module(settle(value))
    if kinds.why_not(module, kind) is not None:
        return module(settle(value))
    if role is kinds.NORM:
        return _normalized(module, kind, value)
    if role is kinds.RELU:
        result = _rectified(value)
        return module(settle(value)) if result is None else result
    if role is kinds.SAME and (kind.inactive is None or kind.inactive(module)):
        return value
    if role is kinds.CHAIN:
        return walk(module, value)
    if role is kinds.POOL:
        return _pooled(module, settle(value))
    return module(settle(value))


def _call_fused(module: Fused, value):
    """The same of a fused module, whose open forward may give a value that waits."""
    cls = type(module)
    if (
        not isinstance(value, _VALUES)
        or bypass.why_all_watched() is not None
        or cls._fusion_open is None
        or cls._fusion_base.forward is not cls._fusion_forward
        or bypass.why_called(module) is not None
    ):
        tracing.notice(value)
        return module(settle(value))
    try:
        return module._fusion_open(value if cls._fusion_is_chain else settle(value))
    except BaseException as error:
        abandoned(error)
        raise


def walk(chain: nn.Sequential, value):
    """What the children of a Sequential compute, one after another."""
    for module in chain:
        value = call_module(module, value)
    return value


def fit_to_wait(value):
    """The value, settled where it must not wait while other modules run."""
    return value.settle() if isinstance(value, Deferred) and not value.owned else value


def _normalized(bn: nn.Module, kind: kinds.Kind, value):
    owned, input = False, value
    if isinstance(value, Deferred):
        owned, input = value.owned, value.settle()
    if not _lies_plainly(input) or (kind.tail and input.dim() != 4):
        return bn(input)  # which gives strides of its own, or has an error of its own for it
    norm = bn if kind.norm is None else kind.norm(bn, input)
    if norm is None:
        return bn(input)
    value = Normalized(bn, norm, input, owned)
    for name in kind.tail:
        if hasattr(bn, name):
            value = call_module(getattr(bn, name), value)
    return value


def _is_relu_seen() -> bool:
    """Whether somebody would notice that a ReLU which is no module was not called."""
    return bypass.is_relu_replaced() or bypass.why_all_watched() is not None


def _pooled(pool: nn.MaxPool2d, input: Tensor) -> Tensor:
    """pool(input); where activations are recomputed, without keeping indices."""
    if not recomputation.is_on() or pool.return_indices:
        return pool(input)
    return functional.max_pool2d(
        input, pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode
    )


def _rectified(value) -> Tensor | None:
    """relu(value) in one operator with what waits; None where nothing does. Who calls has asked whether it may."""
    if type(value) is Normalized:
        return None if value.input is None else modules.batch_norm_add_relu(value.norm, value.take())
    if type(value) is not Sum or value.left is None:
        return None
    add, left, right = value.take()
    left = left.settle() if type(left) is Sum else left
    right = right.settle() if type(right) is Sum else right
    first = type(left) is Normalized and left.input is not None
    second = type(right) is Normalized and right.input is not None
    # What is added into has the strides that it had, whatever is added.
    into = add is operator.iadd
    if first and second:
        if _alike(left.input, right.input) and (into or left.input.stride() == right.input.stride()):
            return modules.dual_batch_norm_add_relu(left.norm, left.take(), right.norm, right.take())
    elif first:
        residual = settle(right)
        if _alike(left.input, residual) and (into or left.input.stride() == residual.stride()):
            return modules.batch_norm_add_relu(left.norm, left.take(), residual)
    elif second:
        residual = settle(left)
        if _alike(right.input, residual) and right.input.stride() == residual.stride():
            return modules.batch_norm_add_relu(right.norm, right.take(), residual)
    else:
        left, right = settle(left), settle(right)
        if _alike(left, right) and left.stride() == right.stride() and _lies_plainly(left):
            return functional.add_relu(left, right)
    return F.relu(add(settle(left), settle(right)))


def _alike(input: Tensor, residual: Tensor) -> bool:
    """Whether two tensors are added without broadcasting and promotion, which are left to torch."""
    return input.shape == residual.shape and input.dtype == residual.dtype and input.device == residual.device


def _lies_plainly(input: Tensor) -> bool:
    """Whether torch gives what it computes of ``input`` the strides of ``input``, and so do the operators.

    That is in NCHW or channels_last, without gaps, with the strides of the format for sizes of 1 too, which say nothing
    of where values are, but which torch and the operators take the format from.
    """
    if not _is_tensor(input) or input.dtype not in backend.DTYPES:
        return False
    if input.is_contiguous():
        return input.dim() < 4 or _has_strides_of(input, channels_last=False)
    if peek_interpreter_stack() is not None or input.dim() not in _CHANNELS_LAST:
        return False
    if not input.is_contiguous(memory_format=_CHANNELS_LAST[input.dim()]):
        return False
    return _has_strides_of(input, channels_last=True)


def _has_strides_of(input: Tensor, channels_last: bool) -> bool:
    """Whether a tensor without gaps has the strides of its format for sizes of 1 too."""
    shape = input.shape
    if 1 not in shape:
        return True
    if shape[0] == 1 and shape.count(1) == 1:  # a single image
        return input.stride(0) == input.numel()
    return input.stride() == _strides(input, channels_last)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _strides(input: Tensor, channels_last: bool) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    _, channels, *positions = input.shape
    strides, step = [], channels if channels_last else 1
    for size in reversed(positions):
        strides.insert(0, step)
        step *= size
    return (step, 1, *strides) if channels_last else (step * channels, step, *strides)


def _apart(value: Deferred, module: nn.Module, args: tuple) -> bool:
    """Whether ``module``, called with ``args``, neither sees nor changes the statistics of what waits in ``value``."""
    statistics = _statistics(value)
    if not statistics:
        return True
    trains = any(bn.training for bn in _norms(value))
    others = [one for one in args if isinstance(one, Tensor)] if trains else []
    for part in module.modules():
        if part._buffers and (trains or part.training):
            others += [buffer for buffer in part._buffers.values() if buffer is not None]
        if trains and part._parameters:
            others += [parameter for parameter in part._parameters.values() if parameter is not None]
    if torch.compiler.is_compiling():  # a graph knows who is who, and no storage
        return not any(one is other for one in statistics for other in others)
    return _storages(statistics).isdisjoint(_storages(others))


def _norms(value) -> list[nn.Module]:
    """The BatchNorms that wait in a value."""
    if isinstance(value, Sum):
        return [*_norms(value.left), *_norms(value.right)]
    return [value.bn] if isinstance(value, Normalized) and value.waits() else []


def _statistics(value) -> list[Tensor]:
    return [buffer for bn in _norms(value) for buffer in bn._buffers.values() if buffer is not None]


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors if tensor.layout is torch.strided}


def _is_tensor(value) -> bool:
    """A tensor on which torch's functions run nothing but themselves, or what stands for one."""
    kind = type(value)
    if kind is not Tensor and kind is not nn.Parameter:
        if isinstance(value, Deferred):
            return True
        own = getattr(kind, "__torch_function__", None)
        if not isinstance(value, Tensor) or own is not no_torch_function:
            return False
    return value.layout is torch.strided and not value.is_nested


# The names by which a rewritten forward knows these functions.
HELPERS = {
    "_resnet_fused_call": call,
    "_resnet_fused_call_alone": call_alone,
    "_resnet_fused_add": add,
    "_resnet_fused_method": method,
    "_resnet_fused_settle": settle,
    "_resnet_fused_look": look,
    "_resnet_fused_attribute": attribute,
    "_resnet_fused_class": base_of,
    "_resnet_fused_abandoned": abandoned,
    "_resnet_fused_operator": operator,
}
