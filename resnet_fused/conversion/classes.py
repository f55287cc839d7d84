"""The class of a fused module: a subclass of the class it had, with another forward.

Changing a module's class is the whole conversion. Its parameters, submodules, hooks and attributes stay the very
objects they were, and it stays an instance of its class; changing the class back restores it.
"""

import abc
import copyreg
import functools
import inspect
import types
from typing import Any

from torch import nn

from ..ops.recomputation import recompute as recomputation
from .sites import Site

# A class with one of these is copied or looked into by rules of its own, which a class made at run time may break.
_OWN_RULES = {
    "__reduce_ex__": object,
    "__reduce__": object,
    "__getnewargs_ex__": None,
    "__getnewargs__": None,
    "__getattribute__": object,
    "__getattr__": nn.Module,
}


class Refused(Exception):
    """A module that cannot be fused; the message is the reason, for the report."""


class Fused:
    """First base of every fused class. A family derives from it and gives a forward and :meth:`_fusion_sites`."""

    _fusion_base: type[nn.Module]
    _fusion_family: type["Fused"]
    _fusion_plan: Any
    _fusion_recompute: bool | str
    # Those that replace methods of the base, in vain where the instance has its own.
    _fusion_methods: tuple[str, ...] = ("forward",)

    def __init_subclass__(cls, **_):
        # Ends here: a user's __init_subclass__ registers or checks classes of the user's, and this is none.
        pass

    @classmethod
    def _fusion_sites(cls, module: nn.Module, plan) -> tuple[Site, ...]:
        """The places where this forward tries a fused operator for ``module``."""
        raise NotImplementedError

    @classmethod
    def _fusion_obstacle(cls, module: nn.Module, plan) -> str | None:
        """Why the fused forward does not run, or gives way to the original one; None where it runs."""
        for name in cls._fusion_methods:
            if name in vars(module):
                return f"its {name} was replaced on the instance"
        return None

    @classmethod
    def _fusion_members(cls, plan) -> dict[str, Any]:
        """What a class made for ``plan`` has beyond this one."""
        return {}

    def __reduce_ex__(self, protocol):
        # pickle and deepcopy find classes by name, which a class made at run time does not have.
        reduced = super().__reduce_ex__(max(protocol, 2))
        arguments = self._fusion_family, self._fusion_base, self._fusion_plan, self._fusion_recompute
        return _new, arguments, *reduced[2:]


def check_class(cls: type[nn.Module]) -> None:
    """Refuses a class whose instances cannot change to a subclass made at run time and be the same otherwise."""
    if type(cls) not in (type, abc.ABCMeta):
        raise Refused(f"{cls.__name__} has a metaclass, {type(cls).__name__}")
    for name, home in _OWN_RULES.items():
        if inspect.getattr_static(cls, name, None) is not (None if home is None else vars(home)[name]):
            raise Refused(f"{cls.__name__} has a {name} of its own")
    if cls in copyreg.dispatch_table:
        raise Refused(f"{cls.__name__} is registered with copyreg")


@functools.cache
def fused_class(family: type[Fused], base: type[nn.Module], plan, recompute: bool | str = False) -> type[nn.Module]:
    """The subclass of ``base`` with the forward of ``family``; always the same for the same arguments.

    Args:
        plan: what the forward needs to know beyond the class; hashable, and picklable if models are to be.
        recompute: whether activations are made again in backward, as :func:`resnet_fused.fuse` takes it.
    """
    members = family._fusion_members(plan)
    if recompute:
        own = {name: members.get(name, vars(family).get(name)) for name in family._fusion_methods}
        members = members | {
            name: _recomputing(method, recompute) for name, method in own.items() if method is not None
        }
    members |= {"_fusion_base": base, "_fusion_family": family, "_fusion_plan": plan, "_fusion_recompute": recompute}
    # The name of the original, so that printing a fused model reads as before.
    members |= {"__module__": __name__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return types.new_class(base.__name__, (family, base), exec_body=lambda namespace: namespace.update(members))


def is_fused(module: nn.Module) -> bool:
    """Whether the class of ``module`` is one that :func:`fused_class` made, and not a subclass of that."""
    return "_fusion_base" in vars(type(module))


def _recomputing(method: types.FunctionType, recompute: bool | str) -> types.FunctionType:
    @functools.wraps(method)
    def run(self, *arguments, **named):
        with recomputation.as_asked(recompute):
            return method(self, *arguments, **named)

    return run


def _new(family: type[Fused], base: type[nn.Module], plan, recompute: bool | str = False) -> nn.Module:
    cls = fused_class(family, base, plan, recompute)
    return cls.__new__(cls)
