"""Pieces of syntax trees that the rewriting asks about and makes."""

import ast


def helper_call(name: str, arguments: list[ast.expr], node: ast.AST, keywords=()) -> ast.expr:
    """A call of a function of :mod:`.deferred`."""
    function = ast.Name(f"_resnet_fused_{name}", ast.Load())
    return ast.copy_location(ast.Call(function, arguments, list(keywords)), node)


def settle_call(node: ast.expr) -> ast.expr:
    """``settle(node)``."""
    return helper_call("settle", [node], node)


def assign_settled(name: str) -> ast.stmt:
    """``name = settle(name)``."""
    return ast.Assign(targets=[ast.Name(name, ast.Store())], value=settle_call(ast.Name(name, ast.Load())))


def is_plain(node: ast.expr) -> bool:
    """Whether evaluating it calls nothing: names, constants, attributes and items of those."""
    match node:
        case ast.Name() | ast.Constant():
            return True
        case ast.Attribute(value=value):
            return is_plain(value)
        case ast.Subscript(value=value, slice=index):
            return is_plain(value) and is_plain(index)
        case ast.UnaryOp(operand=ast.Constant()):
            return True
        case ast.BinOp(left=left, right=right):
            return _is_index(left) and _is_index(right)
    return False


def frees(statement: ast.stmt) -> bool:
    """Whether a statement is one such as ``a = b = None``, by which torch.fx lets go of tensors."""
    match statement:
        case ast.Assign(targets=targets, value=ast.Constant(value=None)):
            return all(isinstance(target, ast.Name) for target in targets)
    return False


def raises_nothing(node: ast.expr, bound: set[str]) -> bool:
    """Whether evaluating it runs nothing and cannot fail."""
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in bound)


def asks_nothing(node: ast.expr) -> bool:
    """Whether the truth of what it gives is Python's own."""
    match node:
        case ast.Constant() | ast.UnaryOp(op=ast.Not()) | ast.Compare() | ast.BoolOp():
            return True
    return False


def containers(node: ast.expr) -> list[ast.expr]:
    """What a ``for`` over an expression of which :func:`runs_nothing` goes through."""
    match node:
        case ast.Call(func=ast.Name(), args=args):
            return [found for argument in args for found in containers(argument)]
        case ast.Call(func=ast.Attribute(value=owner)):
            return [owner]
        case ast.Constant():
            return []
    return [node]


def _is_index(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Constant)


def is_operand(node: ast.expr) -> bool:
    """Whether a sum of it may be one of tensors."""
    return not isinstance(node, ast.Constant | ast.JoinedStr | ast.List | ast.Tuple)


def runs_nothing(node: ast.expr) -> bool:
    """Whether going through its items runs no code but that of Python's and torch's containers."""
    match node:
        case ast.Call(func=ast.Name(id="enumerate" | "zip" | "range" | "reversed" | "len"), args=args, keywords=[]):
            return all(map(runs_nothing, args))
        case ast.Call(func=ast.Attribute(value=owner, attr=name), args=[], keywords=[]):
            return name in ("items", "values", "keys", "children", "named_children") and is_plain(owner)
    return is_plain(node)


def leaves(body: list[ast.stmt]) -> bool:
    """Whether nothing runs behind a block."""
    if not body:
        return False
    last = body[-1]
    if isinstance(last, ast.If):
        return leaves(last.body) and leaves(last.orelse)
    return isinstance(last, ast.Return | ast.Raise | ast.Break | ast.Continue)
