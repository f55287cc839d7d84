"""Which local variables of a function may be read again after a statement.

Says rather too much than too little: a loop, ``try`` or ``with`` keeps alive whatever is read anywhere in it.
"""

import ast
from collections.abc import Iterator


def loads(node: ast.AST) -> set[str]:
    """The names that are read anywhere in ``node``."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)} | {
        part.target.id
        for part in ast.walk(node)
        if isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name)
    }


def assigned(statement: ast.stmt) -> set[str]:
    """The names that a simple statement is sure to assign."""
    match statement:
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()) | ast.AugAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Delete():
            return {
                part.id for part in ast.walk(statement) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Del)
            }
    return set()


def blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The bodies of a compound statement."""
    for name in ("body", "orelse", "finalbody"):
        body = getattr(statement, name, None)
        if isinstance(body, list) and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield body
    for handler in getattr(statement, "handlers", ()):
        yield handler.body


class Liveness:
    """What is alive around each statement of a function.

    Attributes:
        after: for each statement, the names that may be read after it.
        at_start: for each body of an ``if`` (by ``id``), those that may be read from its start.
    """

    def __init__(self, body: list[ast.stmt]):
        self.after: dict[ast.stmt, frozenset[str]] = {}
        self.at_start: dict[int, frozenset[str]] = {}
        self._loops: list[frozenset[str]] = []
        self._block(body, frozenset())

    def _block(self, body: list[ast.stmt], live: frozenset[str]) -> frozenset[str]:
        for statement in reversed(body):
            self.after[statement] = live
            live = self._before(statement, live)
        self.at_start[id(body)] = live
        return live

    def _before(self, statement: ast.stmt, live: frozenset[str]) -> frozenset[str]:
        match statement:
            case ast.If(test=test, body=body, orelse=orelse):
                return self._block(body, live) | self._block(orelse, live) | loads(test)
            case ast.Return() | ast.Raise():
                return frozenset(loads(statement))
            case ast.Break() | ast.Continue():
                return self._loops[-1]
            case ast.FunctionDef() | ast.ClassDef():
                return live | loads(statement)
        bodies = list(blocks(statement))
        if not bodies:
            return (live - assigned(statement)) | loads(statement)
        around = live | loads(statement)
        loop = isinstance(statement, ast.For | ast.While)
        if loop:
            self._loops.append(around)
        for body in bodies:
            self._block(body, around)
        if loop:
            self._loops.pop()
        return around
