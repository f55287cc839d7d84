"""Makes fused classes, and their modules again where these are copied or pickled."""

import copy
import types
from collections.abc import Callable

from torch import nn
from torch.fx import GraphModule

from .. import tracing
from ..ops.recomputation import recompute as recomputation
from . import families, kinds
from .classes import Fused, are_replaced, check_class, is_changed
from .deferred import abandoned, settle, walk
from .methods import is_chain, methods_of
from .source import Refused


class FusedModule(Fused):
    """First base of every fused class, which knows how its modules are pickled and copied."""

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(max(protocol, 2))
        if is_changed(self):
            return reduced
        # pickle and deepcopy find classes by name, which a class made at run time does not have.
        # What is known of the classes of its parts must be known where it is loaded.
        parts = {type(part) for part in self.modules() if kinds.known(type(part)) is not None}
        parts = sorted(
            (cls for cls in parts if not cls.__module__.startswith("torch.")), key=lambda cls: cls.__qualname__
        )
        return _new, (self._fusion_base, self._fusion_recompute, tuple(parts)), *reduced[2:]


class FusedGraphModule(FusedModule):
    """First base of the fused class of a ``torch.fx.GraphModule``.

    A GraphModule has a class of its own, into which it compiles its forward, and from which it is copied and pickled.
    That stays ``_fusion_base``: what makes code or copies does so with a module of that class, and fuses the result.
    """

    def recompile(self):
        """As ``GraphModule.recompile``; the new forward is fused, where it can be."""
        if is_changed(self):
            return super().recompile()
        recompute = self._fusion_recompute
        object.__setattr__(self, "__class__", self._fusion_base)
        code = self.recompile()
        _fuse_again(self, recompute)
        return code

    def _unfused(self):
        """A module of the same attributes, which it shares, that is not fused."""
        plain = object.__new__(self._fusion_base)
        object.__setattr__(plain, "__dict__", self.__dict__)
        return plain

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = _fuse_again(copy.deepcopy(self._unfused(), memo), self._fusion_recompute)
        return copied

    def __copy__(self):
        return _fuse_again(copy.copy(self._unfused()), self._fusion_recompute)

    def __reduce_ex__(self, protocol):
        load, arguments = self._unfused().__reduce__()
        return _load_graph_module, (self._fusion_recompute, load, arguments)


def class_for(base: type[nn.Module], recompute: bool | str) -> type[nn.Module]:
    """The fused class for modules of class ``base``; always the same for as long as it is in use.

    Raises:
        Refused: there is none, with the reason.
    """
    for cls in base.__subclasses__():  # nothing but its modules keeps a fused class, or it would keep ``base``
        members = vars(cls)
        mine = members.get("_fusion_base") is base and members.get("_fusion_recompute") == recompute
        if mine and not are_replaced(cls):
            return cls
    check_class(base)
    if is_chain(base):
        return _fused_class(base, {"forward": _CHAIN}, {"forward": _chain_forward}, walk, True, recompute)
    methods = methods_of(base)
    originals = {name: method.original for name, method in methods.items()}
    changed = {name: method for name, method in methods.items() if method.waits or method.asks_self}
    closed = {name: method.closed(base, name) for name, method in sorted(changed.items())}
    return _fused_class(base, originals, closed, methods["forward"].open, False, recompute)


_CHAIN = nn.Sequential.forward


@tracing.scripted_as(nn.Sequential.forward)
def _chain_forward(self, input):
    """What the children compute one after another."""
    if self._fusion_base.forward is not _CHAIN:
        return self._fusion_base.forward(self, input)
    try:
        return settle(walk(self, input))
    except BaseException as error:
        abandoned(error)
        raise


def _fused_class(
    base: type[nn.Module],
    originals: dict[str, Callable],
    methods: dict[str, types.FunctionType],
    opened: types.FunctionType,
    is_chain: bool,
    recompute: bool | str,
) -> type[nn.Module]:
    """The subclass of ``base`` with other methods.

    Args:
        base: the class that the modules have.
        originals: the methods of ``base`` that were rewritten.
        methods: those that take their place.
        opened: the open forward.
        is_chain: whether that takes values that wait.
        recompute: whether activations are made again in backward, as :func:`resnet_fused.fuse` takes it.
    """
    members = {**methods, "_fusion_open": opened}
    if recompute:
        members = {name: _recomputing(method, recompute) for name, method in members.items()}
    if base.__call__ is not nn.Module.__call__:
        members["_fusion_open"] = None
    members |= {"_fusion_base": base, "_fusion_recompute": recompute, "_fusion_is_chain": is_chain}
    members |= {"_fusion_originals": originals, "_fusion_forward": originals["forward"]}
    # The name of the original, so that printing a fused model reads as before.
    members |= {"__qualname__": base.__qualname__, "__doc__": base.__doc__}
    # torch treats what it believes to be its own otherwise.
    members["__module__"] = __name__ if base.__module__.startswith("torch.") else base.__module__
    first = FusedGraphModule if issubclass(base, GraphModule) else FusedModule
    return types.new_class(base.__name__, (first, base), exec_body=lambda namespace: namespace.update(members))


def _recomputing(method: types.FunctionType, recompute: bool | str) -> types.FunctionType:
    context = recomputation.as_asked

    def run(self, *arguments, **named):
        with context(recompute):
            return method(self, *arguments, **named)

    return tracing.in_the_scope_of(method, run)


def _new(base: type[nn.Module], recompute: bool | str, parts: tuple[type[nn.Module], ...]) -> nn.Module:
    """An instance for pickle and deepcopy, fused again from the source that ``base`` has here; unfused without."""
    families.learn(parts)
    cls = _class_or_base(base, recompute)
    return cls.__new__(cls)


def _load_graph_module(recompute: bool | str, load: Callable, arguments: tuple) -> nn.Module:
    """A fused GraphModule for pickle."""
    module = load(*arguments)
    families.learn({type(part) for part in module.modules()})
    return _fuse_again(module, recompute)


def _fuse_again(module: nn.Module, recompute: bool | str) -> nn.Module:
    object.__setattr__(module, "__class__", _class_or_base(type(module), recompute))
    return module


def _class_or_base(base: type[nn.Module], recompute: bool | str) -> type[nn.Module]:
    try:
        return class_for(base, recompute)
    except Refused:
        return base
