"""Reads what a forward computes, from its source: nothing of the user's runs, so nothing is changed by looking.

The reader knows a small language: calls of submodules with one input, the spellings of ReLU and add, local variables,
and branches on constants and on which submodules there are. A forward that says anything else is refused, for what a
context manager, a call or a loop does is not seen in it. :mod:`resnet_fused.conversion.source` proves the source.
"""

import ast
import inspect
import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import attributes
from .classes import Refused
from .conditions import Conditions
from .source import definition, words

# Whether they work in place.
_RELU_FUNCTIONS = {F.relu: False, torch.relu: False, torch.relu_: True}
_RELU_METHODS = {"relu": False, "relu_": True}
_ADD_METHODS = {"add": False, "add_": True}


class Step(NamedTuple):
    """One operation: kind is input, module, relu or add; name is that of the submodule; inputs are steps."""

    kind: str
    name: str = ""
    inputs: tuple["Step", ...] = ()
    inplace: bool = False


class Reading(NamedTuple):
    """What a forward does.

    Attributes:
        argument: the name of its input.
        output: the expression of its result.
        steps: every operation that it runs, in order.
        branches: the attributes that it branches on, with what it sees of them (:func:`attributes.seen`).
    """

    argument: str
    output: Step
    steps: tuple[Step, ...]
    branches: tuple[tuple[str, Any], ...]


def read(module: nn.Module) -> Reading:
    """What the forward of ``module`` does at this moment.

    Raises:
        Refused: it says something that is not known here, with the words of the source.
    """
    forward = inspect.getattr_static(type(module), "forward")
    if not isinstance(forward, types.FunctionType):
        raise Refused("its forward is no plain function")
    code = forward.__code__
    if code.co_freevars or code.co_cellvars:
        names = ("super()" if name == "__class__" else name for name in code.co_freevars + code.co_cellvars)
        raise Refused(f"its forward uses more than its input and submodules ({', '.join(names)})")
    stars = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    if code.co_argcount != 2 or code.co_posonlyargcount or code.co_kwonlyargcount or stars or forward.__defaults__:
        raise Refused("its forward does not take exactly one input")
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise Refused("its forward is a generator or coroutine")
    reader = _Reader(module, forward)
    output = reader.run(definition(forward).body)
    if output is None:
        raise Refused("its forward does not return one tensor")
    return Reading(reader.argument, output, tuple(reader.steps), tuple(reader.conditions.seen.items()))


