"""Reads what a module's forward does, by symbolic execution of it: the proof that a fused forward does the same.

A trace sees the module calls and tensor operations of one run. So that one run tells of every run, a forward is refused
that could do something else the next time or do more than return a result: one that uses names from outside torch,
computes with real tensors, writes attributes, or differs between training and evaluation.
"""

import builtins
import contextlib
import dis
import inspect
import operator
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .classes import Refused

_BUILTINS = frozenset(("len", "isinstance", "hasattr", "None", "True", "False"))
_READS_GLOBAL = frozenset(("LOAD_GLOBAL", "LOAD_NAME"))
_REACHES_OUT = frozenset(("LOAD_DEREF", "LOAD_CLASSDEREF", "STORE_GLOBAL", "IMPORT_NAME", "MAKE_FUNCTION"))

# What comes to the same, as (name, in place).
_RELU = {
    ("call_function", F.relu): False,
    ("call_function", torch.relu): False,
    ("call_function", torch.relu_): True,
    ("call_method", "relu"): False,
    ("call_method", "relu_"): True,
}
_ADD = {
    ("call_function", operator.add): False,
    ("call_function", torch.add): False,
    ("call_function", operator.iadd): True,
    ("call_method", "add"): False,
    ("call_method", "add_"): True,
}


class Step(NamedTuple):
    """One operation of a graph: kind is input, module, relu, add or other; name says which module or function it is."""

    kind: str
    name: str
    inputs: tuple
    inplace: bool = False


class Graph(NamedTuple):
    """What a forward does: the expression of its result, and how many operations it runs in all."""

    output: Step
    size: int


def trace(module: nn.Module) -> Graph:
    """The graph of ``module.forward`` with every submodule as one operation.

    Raises:
        Refused: the forward cannot be traced, or the trace would not tell of every run.
    """
    graphs = []
    for training in (True, False):
        with _in_mode(module, training):
            graphs.append(_trace(module))
    if graphs[0] != graphs[1]:
        raise Refused("its forward differs between training and evaluation")
    return graphs[0]


def check_forward(cls: type[nn.Module]) -> str:
    """The name of the forward's input; refuses a forward whose code reaches beyond it, the submodules and torch."""
    forward = cls.forward
    if not isinstance(forward, types.FunctionType):
        raise Refused("its forward is no plain function")
    parameters = list(inspect.signature(forward).parameters.values())
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise Refused("its forward does not take exactly one input")
    for instruction in dis.get_instructions(forward):
        name = instruction.argval
        if instruction.opname in _REACHES_OUT:
            raise Refused(f"its forward uses more than its input and submodules ({name or instruction.opname})")
        if instruction.opname in _READS_GLOBAL and not _is_known(name, forward.__globals__):
            raise Refused(f"its forward uses the name {name!r}, which is not torch's")
    for name in forward.__code__.co_names:
        member = inspect.getattr_static(cls, name, None)
        own = isinstance(member, (types.FunctionType, property, classmethod, staticmethod))
        if own and not hasattr(nn.Module, name):
            raise Refused(f"its forward uses {name!r}, defined in its own class")
    return parameters[1].name


def _is_known(name: str, namespace: dict[str, Any]) -> bool:
    if name not in namespace:
        return name in _BUILTINS and hasattr(builtins, name)
    value = namespace[name]
    if value is torch.relu or value is torch.relu_ or value is torch.add:
        return True  # functions in C do not know their module
    home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(home, str) and home.partition(".")[0] == "torch"


class _Proxy(fx.Proxy):
    def __iadd__(self, other):
        # torch.fx records "+=" as "+", which hides that the operand changes.
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Real(TorchDispatchMode):
    """Notices operations on real tensors, random ones say, which a symbolic trace would take for constants."""

    def __init__(self):
        super().__init__()
        self.name = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.name = str(func)
        return func(*args, **(kwargs or {}))


def _trace(module: nn.Module) -> Graph:
    if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
        raise Refused("it has parameters or buffers of its own")
    before = dict(vars(module))
    members = {key: dict(value) for key, value in before.items() if isinstance(value, dict)}
    real = _Real()
    try:
        with real:
            graph = _Tracer().trace(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Refused(f"its forward depends on data, or cannot be traced ({reason})") from error
    finally:
        changed = _restore(module, before, members)
    if changed:
        raise Refused(f"its forward writes attributes ({', '.join(changed)})")
    if real.name is not None:
        raise Refused(f"its forward computes with tensors other than its input ({real.name})")
    return _graph(graph)


def _restore(module: nn.Module, before: dict, members: dict[str, dict]) -> list[str]:
    """Undoes what a trace wrote, and names it."""
    now = vars(module)
    changed = [key for key in {**before, **now} if key not in before or key not in now or now[key] is not before[key]]
    for key, values in members.items():
        dictionary = before[key]
        if list(dictionary) != list(values) or any(dictionary[k] is not values[k] for k in values):
            changed.append(key)
            dictionary.clear()
            dictionary.update(values)
    if changed:
        now.clear()
        now.update(before)
    return changed


@contextlib.contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Sets the flag alone: train() may be overridden, and do more."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.__dict__["training"] = training
        yield
    finally:
        for m, mode in modes:
            m.__dict__["training"] = mode


def _graph(graph: fx.Graph) -> Graph:
    steps: dict[fx.Node, Step] = {}
    result = None
    for node in graph.nodes:
        if node.op == "output":
            result = node.args[0]
        else:
            steps[node] = _step(node, steps)
    if not isinstance(result, fx.Node):
        raise Refused("its forward does not return one tensor")
    return Graph(steps[result], len(steps))


def _step(node: fx.Node, steps: dict[fx.Node, Step]) -> Step:
    key = (node.op, node.target)
    inputs = tuple(steps.get(a, a) if isinstance(a, fx.Node) else a for a in node.args)
    if node.op == "placeholder":
        return Step("input", "", ())
    if node.op == "call_module" and not node.kwargs and len(node.args) == 1:
        return Step("module", node.target, inputs)
    if key in _RELU and len(inputs) == 1 and set(node.kwargs) <= {"inplace"}:
        return Step("relu", "relu", inputs, _RELU[key] or bool(node.kwargs.get("inplace")))
    if key in _ADD and len(inputs) == 2 and not node.kwargs and all(isinstance(i, Step) for i in inputs):
        inplace = _ADD[key]
        # The order of the operands counts only for the one that changes in place.
        return Step("add", "add", inputs if inplace else tuple(sorted(inputs, key=repr)), inplace)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    others = tuple(repr(a) for a in inputs if not isinstance(a, Step)) + tuple(map(repr, sorted(node.kwargs.items())))
    operands = tuple(steps[n] for n in node.all_input_nodes)
    return Step("other", " ".join((name, *others)), operands)
