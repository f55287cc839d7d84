"""The class of a fused module: a subclass of the class it had, with another forward.

Changing a module's class is the whole conversion. Its parameters, submodules, hooks and attributes stay the very
objects they were, and it stays an instance of its class; changing the class back restores it.
"""

import copyreg
import functools
import types
from typing import Any

from torch import nn

from .sites import Site


class Refused(Exception):
    """A module that cannot be fused; the message is the reason, for the report."""


class Fused:
    """First base of every fused class. A family derives from it and gives ``forward`` and :meth:`_fusion_sites`."""

    _fusion_base: type[nn.Module]
    _fusion_family: type["Fused"]
    _fusion_plan: Any

    @classmethod
    def _fusion_sites(cls, module: nn.Module) -> tuple[Site, ...]:
        """The places where this forward tries a fused operator for ``module``."""
        raise NotImplementedError

    @classmethod
    def _fusion_members(cls, plan) -> dict[str, Any]:
        """What a class made for ``plan`` has beyond this one."""
        return {}

    def __reduce_ex__(self, protocol):
        # pickle and deepcopy find classes by name, which a class made at run time does not have.
        reduced = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__:
            return reduced
        return _new, (self._fusion_family, self._fusion_base, self._fusion_plan), *reduced[2:]


@functools.cache
def fused_class(family: type[Fused], base: type[nn.Module], plan) -> type[nn.Module]:
    """The subclass of ``base`` with the forward of ``family``; always the same for the same arguments.

    Args:
        plan: what the forward needs to know beyond the class; hashable, and picklable if models are to be.
    """
    members = {"_fusion_base": base, "_fusion_family": family, "_fusion_plan": plan, **family._fusion_members(plan)}
    # The name of the original, so that printing a fused model reads as before.
    members |= {"__module__": __name__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    try:
        return types.new_class(base.__name__, (family, base), exec_body=lambda namespace: namespace.update(members))
    except TypeError as error:
        raise Refused(f"{base.__name__} cannot be subclassed: {error}") from error


def is_fused(module: nn.Module) -> bool:
    """Whether the class of ``module`` is one that :func:`fused_class` made, and not a subclass of that."""
    return "_fusion_base" in vars(type(module))


def _new(family: type[Fused], base: type[nn.Module], plan) -> nn.Module:
    cls = fused_class(family, base, plan)
    return cls.__new__(cls)