class _Reader:
    """Runs through a body with steps for tensors."""

    def __init__(self, module: nn.Module, forward: types.FunctionType):
        self.module = module
        self.namespace = forward.__globals__
        self.names = forward.__code__.co_varnames
        self.me, self.argument = self.names[:2]
        self.variables = {self.argument: Step("input")}
        self.steps: list[Step] = []
        self.conditions = Conditions(module, self.me, self.names, self.namespace)

    def run(self, body: list[ast.stmt]) -> Step | None:
        """What the body returns; None where it goes on behind it."""
        for statement in body:
            match statement:
                case ast.Return(value=ast.expr() as value):
                    return self.tensor(value)
                case ast.Assign(targets=targets, value=value):
                    names = [self.name(target) for target in targets]
                    self.variables |= dict.fromkeys(names, self.tensor(value))
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self.variables[self.name(target)] = self.tensor(value)
                case ast.AugAssign(target=target, op=ast.Add(), value=value):
                    name = self.name(target)
                    inputs = self.variable(target), self.tensor(value)
                    self.variables[name] = self.step(Step("add", inputs=inputs, inplace=True))
                case ast.If(test=test, body=then, orelse=otherwise):
                    returned = self.run(then if self.conditions.holds(test) else otherwise)
                    if returned is not None:
                        return returned
                case ast.Pass() | ast.Expr(value=ast.Constant()):
                    pass
                case ast.Expr(value=value):
                    self.tensor(value)
                case _:
                    raise _unknown(statement)
        return None

    def tensor(self, node: ast.expr) -> Step:
        """The value of an expression, its operations appended in the order that Python runs them."""
        match node:
            case ast.Name():
                return self.variable(node)
            case ast.Attribute(value=ast.Name(id=self.me), attr=name):
                attributes.read(self.module, name)  # which may have more to say against it
            case ast.IfExp(test=test, body=then, orelse=otherwise):
                return self.tensor(then if self.conditions.holds(test) else otherwise)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.step(Step("add", inputs=(self.tensor(left), self.tensor(right))))
            case ast.Call(func=ast.Attribute(value=ast.Name(id=self.me), attr=name), args=args, keywords=[]):
                return self.call_module(node, name, args)
            case ast.Call(func=func, args=args, keywords=keywords):
                function = self.function(func)
                if function is not None:
                    return self.call_function(node, function, args, keywords)
                if isinstance(func, ast.Attribute) and not keywords:
                    return self.call_method(node, func, args)
        raise _unknown(node)

    def call_module(self, node: ast.expr, name: str, args: list[ast.expr]) -> Step:
        submodule = attributes.read(self.module, name)
        if not isinstance(submodule, nn.Module):
            raise Refused(f"its forward calls {name!r}, which is no module but {submodule!r}")
        if len(args) != 1:
            raise _unknown(node)
        return self.step(Step("module", name, (self.tensor(args[0]),)))

    def call_function(self, node: ast.expr, function, args: list[ast.expr], keywords: list[ast.keyword]) -> Step:
        if function is torch.add and len(args) == 2 and not keywords:
            return self.step(Step("add", inputs=(self.tensor(args[0]), self.tensor(args[1]))))
        if function not in _RELU_FUNCTIONS or not args:
            raise _unknown(node)
        inplace = _RELU_FUNCTIONS[function]
        options = [*args[1:], *(keyword.value for keyword in keywords)]
        if options:
            flag = isinstance(options[0], ast.Constant) and type(options[0].value) is bool
            named = all(keyword.arg == "inplace" for keyword in keywords)
            if function is not F.relu or len(options) > 1 or not flag or not named:
                raise _unknown(node)
            inplace = options[0].value
        return self.step(Step("relu", inputs=(self.tensor(args[0]),), inplace=inplace))

    def call_method(self, node: ast.expr, method: ast.Attribute, args: list[ast.expr]) -> Step:
        name = method.attr
        if name in _RELU_METHODS and not args:
            return self.step(Step("relu", inputs=(self.tensor(method.value),), inplace=_RELU_METHODS[name]))
        if name in _ADD_METHODS and len(args) == 1:
            inputs = self.tensor(method.value), self.tensor(args[0])
            return self.step(Step("add", inputs=inputs, inplace=_ADD_METHODS[name]))
        raise _unknown(node)

    def function(self, node: ast.expr) -> Any:
        """The function that a name of the module, or a name of one of torch's modules, stands for."""
        value = None
        if isinstance(node, ast.Name) and node.id not in self.names:
            value = self.namespace.get(node.id)
        elif isinstance(node, ast.Attribute):
            home = self.function(node.value)
            value = vars(home).get(node.attr) if isinstance(home, types.ModuleType) else None
        kinds = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
        return value if isinstance(value, kinds) else None

    def variable(self, node: ast.Name) -> Step:
        if node.id not in self.variables:
            raise _unknown(node)
        return self.variables[node.id]

    def name(self, target: ast.expr) -> str:
        """The name of the variable that an assignment is to."""
        if isinstance(target, ast.Attribute):
            raise Refused(f"its forward writes attributes ({ast.unparse(target)})")
        # A name that is none of the function's own has been declared global.
        if not isinstance(target, ast.Name) or target.id == self.me or target.id not in self.names:
            raise _unknown(target)
        return target.id

    def step(self, step: Step) -> Step:
        self.steps.append(step)
        return step


def _unknown(node: ast.AST) -> Refused:
    return Refused(f"its forward says {words(node)}, which is not known here")
