"""Writes a forward anew so that BatchNorms and adds wait for what their output goes to.

    x = self.bn1(x)                  x = call_alone(True, self.bn1, x)
    x = self.act1(x)                 x = call_alone(True, self.act1, x)
    if self.downsample is not None:  if self.downsample is not None:
        y = self.downsample(y)           y = call(False, (x,), self.downsample, y)

``call``, ``call_alone``, ``add``, ``method`` and ``settle`` are those of :mod:`.deferred`, which decide at run time,
module by module, what a call is. The rewriting knows no module: it only shows that a value which may wait is used once,
and where. Everything else that the forward does, branches, loops, other calls and their order, stays the source's own.

Why the source, and not torch.fx or torch.export: a graph is what one run with one input did. It has no early return, no
branch on a shape or on ``training``, and whatever a forward does beside its tensors ran once while it was traced; each
of these would be lost, or the block refused. And tracing runs the user's code. Here nothing runs.

What is shown of every value that may wait, on every path:

- It lies in one local variable or on the way from one call to the next; a second name or use settles it first.
- It is used or settled once on every path: before a path on which it is not read, before and at the end of ``while``
  and of torch's own contexts, and of a ``for`` but for what waits for the next round. In a ``try``, and in a context
  that might swallow an exception, nothing waits.
- Where code runs before it is used, that is calls which are told of it (``held``) so that they can settle it. Before
  any other call, an assignment in place, a store to an attribute, a read of running statistics or a ``del`` it is
  settled.
- What is not known to run nothing is told of it too: ``look`` is given the operands of operators, conditions and
  subscripts, and ``attribute`` what an attribute is read of, and either settles it unless these are numbers, containers
  or the like. Names, constants, ``is`` and the attributes of self need no telling.
- ``now`` says that nothing runs between a call and the use of its result.
- Where an exception leaves the forward, what waits is settled (``abandoned``): it lies in a variable, if only a
  temporary one, wherever something might raise.

A forward that reads a property of its class is left alone. ``type(self)`` is the class that the module had.
"""

import __future__

import ast
import copy
import inspect
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from .deferred import HELPERS
from .remembered import recall, remember
from .source import Refused, definition
from .statements import Writer

_FACTORY = "_resnet_fused_factory"
_INNER = "_resnet_fused_inner"
_BODY = "_resnet_fused_body"
_ORIGINAL = "_resnet_fused_original"
_BASE = "_resnet_fused_base"
_ERROR = "_resnet_fused_error"
_STRANGE = (ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith, ast.Match, ast.Global, ast.Nonlocal)
_STRANGE_CALLS = ("locals", "vars", "eval", "exec", "globals", "dir")


class Rewritten(NamedTuple):
    """A function and its two rewritings.

    Attributes:
        me: the name of its first argument.
        arguments: the names of the others.
        inner: gives tensors, as the original does.
        open: may give a value that waits.
        body, open_body: the statements of each.
        waits: whether any value may wait in it.
        asks_classes: whether it compares the exact class of something else than its arguments.
        asks_self: whether it reads the class of self.
    """

    original: types.FunctionType
    me: str
    arguments: tuple[str, ...]
    inner: types.FunctionType
    open: types.FunctionType
    body: list[ast.stmt]
    open_body: list[ast.stmt]
    waits: bool
    asks_classes: bool
    asks_self: bool
    tree: ast.FunctionDef

    def closed(self, base: type, name: str) -> types.FunctionType:
        """What the class made of ``base`` has as ``name``: ``inner``, or what ``base`` has there by now.

        Where an exception leaves it nothing waits any more. That is a function around the body and not a ``try`` in it,
        in which torch.compile breaks no graph.
        """
        freevars = [name for name in self.original.__code__.co_freevars if name != "__class__"]
        code = _compiled(self.original.__code__, self.tree, _guarded(self.tree, name, freevars))
        return _function(self.original, code, {_BODY: self.inner, _ORIGINAL: self.original, _BASE: base})


