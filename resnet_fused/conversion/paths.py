"""Follows one way through a method: its statements and expressions, with what its variables are (:mod:`.flow`)."""

import ast
import builtins
import inspect
import operator
from typing import Any

import torch
from torch import nn

from .. import bypass
from .classes import base_of
from .deferred import is_quiet
from .followed import UNKNOWN, Bound, Either, Fresh, Items, Known, Unknown, either, waits
from .rewriting import Rewritten

_PATHS = 16
_MISSING = object()
_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
_PURE = {name: getattr(builtins, name) for name in ("len", "range", "enumerate", "zip", "list", "tuple", "reversed")}
_CONTENTS = ("items", "values", "keys", "children", "named_children")
NUMBERS = (bool, int, float, str, type(None))


class Path:
    """One way through a method, with the values of its variables on that way."""

    def __init__(self, frame, method: Rewritten, variables: dict[str, Any]):
        self.frame = frame
        self.method = method
        self.variables = variables
        self.state: str | None = None  # how a loop is left

    def fork(self) -> "Path":
        """The same way, to be gone on in another direction."""
        return Path(self.frame, self.method, dict(self.variables))

    def block(self, body: list[ast.stmt], paths: list["Path"], returned: list) -> list["Path"]:
        """The paths that go on behind a block."""
        for statement in body:
            going = [path for path in paths if path.state is None]
            stopped = [path for path in paths if path.state is not None]
            paths = stopped
            for path in going:
                paths = paths + path.statement(statement, returned)
            paths = _distinct(paths)[:_PATHS]
        return paths

    def seen(self) -> tuple:
        """What tells this way from another one that has come to the same place."""
        return self.state, tuple((name, _identity(value)) for name, value in sorted(self.variables.items()))

    def statement(self, statement: ast.stmt, returned: list) -> list["Path"]:
        """The ways on behind a statement; what it returns goes to ``returned``."""
        self.frame.flow.steps += 1
        match statement:
            case ast.Return(value=value):
                returned.append(Known(None) if value is None else self.value(value))
                return []
            case ast.Raise():
                return []
            case ast.If(test=test, body=body, orelse=orelse):
                truth = self.truth(test)
                if truth is not None:
                    return self.block(body if truth else orelse, [self], returned)
                return self.block(body, [self.fork()], returned) + self.block(orelse, [self], returned)
            case ast.For(target=target, iter=iterable, body=body, orelse=orelse):
                return self.loop(self.items(self.value(iterable)), target, body, orelse, returned)
            case ast.While(test=test, body=body, orelse=orelse):
                self.value(test)
                return self.loop(None, None, body, orelse, returned)
            case ast.With(items=items, body=body):
                for item in items:
                    self.value(item.context_expr)
                return self.block(body, [self], returned)
            case ast.Try(body=body, orelse=orelse, finalbody=final):
                return self.block([*body, *orelse, *final], [self], returned)
            case ast.Break():
                self.state = "break"
            case ast.Continue():
                self.state = "continue"
            case ast.Assign(targets=targets, value=value):
                value = self.value(value)
                for target in targets:
                    self.assign(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, self.value(value))
            case ast.AugAssign(target=target, value=value):
                self.value(value)
                self.assign(target, UNKNOWN)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                self.variables[name] = UNKNOWN
            case ast.Expr(value=value):
                self.value(value)
        return [self]

    def loop(self, items, target, body, orelse, returned) -> list["Path"]:
        """The ways on behind a loop over ``items``, or over some that are not known."""
        paths, left = [self], []
        for item in [UNKNOWN] if items is None else items:
            if target is not None:
                for path in paths:
                    path.assign(target, item)
            paths = self.block(body, paths, returned)
            left += [path for path in paths if path.state == "break"]
            paths = [path for path in paths if path.state != "break"]
            for path in paths:
                path.state = None
        paths = self.block(orelse, paths, returned)
        for path in left:
            path.state = None
        return (paths + left)[:_PATHS]

    def assign(self, target: ast.expr, value) -> None:
        """Gives a value to a variable, or its items to several."""
        match target:
            case ast.Name(id=name):
                self.variables[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                items = self.items(value)
                if items is None or len(items) != len(targets):
                    items = [UNKNOWN] * len(targets)
                for part, item in zip(targets, items, strict=True):
                    self.assign(part, item)

    def items(self, value) -> list | None:
        """The items of a container that is known, each known."""
        if isinstance(value, Items):
            return value.values
        if not isinstance(value, Known):
            return None
        container = value.value
        if isinstance(container, nn.ModuleDict):
            return [Known(key) for key in container]
        modules = isinstance(container, nn.ModuleList | nn.Sequential)
        if modules and not type(container).__iter__.__module__.startswith("torch.nn."):
            return None
        if isinstance(container, list | tuple | range) or modules:
            items = list(container)
            return [item if isinstance(item, Unknown) else Known(item) for item in items]
        return None

    # Expressions

    def truth(self, node: ast.expr) -> bool | None:
        """Whether a condition holds; None where that is not known."""
        match node:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = self.truth(operand)
                return None if truth is None else not truth
            case ast.BoolOp(op=op, values=values):
                deciding = isinstance(op, ast.Or)
                truths = []
                for value in values:
                    truths.append(self.truth(value))
                    if truths[-1] is deciding:
                        return deciding
                return None if None in truths else not deciding
        value = self.value(node)
        if not isinstance(value, Known):
            return None
        value = value.value
        if type(value) in (bool, int, float, str, type(None), list, tuple):
            return bool(value)
        if isinstance(value, nn.Module):
            length = getattr(type(value), "__len__", None)
            if length is None and not hasattr(type(value), "__bool__"):
                return True
            torchs = getattr(length, "__module__", "").startswith("torch.nn.")
            return len(value) > 0 if torchs else None
        return None

    def value(self, node: ast.expr):
        """What an expression gives."""
        match node:
            case ast.Constant(value=value):
                return Known(value)
            case ast.Name(id=name):
                return self.variable(name)
            case ast.Attribute(value=owner, attr=name):
                return self.attribute(self.value(owner), name)
            case ast.Subscript(value=container, slice=index):
                return self.item(self.value(container), self.value(index))
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return Items([self.value(item) for item in items])
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                self.variables[name] = self.value(value)
                return self.variables[name]
            case ast.IfExp(test=test, body=body, orelse=orelse):
                truth = self.truth(test)
                if truth is None:
                    return either([self.value(body), self.value(orelse)])
                return self.value(body if truth else orelse)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                return self.computed(_COMPARISONS[type(op)], left, right)
            case ast.BinOp(left=left, op=op, right=right):
                return self.computed(_ARITHMETIC.get(type(op)), left, right)
            case ast.UnaryOp(op=ast.Not()) | ast.BoolOp():
                truth = self.truth(node)
                return UNKNOWN if truth is None else Known(truth)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return Known(-number)
            case ast.Call():
                return self.call(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr) and not isinstance(node, ast.Lambda | ast.ListComp | ast.GeneratorExp):
                self.value(child)
        return UNKNOWN

    def computed(self, function, left: ast.expr, right: ast.expr):
        """A comparison, or arithmetic, of numbers that are known."""
        left, right = self.value(left), self.value(right)
        if function in (operator.is_, operator.is_not) and (_is_none(left) or _is_none(right)):
            other = left if _is_none(right) else right
            if waits(other) or isinstance(other, Fresh):
                return Known(function is operator.is_not)
        if function is None or not isinstance(left, Known) or not isinstance(right, Known):
            return UNKNOWN
        try:
            return Known(function(left.value, right.value))
        except Exception:
            return UNKNOWN

    def variable(self, name: str):
        """What a name stands for."""
        if name in self.variables:
            return self.variables[name]
        namespace = self.method.original.__globals__
        found = namespace.get(name, getattr(builtins, name, _MISSING))
        return UNKNOWN if found is _MISSING else Known(found)

    def attribute(self, owner, name: str):
        """What an attribute of a module is, without running code of its class."""
        if not isinstance(owner, Known):
            return UNKNOWN
        if not isinstance(owner.value, nn.Module):
            found = inspect.getattr_static(owner.value, name, _MISSING) if inspect.ismodule(owner.value) else _MISSING
            return UNKNOWN if found is _MISSING else Known(found)
        module = owner.value
        if name == "training" and self.frame.flow.hopeful:
            return UNKNOWN
        found = vars(module).get(name, module._modules.get(name, _MISSING))
        if found is _MISSING:
            found = inspect.getattr_static(base_of(module), name, _MISSING)
            if inspect.isfunction(found):
                return Bound(module, name)
        if name in module._parameters or name in module._buffers:
            empty = module._parameters.get(name) is None and module._buffers.get(name) is None
            return Known(None) if empty else UNKNOWN
        return Known(found) if isinstance(found, nn.Module) or _is_plain(found) else UNKNOWN

    def item(self, container, index):
        """An item of a container that is known."""
        items = self.items(container)
        if isinstance(container, Known) and isinstance(container.value, nn.ModuleDict) and isinstance(index, Known):
            return Known(container.value[index.value]) if index.value in container.value else UNKNOWN
        if items is not None and isinstance(index, Known) and type(index.value) is int:
            return items[index.value] if -len(items) <= index.value < len(items) else UNKNOWN
        return UNKNOWN

    def call(self, node: ast.Call):
        """What a call gives."""
        frame = self.frame
        if isinstance(node.func, ast.Name) and node.func.id.startswith("_resnet_fused_"):
            return self.helper(node.func.id.removeprefix("_resnet_fused_"), node.args)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _CONTENTS and not node.args:
            return self.contents(self.value(node.func.value), node.func.attr)
        function = self.value(node.func)
        args = [self.value(argument) for argument in node.args]
        for keyword in node.keywords:
            self.value(keyword.value)
        if isinstance(function, Bound) and not node.keywords:
            return frame.call_own(function, args)
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name in _PURE and function == Known(_PURE[name]) and not node.keywords:
            return self.pure(name, args)
        if name == "getattr" and len(args) > 1 and isinstance(args[1], Known):
            known = self.attribute(args[0], args[1].value)
            missing = isinstance(args[0], Known) and not _has(args[0].value, args[1].value)
            return args[2] if missing and len(args) > 2 else known
        if name == "hasattr" and isinstance(args[0], Known) and isinstance(args[1], Known):
            return Known(_has(args[0].value, args[1].value))
        if isinstance(function, Known) and function.value is torch.jit.is_scripting:
            return Known(False)
        return UNKNOWN

    def contents(self, owner, name: str):
        """What a container of modules has, by torch's own methods."""
        if not isinstance(owner, Known) or not isinstance(owner.value, nn.Module):
            return UNKNOWN
        method = getattr(type(owner.value), name, None)
        if not getattr(method, "__module__", "").startswith("torch.nn.modules."):
            return UNKNOWN
        found = list(getattr(owner.value, name)())
        pairs = name in ("items", "named_children")
        return Items([Items(list(map(Known, item))) if pairs else Known(item) for item in found])

    def pure(self, name: str, args: list):
        """What a function of Python's gives that only looks at its arguments."""
        if name == "range":
            numbers = [argument.value for argument in args if isinstance(argument, Known)]
            plain = len(numbers) == len(args) and all(type(number) is int for number in numbers)
            return Known(range(*numbers)) if plain else UNKNOWN
        if name == "len" and isinstance(args[0], Known) and isinstance(args[0].value, str):
            return Known(len(args[0].value))
        lists = [self.items(argument) for argument in args[:1]] if name == "enumerate" else list(map(self.items, args))
        if None in lists or not lists:
            return UNKNOWN
        if name == "len":
            return Known(len(lists[0]))
        if name == "enumerate":
            return Items([Items([Known(index), item]) for index, item in enumerate(lists[0])])
        if name == "zip":
            return Items([Items(list(row)) for row in zip(*lists, strict=False)])
        return Items(lists[0][::-1] if name == "reversed" else lists[0])

    def helper(self, name: str, nodes: list[ast.expr]):
        """A call of a function of :mod:`.deferred`."""
        frame = self.frame
        if name == "settle":
            value = self.value(nodes[0])
            return frame.settle(value, "other code than a ReLU or an add")
        if name == "class":
            owner = self.value(nodes[0])
            return Known(base_of(owner.value)) if isinstance(owner, Known) else UNKNOWN
        if name in ("look", "attribute"):
            value = self.value(nodes[1])
            quiet = runs_nothing(value, name == "attribute", nodes[-1].value if name == "look" else "")
            for held in () if quiet else nodes[0].elts:
                frame.settle(self.value(held), "other code that runs before it is used")
            return value
        now = nodes[0].value
        if name in ("call", "call_alone"):
            alone = name == "call_alone"
            function, *args = [self.value(node) for node in nodes[1 if alone else 2 :]]
            held = [] if alone else [self.value(value) for value in nodes[1].elts]
            is_relu = isinstance(function, Known) and function.value is bypass.RELU
            return frame.call(now, held, function, args[:1] if is_relu else args)
        if name == "add":
            return frame.add(now, nodes[1].attr == "iadd", self.value(nodes[2]), self.value(nodes[3]))
        args = [self.value(argument) for argument in nodes[2:]]
        if nodes[1].value in ("relu", "relu_"):
            if not frame.rectified(args[0], None):
                frame.settle(args[0], "a ReLU")
            return UNKNOWN
        return frame.add(now, nodes[1].value == "add_", *args)


def _distinct(paths: list[Path]) -> list[Path]:
    return list({path.seen(): path for path in paths}.values()) if len(paths) > 1 else paths


def runs_nothing(value, read: bool, into: str) -> bool:
    """Whether :func:`.deferred.attribute` (``read``) or :func:`.deferred.look` lets others wait beside a value.

    Of a value that is not known it depends on what that is: an attribute of a tensor and an item of a list do.
    """
    if isinstance(value, Known):
        return is_quiet(value.value, read, into)
    return bool(read or into) and isinstance(value, Unknown | Items)


def _identity(value):
    if isinstance(value, Known):
        plain = type(value.value) in NUMBERS
        return ("number", type(value.value), value.value) if plain else ("object", id(value.value))
    if isinstance(value, Either):
        return tuple(sorted(map(id, value.values)))
    return id(value)


def _is_plain(value, depth: int = 0) -> bool:
    if depth > 4:
        return False
    if isinstance(value, list | tuple):
        return all(isinstance(item, nn.Module) or _is_plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item, depth + 1) for item in (*value.keys(), *value.values()))
    return type(value) in NUMBERS


def _is_none(value) -> bool:
    return isinstance(value, Known) and value.value is None


def _has(owner, name) -> bool:
    """hasattr, without running a property."""
    if isinstance(owner, nn.Module) and name in {*owner._modules, *owner._parameters, *owner._buffers}:
        return True
    return inspect.getattr_static(owner, name, _MISSING) is not _MISSING
