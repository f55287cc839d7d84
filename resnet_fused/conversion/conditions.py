"""Decides the branches of a forward that depend on its module alone, and remembers what they depend on."""

import ast
import builtins
import operator
from typing import Any

from torch import nn

from . import attributes
from .classes import Refused
from .source import words

_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


class Conditions:
    """Evaluates conditions on constants, on attributes that are constants, and on which submodules there are.

    Attributes:
        seen: the attributes they read, with what they can tell of them (:func:`attributes.seen`).
    """

    def __init__(self, module: nn.Module, me: str, names: tuple[str, ...], namespace: dict[str, Any]):
        self.module = module
        self.me = me
        self.seen: dict[str, Any] = {}
        # A module may have a len of its own.
        self.has_len = "len" not in names and namespace.get("len", builtins.len) is builtins.len

    def holds(self, test: ast.expr) -> bool:
        """Whether a branch is taken.

        Raises:
            Refused: that depends on more, or cannot be told.
        """
        try:
            return _truth(self.value(test), test)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise _undecided(test) from error

    def value(self, node: ast.expr) -> Any:
        """The constant or submodule that an expression gives."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Tuple(elts=items):
                return tuple(self.constant(item) for item in items)
            case ast.List(elts=items):
                return [self.constant(item) for item in items]
            case ast.Attribute(value=ast.Name(id=self.me), attr=name):
                value = attributes.read(self.module, name)
                self.seen[name] = attributes.seen(value)
                return value
            case ast.Call(func=ast.Name(id="len"), args=[container], keywords=[]) if self.has_len:
                value = self.value(container)
                if type(value) in (nn.Sequential, tuple, str):
                    return len(value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not _truth(self.value(operand), operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.constant(operand)
            case ast.BoolOp(op=op, values=values):
                for item in values:
                    value = self.value(item)
                    if _truth(value, item) == isinstance(op, ast.Or):
                        break
                return value
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self.constant(left), self.constant(right))
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as op], comparators=[ast.Constant(value=None)]):
                return (self.value(left) is None) == isinstance(op, ast.Is)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                return _COMPARISONS[type(op)](self.constant(left), self.constant(right))
        raise _undecided(node)

    def constant(self, node: ast.expr) -> Any:
        """The value of an expression that is no submodule, which could compare in its own way."""
        value = self.value(node)
        if isinstance(value, nn.Module):
            raise _undecided(node)
        return value


def _truth(value: Any, node: ast.expr) -> bool:
    if not isinstance(value, nn.Module):
        return bool(value)
    if type(value) is nn.Sequential:
        return len(value) > 0
    if hasattr(type(value), "__bool__") or hasattr(type(value), "__len__"):
        raise _undecided(node)
    return True


def _undecided(node: ast.expr) -> Refused:
    return Refused(f"its forward branches on {words(node)}: known are constants and which submodules it has")
