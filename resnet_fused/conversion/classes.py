"""The class of a fused module: a subclass of the class it had, with its methods rewritten.

Changing a module's class is the whole conversion. Its parameters, submodules, hooks and attributes stay the very
objects they were, and it stays an instance of its class; changing the class back restores it.
"""

import abc
import copy
import copyreg
import inspect
import types
from collections.abc import Callable

from torch import nn
from torch.fx import GraphModule

from .. import tracing
from ..ops.recomputation import recompute as recomputation
from . import kinds
from .source import Refused, supers_by_class

# A class with one of these is copied or looked into by rules of its own, which a class made at run time may break.
_OWN_RULES = {
    "__reduce_ex__": object,
    "__reduce__": object,
    "__getnewargs_ex__": None,
    "__getnewargs__": None,
    "__getattribute__": object,
    "__getattr__": nn.Module,
}


class Fused(tracing.Scriptable):
    """First base of every fused class.

    Attributes:
        _fusion_base: the class the module had.
        _fusion_recompute: whether its methods run inside :class:`resnet_fused.recompute`, as ``fuse`` takes it.
        _fusion_originals: the methods that were rewritten, by name. Somebody may put others into the class.
        _fusion_forward: the forward among them.
        _fusion_open: the forward that may give a value that waits (:mod:`.deferred`); None where calling the class does
            more than to run the forward.
        _fusion_is_chain: whether it is a Sequential, whose open forward also takes a value that waits.
    """

    # No annotations: torch.jit would find them in the place of those of the base.

    def __init_subclass__(cls, **arguments):
        if "_fusion_base" in vars(cls) or not hasattr(cls, "_fusion_base"):
            # Ends here: a user's __init_subclass__ registers or checks classes of the user's, and this is none.
            return
        # FSDP and parametrizations make such a class, and anybody may.
        super().__init_subclass__(**arguments)
        if why_overridden(cls) is not None or cls.__call__ is not nn.Module.__call__:
            cls._fusion_open = None

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


class FusedGraphModule(Fused):
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


def check_class(cls: type[nn.Module]) -> None:
    """Refuses a class whose instances cannot change to a subclass made at run time and be the same otherwise."""
    if type(cls) not in (type, abc.ABCMeta):
        raise Refused(f"{cls.__name__} has a metaclass, {type(cls).__name__}")
    for name, home in _OWN_RULES.items():
        if name == "__reduce__" and issubclass(cls, GraphModule):
            home = GraphModule
        if inspect.getattr_static(cls, name, None) is not (None if home is None else vars(home)[name]):
            raise Refused(f"{cls.__name__} has a {name} of its own")
    for base in cls.__mro__:
        if not base.__module__.startswith("torch."):
            for name, member in vars(base).items():
                if isinstance(member, types.FunctionType) and supers_by_class(member):
                    raise Refused(f"{cls.__name__}.{name} looks for its base by the class of self, which would change")
    if cls in copyreg.dispatch_table:
        raise Refused(f"{cls.__name__} is registered with copyreg")


def known_class(base: type[nn.Module], originals: dict[str, Callable], recompute: bool | str) -> type[nn.Module] | None:
    """The fused class that is in use already; nothing but its modules keeps it, or it would keep ``base``."""
    for cls in base.__subclasses__():
        members = vars(cls)
        known = members.get("_fusion_base"), members.get("_fusion_originals"), members.get("_fusion_recompute")
        if known == (base, originals, recompute):
            return cls
    return None


def fused_class(
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
    first = FusedGraphModule if issubclass(base, GraphModule) else Fused
    return types.new_class(base.__name__, (first, base), exec_body=lambda namespace: namespace.update(members))


def are_replaced(cls: type[nn.Module]) -> bool:
    """Whether somebody put other methods into the base of a fused class since."""
    return any(getattr(cls._fusion_base, name, None) is not method for name, method in cls._fusion_originals.items())


def is_fused(module: nn.Module) -> bool:
    """Whether the class of ``module`` is one that :func:`fused_class` made, or a subclass of that."""
    return isinstance(module, Fused)


def is_changed(module: nn.Module) -> bool:
    """Whether the class of a fused module was changed since, to a subclass."""
    return "_fusion_base" not in vars(type(module))


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has, or had before it was fused."""
    return type(module)._fusion_base if is_fused(module) else type(module)


def why_overridden(cls: type[nn.Module]) -> str | None:
    """Why the rewritten methods of a fused class are not those of its subclass ``cls``; None where they are."""
    fused = next(base for base in cls.__mro__ if "_fusion_base" in vars(base))
    for name in fused._fusion_originals.keys() & vars(fused).keys():
        if inspect.getattr_static(cls, name) is not vars(fused)[name]:
            return f"its {name} is another one in the class {cls.__name__}"
    return None


def _recomputing(method: types.FunctionType, recompute: bool | str) -> types.FunctionType:
    context = recomputation.as_asked

    def run(self, *arguments, **named):
        with context(recompute):
            return method(self, *arguments, **named)

    return tracing.in_the_scope_of(method, run)


def _new(base: type[nn.Module], recompute: bool | str, parts: tuple[type[nn.Module], ...]) -> nn.Module:
    """An instance for pickle and deepcopy, fused again from the source that ``base`` has here; unfused without."""
    from .families import learn

    learn(parts)
    cls = _class_or_base(base, recompute)
    return cls.__new__(cls)


def _load_graph_module(recompute: bool | str, load: Callable, arguments: tuple) -> nn.Module:
    """A fused GraphModule for pickle."""
    from .families import learn

    module = load(*arguments)
    learn({type(part) for part in module.modules()})
    return _fuse_again(module, recompute)


def _fuse_again(module: nn.Module, recompute: bool | str) -> nn.Module:
    object.__setattr__(module, "__class__", _class_or_base(type(module), recompute))
    return module


def _class_or_base(base: type[nn.Module], recompute: bool | str) -> type[nn.Module]:
    from .methods import class_for

    try:
        return class_for(base, recompute)
    except Refused:
        return base