class _Written(NamedTuple):
    """What a :class:`Rewritten` is made of, without the functions, which would keep their class alive."""

    inner: types.CodeType
    open: types.CodeType
    body: list[ast.stmt]
    open_body: list[ast.stmt]
    waits: bool
    asks_classes: bool
    asks_self: bool
    tree: ast.FunctionDef


# The attribute of a function with what was written of its code, or why that is refused.
_KNOWN = "_resnet_fused_written"


def rewritten(function: types.FunctionType) -> Rewritten:
    """The rewritings of a method.

    Raises:
        Refused: its source is not at hand or not its own, or it says something that is not known here.
    """
    found = recall(function, _KNOWN, function.__code__)
    if found is not None:
        known = found.value
    else:
        try:
            known = _write(function)
        except Refused as refusal:
            known = str(refusal)
        remember(function, _KNOWN, function.__code__, known)
    if isinstance(known, str):
        raise Refused(known)
    code = function.__code__
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return Rewritten(
        function,
        code.co_varnames[0],
        arguments,
        _function(function, known.inner, {}),
        _function(function, known.open, {}),
        known.body,
        known.open_body,
        known.waits,
        known.asks_classes,
        known.asks_self,
        known.tree,
    )


def _write(function: types.FunctionType) -> _Written:
    code = function.__code__
    if hasattr(function, "__wrapped__") or code.co_argcount == 0:
        raise Refused("it is wrapped by a decorator")
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise Refused("it is a generator or coroutine")
    tree = definition(function)
    if "getattr" in code.co_names and "getattr" not in function.__globals__:
        tree = _Attributes().visit(copy.deepcopy(tree))
    _check(tree, code.co_varnames[0])
    _check_classes(tree, code.co_varnames[0])
    bodies, waits, asks_self = [], False, False
    for is_open in (False, True):
        writer = Writer(function, tree, is_open)
        bodies.append(writer.body(tree.body))
        waits = waits or writer.waits
        asks_self = asks_self or writer.asks_self
    codes = [_compiled(code, tree, body) for body in bodies]
    return _Written(*codes, *bodies, waits, _asks_classes(tree), asks_self, tree)


def _guarded(tree: ast.FunctionDef, name: str, freevars: list[str]) -> list[ast.stmt]:
    args = tree.args
    given = [argument.arg for argument in (*args.posonlyargs, *args.args)]
    given += [f"*{args.vararg.arg}"] if args.vararg else []
    given += [f"{argument.arg}={argument.arg}" for argument in args.kwonlyargs]
    given += [f"**{args.kwarg.arg}"] if args.kwarg else []
    arguments = ", ".join(given)
    # torch.jit.script looks into the closure for what the source names.
    closure = f"if False: {', '.join(freevars)}" if freevars else ""
    body = ast.parse(f"""
{closure}
if {_BASE}.{name} is not {_ORIGINAL}:
    return {_BASE}.{name}({arguments})
try:
    return {_BODY}({arguments})
except BaseException as {_ERROR}:
    _resnet_fused_abandoned({_ERROR})
    raise
""").body
    for statement in body:
        for node in ast.walk(statement):
            ast.copy_location(node, tree)
    return body


