"""Follows the values of a model through its forwards, to say where the output of every BatchNorm goes.

The rewritten forwards are read, with the modules and constants that the model has at this moment, and nothing runs.
What is known are modules, numbers and containers of them; a tensor is only known as waiting (:mod:`.deferred`) or not.
Where a branch hangs on more than that, both ways are followed. The forward itself decides anew at every call, so an
error here would make a report wrong, and never a result.
"""

import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .. import bypass, modules
from . import families, kinds
from .classes import base_of
from .followed import UNKNOWN, Bound, Either, Fresh, Known, Norm, Sum, alternatives, either, is_owned, waits
from .methods import Methods, is_chain
from .paths import NUMBERS, Path
from .rewriting import Rewritten
from .source import Refused
from .tameness import is_tame
from .verdicts import BATCH_NORM, BATCH_NORM_ADD_RELU, BATCH_NORM_RELU, DUAL_BATCH_NORM_ADD_RELU, Verdict

# More than that of one module is not followed from it, but from what is within it.
_DEPTH = 40
_STEPS = 50_000
_SIDES = 8
# What convolutions make; one is like another.
_FRESH = Fresh()


class _Because(str):
    """A reason that is no name of what an output goes to."""


class Flow:
    """Follows a model.

    Attributes:
        verdicts: by ``id`` of a BatchNorm, what becomes of each of its calls.
        needed: by ``id``, the modules that must be fused for what is fused; the innermost ones.
        lost: by ``id``, of modules whose forward could not be followed, why.
        blocked: by ``id``, why the modules within a Sequential are not followed.
    """

    def __init__(self, model: nn.Module, opens: Callable[[nn.Module], bool], hopeful: bool):
        """Follows ``model``.

        Args:
            opens: whether the forward of a module is rewritten, or would be.
            hopeful: follow the model in any mode, not the one it is in, and as if no module had hooks.
        """
        self.opens = opens
        self.hopeful = hopeful
        self.verdicts: dict[int, list[Verdict]] = {}
        self.needed: set[int] = set()
        self.blocked: dict[int, str] = {}
        self.lost: dict[int, str] = {}
        self.names: dict[int, str] = {}
        self.visited: set[int] = set()
        self.depth = 0
        self.steps = 0
        self.methods = Methods()
        for name, module in model.named_modules():
            self.names.setdefault(id(module), name)
        for module in model.modules():
            if id(module) not in self.visited and opens(module):
                self.steps = 0
                self.forward(module, closed=True)

    def forward(self, module: nn.Module, value=UNKNOWN, closed: bool = False):
        """The value that the forward of ``module`` gives for one that may wait."""
        if self.depth > _DEPTH or self.steps > _STEPS:
            return UNKNOWN
        self.visited.add(id(module))
        closed = closed or base_of(module).__call__ is not nn.Module.__call__
        self.depth += 1
        frame = _Frame(self, module)
        try:
            if is_chain(base_of(module)):
                for child in module.children():
                    value = frame.call_module(child, value)
            else:
                value = frame.run(
                    self.methods.of(base_of(module))["forward"], (frame.settle(value, module),), is_open=True
                )
            return frame.settle(value, None) if closed else frame.returned(value)
        except Refused:
            return UNKNOWN
        except Exception as error:
            # Of something that no source was expected to say. It is reported, and the module runs as it is.
            self.lost[id(module)] = f"it could not be followed ({type(error).__name__}: {error})"
            return UNKNOWN
        finally:
            self.depth -= 1

    def obstacle(self, module: nn.Module, kind: kinds.Kind | None) -> str | None:
        """Why a module must be called; of those that may pass only where it matters."""
        if self.hopeful:
            return "was excluded from fuse()" if bypass.EXCLUDED in vars(module) else None
        reason = bypass.why_called(module) if kind is None else kinds.why_not(module, kind)
        return reason or bypass.why_all_watched()

    def verdict(self, bn: nn.Module, *verdict) -> None:
        """Notes what becomes of a call of ``bn``, in the order of :class:`Verdict`."""
        known = self.verdicts.setdefault(id(bn), [])
        new = Verdict(*verdict)
        if new not in known:
            known.append(new)

    def name(self, module: nn.Module, within: nn.Module) -> str:
        """The name of a module as the forward of another one knows it; in a Sequential, as the one around that does."""
        name, outer = self.names.get(id(module), ""), self.names.get(id(within), "")
        if is_chain(base_of(within)):
            outer = outer.rpartition(".")[0]
        return name[len(outer) + 1 :] if outer and name.startswith(f"{outer}.") else name

    def described(self, module: nn.Module, within: nn.Module) -> str:
        """The same with its class."""
        return f"{self.name(module, within)} ({type(module).__name__})"


