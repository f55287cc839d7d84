"""The syntax tree of a function, proven to be the one that its code was compiled from."""

import ast
import functools
import hashlib
import linecache
import types
import warnings
from collections.abc import Iterator


class Refused(Exception):
    """A module that cannot be fused; the message is the reason, for the report."""


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
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        return set(map(repr, a)) == set(map(repr, b))  # their order differs from run to run
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
    with warnings.catch_warnings():  # of the source, which Python gave when it was imported
        warnings.simplefilter("ignore")
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


def digest(function: types.FunctionType) -> str:
    """Sixteen digits that tell the statements of a function from any others, whatever their layout and comments.

    Raises:
        Refused: as :func:`definition`.
    """
    body = definition(function).body
    documented = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    text = "\n".join(ast.unparse(statement) for statement in body[documented:])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_known(function, digests: tuple[str, ...]) -> bool:
    """Whether a function is one that was read before, by its digest."""
    try:
        return isinstance(function, types.FunctionType) and digest(function) in digests
    except Refused:
        return False


def supers_by_class(function: types.FunctionType) -> bool:
    """Whether a method says ``super(self.__class__, self)``, which in a subclass finds the method itself."""
    names = function.__code__.co_names
    if "super" not in names or not {"__class__", "type"} & set(names):
        return False
    try:
        tree = definition(function)
    except Refused:
        return False
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="super"), args=[ast.Attribute(attr="__class__"), *_]):
                return True
            case ast.Call(func=ast.Name(id="super"), args=[ast.Call(func=ast.Name(id="type")), *_]):
                return True
    return False
