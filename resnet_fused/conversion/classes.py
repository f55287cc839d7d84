"""The class of a fused module: a subclass of the class it had, with its methods rewritten.

Changing a module's class is the whole conversion. Its parameters, submodules, hooks and attributes stay the very
objects they were, and it stays an instance of its class; changing the class back restores it.
"""

import abc
import copyreg
import functools
import inspect
import types
from collections.abc import Callable

from torch import nn

from ..ops.recomputation import recompute as recomputation
from .kinds import KINDS
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


class Fused:
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

    _fusion_base: type[nn.Module]
    _fusion_recompute: bool | str
    _fusion_originals: dict[str, Callable]
    _fusion_forward: Callable
    _fusion_open: Callable | None
    _fusion_is_chain: bool

    def __init_subclass__(cls, **_):
        # Ends here: a user's __init_subclass__ registers or checks classes of the user's, and this is none.
        pass

    def __reduce_ex__(self, protocol):
        # pickle and deepcopy find classes by name, which a class made at run time does not have.
        reduced = super().__reduce_ex__(max(protocol, 2))
        # What is known of the classes of its parts must be known where it is loaded.
        parts = {type(part) for part in self.modules() if KINDS.get(id(type(part))) is not None}
        parts = sorted(
            (cls for cls in parts if not cls.__module__.startswith("torch.")), key=lambda cls: cls.__qualname__
        )
        return _new, (self._fusion_base, self._fusion_recompute, tuple(parts)), *reduced[2:]


def check_class(cls: type[nn.Module]) -> None:
    """Refuses a class whose instances cannot change to a subclass made at run time and be the same otherwise."""
    if type(cls) not in (type, abc.ABCMeta):
        raise Refused(f"{cls.__name__} has a metaclass, {type(cls).__name__}")
    for name, home in _OWN_RULES.items():
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
    members |= {"__module__": __name__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return types.new_class(base.__name__, (Fused, base), exec_body=lambda namespace: namespace.update(members))


def are_replaced(cls: type[nn.Module]) -> bool:
    """Whether somebody put other methods into the base of a fused class since."""
    return any(getattr(cls._fusion_base, name, None) is not method for name, method in cls._fusion_originals.items())


def is_fused(module: nn.Module) -> bool:
    """Whether the class of ``module`` is one that :func:`fused_class` made, and not a subclass of that."""
    return "_fusion_base" in vars(type(module))


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has, or had before it was fused."""
    return type(module)._fusion_base if is_fused(module) else type(module)


def _recomputing(method: types.FunctionType, recompute: bool | str) -> types.FunctionType:
    @functools.wraps(method)
    def run(self, *arguments, **named):
        with recomputation.as_asked(recompute):
            return method(self, *arguments, **named)

    return run


def _new(base: type[nn.Module], recompute: bool | str, parts: tuple[type[nn.Module], ...]) -> nn.Module:
    """An instance for pickle and deepcopy, fused again from the source that ``base`` has here; unfused without."""
    from .families import learn
    from .methods import class_for

    learn(parts)
    try:
        cls = class_for(base, recompute)
    except Refused:
        cls = base
    return cls.__new__(cls)
