"""Residual blocks of any class, when their forward is that of FusedResidualBlock (in either order) or FusedBottleneck.

Names do not matter: the forward is read, and what it does must be one of the three shapes to the last operation.
"""

import operator
import types
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import attributes, sites
from .classes import Fused, Refused
from .reading import Reading, Step, read
from .sites import FunctionalReLU, Site

_SHAPES = {
    ("conv", "bn", "relu", "conv", "bn"): False,
    ("conv", "bn", "relu", "bn", "conv"): True,
    ("conv", "bn", "relu", "conv", "bn", "relu", "conv", "bn"): False,
}
_NO_MODULE = {False: FunctionalReLU(False), True: FunctionalReLU(True)}


class Plan(NamedTuple):
    """The names of a block's input and parts.

    A ReLU is the name of a module, or says whether the function called for it is in place. The shortcut runs after
    ``shortcut_after`` convolutions with all that follows each. The plan holds while ``branches``, the attributes that
    the original branches on, are as they were seen.
    """

    argument: str
    convs: tuple[str, ...]
    bns: tuple[str, ...]
    relus: tuple[str | bool, ...]
    shortcut: str | None
    shortcut_after: int
    add_inplace: bool
    bn_before_last_conv: bool
    branches: tuple[tuple[str, Any], ...]


class FusedBlock(Fused):
    """The forward of a residual block, fused after a plan."""

    def forward(self, x: Tensor) -> Tensor:
        """What the forward of the original class computes."""
        plan = self._fusion_plan
        for name, before in plan.branches:
            if attributes.seen(getattr(self, name, None)) != before:
                return self._fusion_base.forward(self, x)
        shortcut = None if plan.shortcut is None else getattr(self, plan.shortcut)
        add = operator.iadd if plan.add_inplace else operator.add
        relus = [getattr(self, relu) if isinstance(relu, str) else _NO_MODULE[relu] for relu in plan.relus]
        bns = [getattr(self, bn) for bn in plan.bns]
        out = x
        for index, name in enumerate(plan.convs):
            # Where the original runs it: a shortcut may write its input in place, draw random numbers or have hooks.
            if index == plan.shortcut_after and shortcut is not None:
                shortcut = sites.early(shortcut, x, bns)
            if index < len(plan.convs) - 1:
                out = sites.batch_norm_relu(bns[index], relus[index], getattr(self, name)(out))
        last_conv = getattr(self, plan.convs[-1])
        if plan.bn_before_last_conv:
            return sites.add_relu(relus[-1], add, last_conv(sites.batch_norm(bns[-1], out)), x, shortcut)
        return sites.batch_norm_add_relu(bns[-1], relus[-1], add, last_conv(out), x, shortcut)

    @classmethod
    def _fusion_members(cls, plan: Plan) -> dict[str, Any]:
        """The forward, its input called as in the original, for callers that pass it by name."""
        code = cls.forward.__code__
        names = tuple(plan.argument if name == "x" else name for name in code.co_varnames)
        forward = types.FunctionType(code.replace(co_varnames=names), cls.forward.__globals__, "forward")
        forward.__doc__ = cls.forward.__doc__
        return {"forward": forward}

    @classmethod
    def _fusion_sites(cls, module: nn.Module, plan: Plan) -> tuple[Site, ...]:
        """Every BatchNorm of the plan, and the one that may end the shortcut."""
        relus = [relu if isinstance(relu, str) else None for relu in plan.relus]
        inner = [Site(bn, relu) for bn, relu in zip(plan.bns[:-1], relus, strict=False)]
        # None where the original branches on it and it was taken away.
        shortcut = None if plan.shortcut is None or getattr(module, plan.shortcut, None) is None else plan.shortcut
        end = Site(None if plan.bn_before_last_conv else plan.bns[-1], relus[-1], adds=True, shortcut=shortcut)
        alone = [Site(plan.bns[-1], rectifies=False)] if plan.bn_before_last_conv else []
        return *inner, *alone, end

    @classmethod
    def _fusion_obstacle(cls, module: nn.Module, plan: Plan) -> str | None:
        """Also that an attribute changed which the original branches on."""
        changed = [name for name, before in plan.branches if attributes.seen(getattr(module, name, None)) != before]
        if changed:
            return f"its forward branches on {', '.join(changed)}, which changed: unfuse() and fuse() again"
        return super()._fusion_obstacle(module, plan)


def recognize(module: nn.Module) -> tuple[type[Fused], Plan] | None:
    """The fused forward for ``module`` and its plan, or None for a module without BatchNorms of its own.

    Raises:
        Refused: the module has BatchNorms, but is no such block.
    """
    children = list(module.children())
    bns = sum(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in children)
    convs = sum(isinstance(child, nn.Conv2d) for child in children)
    name = type(module).__name__
    if bns == 0 or type(module).__module__.partition(".")[0] == "torch":
        return None
    if bns not in (2, 3) or convs != bns:
        raise Refused(f"{name} has {convs} Conv2d and {bns} BatchNorm of its own: no residual block known here")
    return FusedBlock, _plan(module, read(module))


