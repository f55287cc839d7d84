"""Writes the expressions of one statement anew (:mod:`.rewriting`)."""

import ast
import copy
import types

import torch

from .. import bypass
from .deferred import METHODS
from .liveness import assigned
from .syntax import asks_nothing, helper_call, is_operand, is_plain, raises_nothing, settle_call

_TEMPORARY = "_resnet_fused_value"
_FUNCTIONS = (*bypass.RELUS, bypass.ADD)
# What a BatchNorm changes when it runs.
_STATE = ("running_mean", "running_var", "num_batches_tracked")
# They run nothing of the user's.
_QUIET = (type, torch.jit.is_scripting, torch.jit.is_tracing)


class Expressions:
    """One attempt to write the expressions of a statement, for the Writer of its function (:mod:`.statements`).

    Attributes:
        early: the variables found to need settling before the statement; then the attempt is void.
        closed: the expressions found to need settling where they are; then too, if there are new ones.
        used: the variables whose value was used, once.
    """

    def __init__(self, writer, node: ast.AST, closed: set[ast.expr], after: frozenset[str] | None = None):
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

    def truth(self, node: ast.expr) -> ast.expr:
        """The expression of a condition."""
        new = self.value(node)
        return new if asks_nothing(node) else self.looked(new, "truth")

    def looked(self, node: ast.expr, into: str = "") -> ast.expr:
        """The expression, of whose value an operator asks something that may run code of a class.

        ``into``: as for :func:`.deferred.look`.
        """
        held = self.names_held()
        if not held or isinstance(node, ast.Constant):
            return node
        return helper_call("look", [ast.Tuple(held, ast.Load()), node, ast.Constant(into)], node)

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
                test = self.truth(test)
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
        if known is bypass.ADD:
            return len(args) == 2 and not keywords
        if known is bypass.RELU:
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
        if not held and len(arguments) == 1 and not node.keywords:
            return helper_call("call_alone", [ast.Constant(now), function, *arguments], node), True
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
        if not lazy or raises_nothing(right, self.writer.bound | {self.writer.me}):
            return self.operands((first, lazy), self.expression(right, now=True))
        if isinstance(first, ast.Name):
            self.held.append((first.id, None))
        else:
            self.temporaries += 1
            name = f"{_TEMPORARY}{self.temporaries}"
            first = ast.copy_location(ast.NamedExpr(ast.Name(name, ast.Store()), first), left)
            self.held.append((name, left))
        second = self.expression(right, now=True)
        self.held.pop()
        return self.operands((first, lazy), second)

    def operands(self, *pairs: tuple[ast.expr, bool]) -> tuple[tuple[ast.expr, bool], ...]:
        """The operands of an add, which may be told of what else waits."""
        return tuple((new if lazy else self.looked(new), lazy) for new, lazy in pairs)

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
        if self.is_class_of_self(node):
            self.writer.asks_self = True
            return helper_call("class", [ast.Name(self.writer.me, ast.Load())], node)
        lazily = isinstance(node, ast.BoolOp | ast.Compare | ast.NamedExpr)
        self.conditional += lazily
        new = copy.copy(node)
        for field, part in ast.iter_fields(node):
            setattr(new, field, self.part(part))
        self.conditional -= lazily
        self.tell(node, new)
        return new

    def is_class_of_self(self, node: ast.AST) -> bool:
        """Whether an expression is the class of self, which another one has been put in the place of."""
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr="__class__", ctx=ast.Load()):
                return name == self.writer.me
            case ast.Call(func=function, args=[ast.Name(id=name)], keywords=[]):
                return name == self.writer.me and self.writer.named(function) is type
        return False

    def tell(self, node: ast.AST, new) -> None:
        """Has what a part of the source asks of its operands told of what waits, or settles that first."""
        match node:
            case ast.Attribute(value=value, attr=name):
                if name in _STATE or name.startswith("__"):
                    self.interrupt()
                elif not self.is_quiet_owner(value) and self.names_held():
                    held = ast.Tuple(self.names_held(), ast.Load())
                    new.value = helper_call("attribute", [held, new.value], value)
            case ast.Compare(ops=ops):
                if not all(isinstance(op, ast.Is | ast.IsNot) for op in ops):
                    found = [isinstance(op, ast.In | ast.NotIn) for op in ops]
                    new.left = self.looked(new.left)
                    new.comparators = [
                        self.looked(part, "items" if within else "")
                        for part, within in zip(new.comparators, found, strict=True)
                    ]
            case ast.BoolOp(values=values):
                pairs = zip(values, new.values, strict=True)
                new.values = [part if asks_nothing(value) else self.looked(part, "truth") for value, part in pairs]
            case ast.UnaryOp(op=op, operand=operand):
                if not (isinstance(op, ast.Not) and asks_nothing(operand)):
                    new.operand = self.looked(new.operand, "truth" if isinstance(op, ast.Not) else "")
            case ast.BinOp():
                new.left, new.right = self.looked(new.left), self.looked(new.right)
            case ast.Subscript(slice=index):
                new.value = self.looked(new.value, "truth")
                if not isinstance(index, ast.Slice):
                    new.slice = self.looked(new.slice)
            case ast.FormattedValue():
                new.value = self.looked(new.value)
            case ast.Call(func=function, args=args):
                known = self.writer.named(function)
                if known is len and len(args) == 1:
                    new.args = [self.looked(new.args[0], "truth")]
                elif not self.is_quiet_call(known, args):
                    self.interrupt()
            case ast.Starred() | ast.Dict() | ast.Set() | ast.Slice():
                if not all(isinstance(part, ast.Constant) for part in ast.iter_child_nodes(node)):
                    self.interrupt()

    def is_quiet_owner(self, node: ast.expr) -> bool:
        """Whether to read an attribute of it runs no code: of self, and of a module of Python's."""
        if isinstance(node, ast.Name) and node.id == self.writer.me:
            return True
        return type(self.writer.named(node)) is types.ModuleType

    def is_quiet_call(self, function, args: list[ast.expr]) -> bool:
        """Whether a call runs no code of the user's."""
        if any(function is quiet for quiet in _QUIET):
            return True
        if function is isinstance and len(args) == 2:
            # A metaclass may have its own opinion.
            return type(self.writer.named(args[1])) in (type, type(torch.Tensor))
        if (function is getattr or function is hasattr) and len(args) >= 2:
            of_self = isinstance(args[0], ast.Name) and args[0].id == self.writer.me
            return of_self and isinstance(args[1], ast.Constant) and args[1].value not in _STATE
        return False

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
