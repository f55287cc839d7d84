"""The syntax tree of a function, proven to be the one that its code was compiled from."""

import ast
import functools
import linecache
import types
from collections.abc import Iterator

from .classes import Refused

# All that a run of the code depends on, and nothing that tells where the code stands.
_BEHAVIOUR = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")
_BEHAVIOUR += ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount")


def same_code(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two functions run the same instructions on the same names and constants."""
    # Python 3.11 also compares what warming up leaves in code when it compares two of them.
    alike = all(getattr(a, name) == getattr(b, name) for name in _BEHAVIOUR)
    return alike and len(a.co_consts) == len(b.co_consts) and all(map(_same_constant, a.co_consts, b.co_consts))


def _same_constant(a, b) -> bool:
    if isinstance(a, types.CodeType) and isinstance(b, types.CodeType):
        return same_code(a, b)
    return repr(a) == repr(b)  # 1 == True


def definition(function: types.FunctionType) -> ast.FunctionDef:
    """The ``def`` of ``function``.

    Raises:
        Refused: there is no source (as in ``python -c``), or the code is not what its source says: the file was edited
            since, or something rewrote the code.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise Refused("the source of its forward is not at hand, and nothing is fused unread")
    return _definition(code, "".join(lines))


@functools.lru_cache(maxsize=64)
def _definition(code: types.CodeType, source: str) -> ast.FunctionDef:
    try:
        tree, compiled = _compiled(source)
    except (SyntaxError, ValueError) as error:
        raise Refused(f"the source of its forward cannot be read ({error})") from error
    place = code.co_name, code.co_firstlineno
    # Compiled anew, the source must give the very code: a file may have been edited since it was imported.
    proven = any(_place(other) == place and same_code(other, code) for other in _codes(compiled))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _place_of_tree(node) == place]
    if not proven or len(found) != 1:
        raise Refused("its forward is not what its source says")
    return found[0]


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> tuple[ast.Module, types.CodeType]:
    return ast.parse(source), compile(source, "<source>", "exec", dont_inherit=True)


def words(node: ast.AST) -> str:
    """A piece of source in one short line, for a message."""
    line = ast.unparse(node).splitlines()[0]
    return f"`{line if len(line) <= 60 else line[:57] + '...'}`"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _place(code: types.CodeType) -> tuple[str, int]:
    return code.co_name, code.co_firstlineno


def _place_of_tree(node: ast.FunctionDef) -> tuple[str, int]:
    return node.name, min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
