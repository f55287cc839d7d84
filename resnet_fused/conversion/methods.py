"""Which methods of a class are rewritten."""

import ast
import inspect
import types

from torch import nn
from torch.fx import GraphModule

from .rewriting import Rewritten, rewritten
from .source import Refused

_ENTRIES = ("forward", "_forward")


def is_chain(cls: type[nn.Module]) -> bool:
    """Whether a class computes what ``nn.Sequential`` does."""
    if not issubclass(cls, nn.Sequential) or cls.__iter__ is not nn.Sequential.__iter__:
        return False
    return inspect.getattr_static(cls, "forward") is nn.Sequential.forward


def methods_of(cls: type[nn.Module]) -> dict[str, Rewritten]:
    """The rewritings of ``forward`` and of all methods that it, or another one named forward_..., may call.

    Methods that cannot be rewritten stay as they are.

    Raises:
        Refused: ``forward`` cannot be rewritten.
    """
    found: dict[str, Rewritten] = {}
    waiting = [name for name in _functions(cls) if name.startswith(_ENTRIES)]
    functions = _functions(cls)
    if "forward" not in functions:
        raise Refused("its forward is no plain function")
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        try:
            known = rewritten(functions[name])
        except Refused as refusal:
            if name == "forward":
                raise Refused(f"its forward: {refusal}") from refusal
            continue
        properties = sorted(name for name in _own(known) if _runs_code(inspect.getattr_static(cls, name, None)))
        if properties:
            # It may look at a BatchNorm whose output waits.
            if name == "forward":
                raise Refused(f"its forward reads the property {properties[0]}")
            continue
        found[name] = known
        for other in _own(known) - seen:
            if other in functions:
                seen.add(other)
                waiting.append(other)
    return found


class Methods:
    """What :func:`methods_of` gives, remembered for as long as no method can change."""

    def __init__(self):
        self._known: dict[type[nn.Module], dict[str, Rewritten] | Refused] = {}

    def of(self, cls: type[nn.Module]) -> dict[str, Rewritten]:
        """As :func:`methods_of`, which see."""
        if cls not in self._known:
            try:
                self._known[cls] = methods_of(cls)
            except Refused as refusal:
                self._known[cls] = refusal
        known = self._known[cls]
        if isinstance(known, Refused):
            raise known
        return known


def _functions(cls: type[nn.Module]) -> dict[str, types.FunctionType]:
    """The plain functions among the methods of a class, without those of torch's own."""
    functions: dict[str, types.FunctionType] = {}
    for base in reversed(cls.__mro__):
        for name, member in vars(base).items():
            own = isinstance(member, types.FunctionType) and not base.__module__.startswith("torch.")
            own = own or (name == "forward" and issubclass(base, GraphModule))
            if own and not (name.startswith("__") and name.endswith("__")):
                functions[name] = member
            else:
                functions.pop(name, None)
    static = {name for name in functions if not isinstance(inspect.getattr_static(cls, name), types.FunctionType)}
    return {name: function for name, function in functions.items() if name not in static}


def _runs_code(member) -> bool:
    """Whether to read a member of a class runs code of its own: a property, or the like."""
    plain = (types.FunctionType, staticmethod, classmethod, types.BuiltinFunctionType, type)
    return hasattr(type(member), "__get__") and not isinstance(member, plain)


def _own(method: Rewritten) -> set[str]:
    """The attributes of self that a method reads."""
    names = set()
    for statement in method.body:
        for node in ast.walk(statement):
            match node:
                case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner == method.me:
                    names.add(name)
                case ast.Call(
                    func=ast.Name(id="getattr" | "hasattr"),
                    args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_],
                ) if owner == method.me:
                    names.add(name)
    return names
