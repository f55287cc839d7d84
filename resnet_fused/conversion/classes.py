"""The class of a fused module: what tells it from others, and which classes can have one.

It is a subclass of the class that the module had, with its methods rewritten; :mod:`.fused_class` makes it. Changing a
module's class is the whole conversion. Its parameters, submodules, hooks and attributes stay the very objects they
were, and it stays an instance of its class; changing the class back restores it.
"""

import abc
import copyreg
import inspect
import types

from torch import nn
from torch.fx import GraphModule

from .. import tracing
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
