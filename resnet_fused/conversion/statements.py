"""Writes the statements of a function anew (:mod:`.rewriting`)."""

import ast
import builtins
import contextlib
import copy
import types

import torch

from .deferred import METHODS
from .expressions import Expressions
from .liveness import Liveness, assigned, blocks
from .syntax import assign_settled, containers, frees, helper_call, is_plain, leaves, runs_nothing

_CONTEXTS = (
    torch.no_grad,
    torch.enable_grad,
    torch.inference_mode,
    torch.set_grad_enabled,
    torch.autocast,
    torch.profiler.record_function,
    contextlib.nullcontext,
)


class Writer:
    """Writes the body of one function anew."""

    def __init__(self, function: types.FunctionType, tree: ast.FunctionDef, is_open: bool):
        code = function.__code__
        self.globals = function.__globals__
        self.me = code.co_varnames[0]
        # What an inner function or lambda shares could be read at any time.
        self.locals = set(code.co_varnames) - set(code.co_cellvars) - {self.me}
        self.names = set(code.co_varnames) | set(code.co_cellvars) | set(code.co_freevars)
        self.is_open = is_open
        self.live = Liveness(tree.body)
        self.lazy: set[str] = set()
        self.bound: set[str] = {argument.arg for argument in ast.walk(tree.args) if isinstance(argument, ast.arg)}
        self.closed_region = 0  # depth of with and try
        self.waits = False
        self.temporaries = 0
        self.asks_self = False

    def body(self, body: list[ast.stmt], following: ast.stmt | None = None) -> list[ast.stmt]:
        """A block, behind which ``following`` runs next, if that is known."""
        written: list[ast.stmt] = []
        for index, statement in enumerate(body):
            after = next((other for other in body[index + 1 :] if not frees(other)), following)
            written += self.statement(statement, after)
            if isinstance(statement, ast.Return | ast.Raise | ast.Break | ast.Continue):
                self.lazy = set()
        return written

    def statement(self, statement: ast.stmt, following: ast.stmt | None) -> list[ast.stmt]:
        """What stands for a statement."""
        match statement:
            case ast.If():
                return self.branch(statement, following)
            case ast.FunctionDef() | ast.ClassDef():
                return [*self.settle_all(), statement]
        if any(True for _ in blocks(statement)):
            return self.region(statement)
        settled = self.settle_all() if isinstance(statement, ast.Break | ast.Continue) else []
        return [*settled, *self.simple(statement, following)]

    def branch(self, statement: ast.If, following: ast.stmt | None) -> list[ast.stmt]:
        """An ``if``; behind it a variable may wait if it may at the end of either way."""
        before, test = self.expression_of(statement, statement.test)
        lazy, bound = set(self.lazy), set(self.bound)
        ends = []
        for body in (statement.body, statement.orelse):
            self.lazy, self.bound = set(lazy), set(bound)
            # Not read on this path: it is computed here, or never.
            settled = [self.settled(name) for name in sorted(self.lazy - self.live.at_start[id(body)])]
            written = settled + self.body(body, following)
            ends.append((written, self.lazy, self.bound, leaves(body)))
        self.bound = set.intersection(*([names for _, _, names, gone in ends if not gone] or [bound]))
        self.lazy = set()
        for written, names, _, gone in ends:
            if not gone:
                unsure = names - self.bound
                written += [ast.copy_location(assign_settled(name), statement) for name in sorted(unsure)]
                self.lazy |= names - unsure
        new = ast.If(test=test, body=ends[0][0] or [ast.Pass()], orelse=ends[1][0])
        return [*before, ast.copy_location(new, statement)]

    def region(self, statement: ast.stmt) -> list[ast.stmt]:
        """A loop, ``with`` or ``try``: nothing waits across its borders, but from one round of a loop to the next.

        In a ``try`` nothing waits at all.
        """
        before = self.settle_all()
        if isinstance(statement, ast.For) and not statement.orelse and runs_nothing(statement.iter):
            return [*before, *self.rounds(statement)]
        new = copy.copy(statement)
        loop = isinstance(statement, ast.For | ast.While)
        # What swallows exceptions goes on behind a body that did not end.
        runs_through = loop or (isinstance(statement, ast.With) and all(map(self.is_plain_context, statement.items)))
        self.closed_region += not loop
        for name in ("iter", "test"):
            if hasattr(statement, name):
                _, expression = self.expression_of(statement, getattr(statement, name))
                setattr(new, name, expression)
        bound = set(self.bound)
        for name in ("body", "orelse", "finalbody"):
            body = getattr(statement, name, None)
            if body and runs_through:
                setattr(new, name, [*self.body(body), *self.settle_all()])
            self.bound = set(bound)
        self.closed_region -= not loop
        self.bound -= _unbound(statement)
        return [*before, new]

    def is_plain_context(self, item: ast.withitem) -> bool:
        """Whether a context is one of torch's, which let exceptions through."""
        call = item.context_expr
        function = self.named(call.func) if isinstance(call, ast.Call) else None
        return any(function is known for known in _CONTEXTS)

    def named(self, function: ast.expr):
        """The object that a name of the source's module, or one of torch's modules, stands for; None for any other."""
        if isinstance(function, ast.Name):
            if function.id in self.names:
                return None
            return self.globals.get(function.id, getattr(builtins, function.id, None))
        if isinstance(function, ast.Attribute):
            home = self.named(function.value)
            return vars(home).get(function.attr) if isinstance(home, types.ModuleType) else None
        return None

    def rounds(self, statement: ast.For) -> list[ast.stmt]:
        """A loop over items that are there already, where a value may wait for the next round."""
        _, iterable = self.expression_of(statement, statement.iter)
        bound, carried = set(self.bound), set()
        while True:
            self.lazy, self.bound = set(carried), set(bound)
            body = self.body(statement.body)
            more = self.lazy & bound
            if more <= carried:
                break
            carried |= more
        # The next round overwrites these.
        carried -= {part.id for part in ast.walk(statement.target) if isinstance(part, ast.Name)}
        if carried and not self.may_look_at(statement):
            carried = set()
        body += [self.settled(name) for name in sorted(self.lazy - carried)]
        if carried:
            # The next item comes from these, by code of a class if it is one of the user's.
            held = ast.Tuple([ast.Name(name, ast.Load()) for name in sorted(carried)], ast.Load())
            for container in containers(statement.iter):
                asked = helper_call("look", [held, container, ast.Constant("truth")], container)
                body.append(ast.copy_location(ast.Expr(asked), statement))
        self.lazy, self.bound = carried, bound - _unbound(statement)
        new = copy.copy(statement)
        new.iter, new.body = iterable, body
        dead = carried - self.live.after[statement]
        return [new, *(self.settled(name) for name in sorted(dead))]

    def may_look_at(self, statement: ast.For) -> bool:
        """Whether what a ``for`` goes through is still what its expression says at the end of a round."""
        names = {part.id for part in ast.walk(statement.iter) if isinstance(part, ast.Name)}
        written = {
            part.id for part in ast.walk(statement) if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)
        }
        attributes = any(
            isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load) for part in ast.walk(statement)
        )
        return names.isdisjoint(written) and not attributes

    def settle_all(self) -> list[ast.stmt]:
        """Settles every variable that may wait."""
        return [self.settled(name) for name in sorted(self.lazy)]

    def settled(self, name: str) -> ast.stmt:
        """Settles a variable."""
        self.lazy.discard(name)
        return assign_settled(name)

    def simple(self, statement: ast.stmt, following: ast.stmt | None) -> list[ast.stmt]:
        """A statement without others in it, and what must be settled before it."""
        before: list[ast.stmt] = []
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        if any(target is not None and not isinstance(target, ast.Name) for target in targets):
            # It may run code of a class.
            before += self.settle_all()
        if isinstance(statement, ast.Delete | ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
            before += self.settle_all()
        closed: set[ast.expr] = set()
        while True:
            attempt = Expressions(self, statement, closed)
            new, lazy = self.attempt(statement, following, attempt)
            if not attempt.early and attempt.closed == closed:
                break
            before += [self.settled(name) for name in sorted(attempt.early & self.lazy)]
            closed = set(attempt.closed)
        self.lazy -= attempt.used
        self.temporaries = attempt.temporaries
        self.waits = self.waits or attempt.waits
        names = assigned(statement)
        self.lazy -= names
        if isinstance(statement, ast.Delete):
            self.bound -= names
        else:
            self.bound |= names
        if lazy:
            self.lazy |= names
        return [*before, new]

    def attempt(self, statement, following, write: Expressions) -> tuple[ast.stmt, bool]:
        """The new statement, and whether the variable it assigns may wait."""
        new, lazy = copy.copy(statement), False
        match statement:
            case ast.Return(value=ast.expr() as value):
                open_here = self.is_open and not self.closed_region
                new.value = write.expression(value, now=True)[0] if open_here else write.value(value)
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ) if self.may_wait(name, statement):
                now = self.used_at_once(name, following)
                new.value, lazy = write.expression(value, now=now)
            case ast.AugAssign(target=ast.Name(id=name), op=ast.Add(), value=value) if name in self.lazy:
                if self.may_wait(name, statement):
                    now = self.used_at_once(name, following)
                    left = ast.copy_location(ast.Name(name, ast.Load()), statement)
                    new, lazy = write.add(statement, left, value, now, inplace=True)
                    target = ast.Name(name, ast.Store())
                    new = ast.copy_location(ast.Assign(targets=[target], value=new), statement)
                else:
                    write.early.add(name)
                    new.value = write.value(value)
            case _:
                for field, part in ast.iter_fields(statement):
                    setattr(new, field, write.part(part))
                if isinstance(statement, ast.AugAssign):
                    write.interrupt()  # it may write into a tensor that has another name too
        return ast.copy_location(new, statement), lazy

    def may_wait(self, name: str, statement: ast.stmt) -> bool:
        """Whether a value that waits may be put into the variable."""
        return name in self.locals and name in self.live.after[statement]

    def used_at_once(self, name: str, following: ast.stmt | None) -> bool:
        """Whether the next thing that runs uses the variable."""
        if isinstance(following, ast.AugAssign):
            sides = following.target, following.value
            added = isinstance(following.op, ast.Add) and all(map(is_plain, sides))
            return added and any(isinstance(side, ast.Name) and side.id == name for side in sides)
        value = getattr(following, "value", None)
        if not isinstance(following, ast.Assign | ast.AnnAssign | ast.Return) or value is None:
            return False
        match value:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=base), attr=method), args=args) if base == name:
                return method in METHODS and all(map(is_plain, args))
            case ast.Call(func=function, args=[ast.Name(id=first), *rest], keywords=keywords):
                others = [*rest, *(keyword.value for keyword in keywords)]
                return first == name and is_plain(function) and all(map(is_plain, others))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                sides = left, right
                plain = all(map(is_plain, sides))
                return plain and any(isinstance(side, ast.Name) and side.id == name for side in sides)
            case ast.Name(id=returned):
                return returned == name
        return False

    def expression_of(self, statement: ast.stmt, node: ast.expr) -> tuple[list[ast.stmt], ast.expr]:
        """An expression of a compound statement, and what must be settled before it."""
        before: list[ast.stmt] = []
        closed: set[ast.expr] = set()
        while True:
            attempt = Expressions(self, node, closed, after=frozenset(self.lazy))
            condition = isinstance(statement, ast.If | ast.While)
            new = attempt.truth(node) if condition else attempt.value(node)
            if not attempt.early and attempt.closed == closed:
                break
            before += [self.settled(name) for name in sorted(attempt.early & self.lazy)]
            closed = set(attempt.closed)
        self.temporaries = attempt.temporaries
        self.waits = self.waits or attempt.waits
        return before, new


def _unbound(statement: ast.stmt) -> set[str]:
    """The variables that a compound statement may leave without a value."""
    deleted = {part.id for part in ast.walk(statement) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Del)}
    return deleted | {part.name for part in ast.walk(statement) if isinstance(part, ast.ExceptHandler) and part.name}