def _plan(module: nn.Module, reading: Reading) -> Plan:
    rest, last_relu = _take_relu(module, reading.output)
    if rest is None:
        raise Refused(f"it ends with {_describe(module, reading.output)}, not with a ReLU")
    if rest.kind != "add":
        raise Refused(f"its last ReLU follows {_describe(module, rest)}, not the add of a shortcut")
    main, shortcut = rest.inputs
    if _is_shortcut(main) and not _is_shortcut(shortcut):
        if rest.inplace:
            raise Refused("it adds into its shortcut in place, which may be its input")
        main, shortcut = shortcut, main
    if not _is_shortcut(shortcut):
        raise Refused(f"it adds {_describe(module, shortcut)}, not its input or one module's output for it")

    kinds, names = [], []
    step = main
    while step.kind != "input":
        inner, relu = _take_relu(module, step)
        kind = "relu" if inner is not None else _kind(module, step)
        kinds.append(kind if kind in ("conv", "bn", "relu") else _describe(module, step))
        names.append(relu if kind == "relu" else step.name)
        if len(step.inputs) != 1:
            break
        step = step.inputs[0]
    kinds, names = tuple(reversed(kinds)), tuple(reversed(names))
    if kinds not in _SHAPES:
        raise Refused(f"its main branch is {', '.join(kinds) or 'empty'}; known are {_known_shapes()}")

    # The main branch, the add, the last ReLU, and a module on the shortcut.
    if len(reading.steps) != len(kinds) + 2 + (shortcut.kind == "module"):
        raise Refused("its forward does more than compute its result")

    plan = Plan(
        argument=reading.argument,
        convs=tuple(name for kind, name in zip(kinds, names, strict=True) if kind == "conv"),
        bns=tuple(name for kind, name in zip(kinds, names, strict=True) if kind == "bn"),
        relus=tuple(name for kind, name in zip(kinds, names, strict=True) if kind == "relu") + (last_relu,),
        shortcut=None if shortcut.kind == "input" else shortcut.name,
        shortcut_after=_position(reading, shortcut, kinds),
        add_inplace=rest.inplace,
        bn_before_last_conv=_SHAPES[kinds],
        branches=reading.branches,
    )
    _check_distinct(module, plan)
    return plan


def _position(reading: Reading, shortcut: Step, kinds: tuple[str, ...]) -> int:
    """After how many convolutions, each with what follows it, the shortcut runs."""
    if shortcut.kind == "input":
        return kinds.count("conv")
    before = reading.steps.index(shortcut)
    # Where the tutorial's order has "bn, conv" the BatchNorm belongs to the convolution behind it.
    starts = [0, *(i + 1 for i, kind in enumerate(kinds) if kind == "relu"), len(kinds)]
    if before not in starts:
        raise Refused("its shortcut runs between a convolution and the BatchNorm and ReLU of that")
    return starts.index(before)


def _take_relu(module: nn.Module, step: Step) -> tuple[Step, str | bool] | tuple[None, None]:
    """What a ReLU is applied to and which ReLU it is; (None, None) for any other step."""
    if step.kind == "relu":
        return step.inputs[0], step.inplace
    if step.kind == "module" and type(module.get_submodule(step.name)) is nn.ReLU:
        return step.inputs[0], step.name
    return None, None


def _is_shortcut(step: Step) -> bool:
    return step.kind == "input" or (step.kind == "module" and step.inputs[0].kind == "input")


def _kind(module: nn.Module, step: Step) -> str | None:
    if step.kind == "module":
        submodule = module.get_submodule(step.name)
        if isinstance(submodule, nn.Conv2d):
            return "conv"
        if isinstance(submodule, nn.modules.batchnorm._BatchNorm):
            return "bn"
    return None


def _describe(module: nn.Module, step: Step) -> str:
    if step.kind == "input":
        return "its input"
    return type(module.get_submodule(step.name)).__name__ if step.kind == "module" else step.kind


def _known_shapes() -> str:
    return " or ".join(", ".join(shape) for shape in _SHAPES)


def _check_distinct(module: nn.Module, plan: Plan) -> None:
    """Refuses a module used twice: its running statistics would depend on the order of the calls."""
    names = [*plan.convs, *plan.bns]
    parts = [module.get_submodule(name) for name in names]
    if plan.shortcut is not None:
        parts += list(module.get_submodule(plan.shortcut).modules())
    if len({id(part) for part in parts}) != len(parts):
        raise Refused("it uses one convolution or BatchNorm twice")
