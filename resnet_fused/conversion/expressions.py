"""Writes the expressions of one statement anew (:mod:`.rewriting`)."""

import ast
import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .deferred import METHODS
from .liveness import assigned
from .syntax import helper_call, is_operand, is_plain, settle_call

if TYPE_CHECKING:
    from .statements import Writer

_TEMPORARY = "_resnet_fused_value"
_FUNCTIONS = (F.relu, torch.relu, torch.relu_, torch.add)
# What a BatchNorm changes when it runs.
_STATE = ("running_mean", "running_var", "num_batches_tracked")
# They look at their arguments, as reading an attribute does.
_LOOKS = (getattr, hasattr, isinstance, len, type, torch.jit.is_scripting, torch.jit.is_tracing)


class Expressions:
    """One attempt to write the expressions of a statement.

    Attributes:
        early: the variables found to need settling before the statement; then the attempt is void.
        closed: the expressions found to need settling where they are; then too, if there are new ones.
        used: the variables whose value was used, once.
    """

    def __init__(self, writer: "Writer", node: ast.AST, closed: set[ast.expr], after: frozenset[str] | None = None):
        self.writer = writer
        self.lazy = set(writer.lazy)
        self.closed = set(closed)
        self.early: set[str] = set()
        self.used: set[str] = set()
        self.held: list[tuple[str, ast.expr | None]] = []
        self.conditional = 0
        self.temporaries = writer.temporaries
        self.waits = False
        names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)]
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        after = writer.live.after[node] - assigned(node) if after is None else after
        self.once = {name for name in names if names.count(name) == 1 and name not in after}

    def value(self, node: ast.expr) -> ast.expr:
        """The expression, giving what the original gives."""
        new, lazy = self.expression(node, now=not isinstance(node, ast.BinOp))
        return settle_call(new) if lazy else new

    def expression(self, node: ast.expr, now: bool) -> tuple[ast.expr, bool]:
        """The expression, and whether its value may wait. ``now``: whether it is used before anything else runs."""
        if node in self.closed:
            self.closed.discard(node)
            new = self.value(node)
            self.closed.add(node)
            return new, False
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if name in self.lazy:
                if name not in self.once or self.conditional:
                    self.early.add(name)
                    return node, False
                self.lazy.discard(name)
                self.used.add(name)
                return node, True
            case ast.Call(func=function, args=args, keywords=keywords):
                if self.is_module_call(function, args, keywords):
                    return self.call(node, now)
                if isinstance(function, ast.Attribute) and function.attr in METHODS and not keywords:
                    return self.method(node, function, args, now)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.add(node, left, right, now, inplace=False)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                test = self.value(test)
                self.conditional += 1
                (body, one), (orelse, other) = self.expression(body, now), self.expression(orelse, now)
                self.conditional -= 1
                return ast.copy_location(ast.IfExp(test, body, orelse), node), one or other
        return self.generic(node), False

    def is_module_call(self, function: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> bool:
        """Whether a call may be one of a module, or is one of a function that is known."""
        if not args or not is_plain(function) or any(isinstance(argument, ast.Starred) for argument in args):
            return False
        root = function
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if not isinstance(root, ast.Name):
            return False
        if root.id == self.writer.me:
            return root is not function and len(args) == 1 and not keywords
        if root.id in self.writer.names:
            return not isinstance(function, ast.Attribute) and len(args) == 1 and not keywords
        others = [*args[1:], *(keyword.value for keyword in keywords)]
        known = self.writer.named(function)
        if known is torch.add:
            return len(args) == 2 and not keywords
        if known is F.relu:
            return all(isinstance(other, ast.Constant) for other in others)
        return any(known is function for function in _FUNCTIONS) and not others

    def call(self, node: ast.Call, now: bool) -> tuple[ast.expr, bool]:
        """A call that :meth:`is_module_call` accepts."""
        if len(node.args) == 2 and not isinstance(node.args[1], ast.Constant):
            (left, held), (right, _) = self.both(*node.args)
            arguments, held = [left, right], []
            function = node.func
        else:
            function = self.generic(node.func)
            first, _ = self.expression(node.args[0], now=True)
            arguments, held = [first, *node.args[1:]], self.names_held()
        self.waits = True
        head = [ast.Constant(now), ast.Tuple(held, ast.Load()), function]
        return helper_call("call", [*head, *arguments], node, node.keywords), True

    def method(self, node: ast.Call, function: ast.Attribute, args: list[ast.expr], now: bool) -> tuple[ast.expr, bool]:
        """A call of a method of METHODS, if that is one of a value that may wait."""
        owner = function.value
        tensor = isinstance(owner, ast.Call | ast.BinOp) or (isinstance(owner, ast.Name) and owner.id in self.lazy)
        if not tensor or len(args) > 1 or any(isinstance(argument, ast.Starred) for argument in args):
            return self.generic(node), False
        if args:
            (value, lazy), (argument, other) = self.both(owner, args[0])
            arguments = [settle_call(argument) if other and not lazy else argument]
        else:
            (value, lazy), arguments = self.expression(owner, now=True), []
        if lazy:
            self.waits = True
            head = [ast.Constant(now), ast.Constant(function.attr), value]
            return helper_call("method", [*head, *arguments], node), True
        called = ast.copy_location(ast.Attribute(value, function.attr, ast.Load()), function)
        self.interrupt()
        return ast.copy_location(ast.Call(called, arguments, []), node), False

    def both(self, left: ast.expr, right: ast.expr) -> tuple[tuple[ast.expr, bool], tuple[ast.expr, bool]]:
        """Two operands, the first of which may wait while the second is computed."""
        first, lazy = self.expression(left, now=is_plain(right))
        if not lazy or is_plain(right):
            return (first, lazy), self.expression(right, now=True)
        if isinstance(first, ast.Name):
            self.held.append((first.id, None))
        else:
            self.temporaries += 1
            name = f"{_TEMPORARY}{self.temporaries}"
            first = ast.copy_location(ast.NamedExpr(ast.Name(name, ast.Store()), first), left)
            self.held.append((name, left))
        second = self.expression(right, now=True)
        self.held.pop()
        return (first, lazy), second

    def add(self, node, left: ast.expr, right: ast.expr, now: bool, inplace: bool) -> tuple[ast.expr, bool]:
        """A sum."""
        (new_left, one), (new_right, other) = self.both(left, right)
        if not (one or other or now) or not (one or other or (is_operand(left) and is_operand(right))):
            return ast.copy_location(ast.BinOp(new_left, ast.Add(), new_right), node), False
        function = ast.Attribute(
            ast.Name("_resnet_fused_operator", ast.Load()), "iadd" if inplace else "add", ast.Load()
        )
        self.waits = True
        return helper_call("add", [ast.Constant(now), function, new_left, new_right], node), True

    def names_held(self) -> list[ast.expr]:
        """The variables that may wait while a call runs, which is told of them."""
        names = [*sorted(self.lazy), *(name for name, _ in self.held)]
        return [ast.Name(name, ast.Load()) for name in names]

    def generic(self, node):
        """Any part of the source, its expressions written, giving what the original gives."""
        if isinstance(node, list):
            return [self.generic(part) for part in node]
        if not isinstance(node, ast.AST) or isinstance(node, ast.expr_context | ast.operator | ast.Constant):
            return node
        if isinstance(node, ast.Name):
            if node.id in self.lazy and isinstance(node.ctx, ast.Load):
                self.early.add(node.id)
            return node
        inner = isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
        if inner:
            # Runs some other time, or often: left as it is, with nothing waiting around it.
            self.interrupt()
            return node
        if isinstance(node, ast.NamedExpr) and node.target.id in self.lazy:
            self.early.add(node.target.id)
        lazily = isinstance(node, ast.BoolOp | ast.Compare | ast.NamedExpr)
        self.conditional += lazily
        new = copy.copy(node)
        for field, part in ast.iter_fields(node):
            setattr(new, field, self.part(part))
        self.conditional -= lazily
        looks = isinstance(node, ast.Call) and any(self.writer.named(node.func) is function for function in _LOOKS)
        reads = isinstance(node, ast.Attribute) and node.attr in _STATE
        if reads or (isinstance(node, ast.Call) and not looks):
            self.interrupt()
        return new

    def part(self, part):
        """The same, where an expression may be a call that is known."""
        if isinstance(part, list):
            return [self.part(item) for item in part]
        return self.value(part) if isinstance(part, ast.expr) else self.generic(part)

    def interrupt(self) -> None:
        """Something unknown runs: nothing may wait meanwhile."""
        self.early |= self.lazy
        for name, node in self.held:
            if node is None:
                self.early.add(name)
            else:
                self.closed.add(node)