class _Attributes(ast.NodeTransformer):
    """``getattr(module, "0")``, as torch.fx writes, as the attribute that it reads."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name("getattr"), args=[owner, ast.Constant(value=str() as name)], keywords=[]):
                return ast.copy_location(ast.Attribute(owner, name, ast.Load()), node)
        return node


def _classes_asked_for(tree: ast.AST) -> Iterator[ast.expr]:
    """The values of which the exact class is asked for, and not its name alone."""
    named = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in _NAMES_OF_CLASSES
    ]
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="type"), args=[value]) | ast.Attribute(value=value, attr="__class__"):
                if not any(node is one for one in named):
                    yield value


_NAMES_OF_CLASSES = ("__name__", "__qualname__", "__module__")


def _asks_classes(tree: ast.FunctionDef) -> bool:
    arguments = {argument.arg for argument in ast.walk(tree.args) if isinstance(argument, ast.arg)}
    return any(not (isinstance(value, ast.Name) and value.id in arguments) for value in _classes_asked_for(tree))


def _check_classes(tree: ast.FunctionDef, me: str) -> None:
    """Refuses what may ask for the class of ``me`` where that is not seen: by another name, or some other time."""
    if not any(True for _ in _classes_asked_for(tree)):
        return
    for node in ast.walk(tree):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.NamedExpr) and isinstance(value, ast.Name) and value.id == me:
            raise Refused(f"it gives {me} another name, and asks for a class")
        inner = isinstance(node, _RUN_LATER) or (isinstance(node, ast.FunctionDef) and node is not tree)
        if inner and any(True for _ in _classes_asked_for(node)):
            raise Refused(f"it asks for a class in a {type(node).__name__.lower()}")


_RUN_LATER = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _check(tree: ast.FunctionDef, me: str) -> None:
    for node in ast.walk(tree):
        strange = isinstance(node, _STRANGE) or type(node).__name__ in ("TryStar", "TypeAlias")
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None)
        if strange:
            raise Refused(f"its source has {type(node).__name__.lower()}, which is not known here")
        if isinstance(node, ast.Name) and (name in _STRANGE_CALLS or name.startswith("_resnet_fused")):
            raise Refused(f"it looks at its own variables ({name})")
        if isinstance(node, ast.Name) and name == me and not isinstance(node.ctx, ast.Load):
            raise Refused(f"it assigns to {me}")
        if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
            raise Refused(f"it uses {name!r}, whose name Python changes")


def _compiled(original: types.CodeType, tree: ast.FunctionDef, body: list[ast.stmt]) -> types.CodeType:
    """The code of the original with another body."""
    inner = copy.copy(tree)
    # By its own name it finds itself among the globals, as the original does.
    inner.name, inner.body, inner.decorator_list = _INNER, body, []
    # Defaults and annotations are values of the original, not to be computed again.
    inner.args, inner.returns = copy.deepcopy(tree.args), None
    inner.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    inner.args.kw_defaults = [None if default is None else ast.Constant(None) for default in tree.args.kw_defaults]
    for argument in ast.walk(inner.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    names = [*HELPERS, _BODY, _ORIGINAL, _BASE, *original.co_freevars]
    outer = ast.FunctionDef(
        name=_FACTORY,
        args=ast.arguments(
            posonlyargs=[], args=[ast.arg(name) for name in names], kwonlyargs=[], kw_defaults=[], defaults=[]
        ),
        body=[inner, ast.Return(ast.Name(inner.name, ast.Load()))],
        decorator_list=[],
    )
    if "type_params" in ast.FunctionDef._fields:
        outer.type_params = []
    module = ast.fix_missing_locations(ast.Module([ast.copy_location(outer, tree)], type_ignores=[]))
    flags = original.co_flags & _future_flags()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = compile(module, original.co_filename, "exec", flags=flags, dont_inherit=True)
    code = _code_within(_code_within(compiled, _FACTORY), _INNER)
    return code.replace(co_name=original.co_name, co_firstlineno=original.co_firstlineno, **_qualified(original))


def _code_within(code: types.CodeType, name: str) -> types.CodeType:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return next(constant for constant in inner if constant.co_name == name)


def _function(original: types.FunctionType, code: types.CodeType, names: dict[str, Any]) -> types.FunctionType:
    """The original with another code: the same globals, defaults, closure, and names."""
    cells = {name: types.CellType(value) for name, value in (HELPERS | names).items()}
    cells |= dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    function = types.FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    function.__kwdefaults__ = original.__kwdefaults__
    if hasattr(original, "__annotate__"):  # Python 3.14, where their values may not exist
        function.__annotate__ = original.__annotate__
    else:
        function.__annotations__ = original.__annotations__
    function.__doc__ = original.__doc__
    function.__qualname__, function.__module__ = original.__qualname__, original.__module__
    function.__dict__.update({name: value for name, value in vars(original).items() if name != _KNOWN})
    return function


def _qualified(code: types.CodeType) -> dict[str, str]:
    return {"co_qualname": code.co_qualname} if hasattr(code, "co_qualname") else {}  # Python 3.11


def _future_flags() -> int:
    flags = 0
    for name in __future__.all_feature_names:
        flags |= getattr(__future__, name).compiler_flag
    return flags