class _Frame:
    """The forward of one module."""

    def __init__(self, flow: Flow, module: nn.Module):
        self.flow = flow
        self.module = module
        self.is_chain = is_chain(base_of(module))
        self.recompute = getattr(module, "_fusion_recompute", False)

    # Values

    def settle(self, value, consumer: Any, what: str = "output"):
        """What waits runs, for ``consumer``: a module, words, or None where it leaves the module."""
        for one in alternatives(value):
            if isinstance(one, Sum) and not one.done:
                one.done = True
                for part in (one.left, one.right):
                    self.settle(part, consumer, "sum")
            elif isinstance(one, Norm) and not one.done:
                one.done = True
                if isinstance(consumer, nn.Module):
                    consumer = self.flow.described(consumer, self.module)
                reason = f"its {what} leaves the module" if consumer is None else f"its {what} goes to {consumer}"
                reason = consumer if isinstance(consumer, _Because) else reason
                self.flow.verdict(one.bn, BATCH_NORM, reason, self.recompute)
        return UNKNOWN if waits(value) else value

    def returned(self, value):
        for one in alternatives(value):
            for part in (one.left, one.right) if isinstance(one, Sum) else (one,):
                if isinstance(part, Norm) and not self.is_chain:
                    part.makers |= {id(self.module)}
        return value

    def rectified(self, value, relu: Any) -> bool:
        """Whether a ReLU runs in one operator with what waits."""
        found = False
        if not self.flow.hopeful and bypass.is_relu_replaced():
            return False
        for one in alternatives(value):
            if isinstance(one, Norm) and not one.done:
                one.done = found = True
                self.fused(one, BATCH_NORM_RELU)
            elif isinstance(one, Sum) and not one.done:
                one.done = found = True
                for part in (one.left, one.right):
                    if isinstance(part, Sum):
                        self.settle(part, None)
                pair = [part for part in (one.left, one.right) if isinstance(part, Norm) and not part.done]
                joined = len(pair) == 2 and modules.can_join(*(_norm(part.bn) for part in pair))
                for index, part in enumerate(pair):
                    part.done = True
                    if joined:
                        self.fused(part, DUAL_BATCH_NORM_ADD_RELU)
                    elif index == 0:
                        self.fused(part, BATCH_NORM_ADD_RELU)
                    else:
                        self.flow.verdict(part.bn, BATCH_NORM, "the BatchNorm it is added to differs in mode or dtype")
        return found

    def fused(self, norm: Norm, name: str) -> None:
        self.flow.needed |= norm.makers | {id(self.module)}
        self.flow.verdict(norm.bn, name, None, self.recompute)

    # Calls

    def call_module(self, module: nn.Module, value):
        if isinstance(value, Either):
            if self.flow.opens(module) and not is_chain(base_of(module)):
                self.settle(value, module)
                return self.call_module(module, UNKNOWN)
            return either([self.call_module(module, one) for one in value.values])
        if self.flow.opens(module):
            obstacle = self.flow.obstacle(module, None)
            if obstacle is None:
                return self.flow.forward(module, value)
        kind = families.kind_of(module)
        if kind is None:
            self.settle(value, module)
            return UNKNOWN
        if kind.role == kinds.FRESH:
            self.settle(value, module)
            return _FRESH if kinds.makes_fresh(module, kind) else UNKNOWN
        reason = self.flow.obstacle(module, kind)
        if kind.role == kinds.NORM:
            return self.normalized(module, kind, value, reason)
        if reason is not None:
            self.settle(value, f"{self.flow.name(module, self.module)}, which {reason}")
            for part in module.modules():
                self.flow.blocked[id(part)] = f"{self.flow.name(module, self.module)} {reason}"
            return UNKNOWN
        if kind.role == kinds.RELU:
            if not self.rectified(value, module):
                self.settle(value, module)
            return UNKNOWN
        if kind.role == kinds.SAME and (self.flow.hopeful or kind.inactive is None or kind.inactive(module)):
            return value
        if kind.role == kinds.CHAIN:
            return self.flow.forward(module, value)
        self.settle(value, module)
        return UNKNOWN

    def normalized(self, bn: nn.Module, kind: kinds.Kind, value, reason: str | None):
        owned = is_owned(value)
        self.settle(value, bn)
        if reason is not None:
            self.flow.verdict(bn, None, f"{self.flow.name(bn, self.module)} {reason}")
            return UNKNOWN
        if kind.norm is not None and not _frozen_fits(bn):
            self.flow.verdict(bn, None, "its buffers differ in dtype, or have gradients")
            return UNKNOWN
        makers = frozenset() if self.is_chain else frozenset({id(self.module)})
        value = Norm(bn, owned, makers)
        for name in kind.tail:
            if hasattr(bn, name):
                value = self.call_module(getattr(bn, name), value)
        return value

    def call(self, now: bool, held: Iterable, function, args: list):
        if isinstance(function, Known) and isinstance(function.value, nn.Module):
            for value in held:
                for one in alternatives(value):
                    if not (is_owned(one) and self.is_tame(function.value) and self.apart(one, function.value)):
                        name = self.flow.name(function.value, self.module)
                        self.settle(one, _Because(f"{name} runs before it is used, and may look at its BatchNorm"))
            if len(args) != 1:
                for value in args:
                    self.settle(value, function.value)
                return UNKNOWN
            return self.fit(self.call_module(function.value, args[0]), now)
        if isinstance(function, Known) and function.value in bypass.RELUS:
            if not self.rectified(args[0], None):
                self.settle(args[0], "a ReLU")
            return UNKNOWN
        if isinstance(function, Known) and function.value is bypass.ADD:
            return self.add(now, False, *args)
        for value in (*held, *args):
            self.settle(value, "a call")
        if isinstance(function, Bound):
            return self.call_own(function, args)
        return UNKNOWN

    def call_own(self, function: Bound, args: list):
        if function.module is not self.module:
            return UNKNOWN
        method = self.flow.methods.of(base_of(self.module)).get(function.name)
        if method is None or self.flow.depth > _DEPTH:
            return UNKNOWN
        self.flow.depth += 1
        try:
            return self.run(method, tuple(args), is_open=False)
        finally:
            self.flow.depth -= 1

    def is_tame(self, module: nn.Module) -> bool:
        hopeful = self.flow.hopeful
        return all(
            (self.flow.opens(part) or is_tame(part)) and (hopeful or bypass.why_called(part) is None)
            for part in module.modules()
        )

    def apart(self, value, module: nn.Module) -> bool:
        if isinstance(value, Sum):
            return all(self.apart(part, module) for part in (value.left, value.right))
        return not isinstance(value, Norm) or all(part is not value.bn for part in module.modules())

    def fit(self, value, now: bool):
        """A value as it is where it may wait."""
        for one in alternatives(value):
            if not now and waits(one) and not is_owned(one):
                self.settle(one, "other code that may change what it is computed from")
        return value

    def add(self, now: bool, inplace: bool, left, right):
        owned = is_owned(left) and is_owned(right)
        for one in alternatives(left):
            if inplace and not (waits(one) or is_owned(one)):
                self.settle(right, "an add into another tensor")
                return UNKNOWN
        replaced = not self.flow.hopeful and bypass.is_add_replaced()
        if isinstance(left, Known) or isinstance(right, Known) or not (now or owned) or replaced:
            for value in (left, right):
                self.settle(value, "an add without a ReLU that is known")
            return UNKNOWN
        sides = [*alternatives(left), *alternatives(right)]
        if not any(isinstance(one, Norm | Sum) for one in sides):
            return _FRESH if owned else UNKNOWN
        if len(sides) > _SIDES:
            for value in (left, right):
                self.settle(value, "one of many sums")
            return UNKNOWN
        sums = [Sum(a, b, owned) for a in alternatives(left) for b in alternatives(right)]
        return sums[0] if len(sums) == 1 else either(sums)

    # Statements

    def run(self, method: Rewritten, args: tuple, is_open: bool):
        """What a method gives for its arguments; those that are not given are not known."""
        if self.flow.steps > _STEPS:
            return UNKNOWN
        variables = dict.fromkeys(method.arguments, UNKNOWN)
        variables.update(_defaults(method.original))
        variables.update(zip(method.arguments, args, strict=False))
        variables[method.me] = Known(self.module)
        path = Path(self, method, variables)
        returned = []
        ends = path.block(method.open_body if is_open else method.body, [path], returned)
        if ends:
            returned.append(Known(None))
        return either(returned) if returned else UNKNOWN


def _defaults(function: types.FunctionType) -> dict[str, Known]:
    """The arguments that are numbers where they are not given."""
    code, values = function.__code__, function.__defaults__ or ()
    named = dict(zip(code.co_varnames[code.co_argcount - len(values) : code.co_argcount], values, strict=True))
    named |= function.__kwdefaults__ or {}
    return {name: Known(value) for name, value in named.items() if type(value) in NUMBERS}


def _norm(bn: nn.Module):
    kind = families.kind_of(bn)
    if kind.norm is None:
        return bn
    return kinds.Frozen(bn.weight, bn.bias, bn.running_mean, bn.running_var, 0.0)


def _frozen_fits(bn: nn.Module) -> bool:
    buffers = bn.weight, bn.bias, bn.running_mean, bn.running_var
    return all(buffer.dtype == bn.weight.dtype and not buffer.requires_grad for buffer in buffers)
