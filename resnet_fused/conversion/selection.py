"""Which modules fuse() may change: those that can be rewritten and that include and exclude leave."""

import fnmatch
from collections.abc import Iterable

from torch import nn
from torch.fx import GraphModule

from ..modules import FusedBottleneck, FusedResidualBlock
from . import families, kinds, methods
from .classes import are_replaced, base_of, check_class, is_changed, is_fused, why_overridden
from .source import Refused

# torch.ao's, for quantization.
_QUANTIZATION = ("QuantStub", "DeQuantStub", "FloatFunctional", "QFunctional")


class Selection:
    """The modules of a model that may be fused, and why the others may not.

    Args:
        model: whose modules.
        include: names, patterns of names or predicates; a module may be fused where one of them has it, or a module
            around it. None for all modules.
        exclude: the same for modules that may not be fused.

    Raises:
        TypeError: a pattern is neither a string nor callable.
        ValueError: a pattern matches no module.
    """

    def __init__(self, model: nn.Module, include=None, exclude=None):
        self.reasons: dict[int, str] = {}
        self.limited: set[int] = set()
        self._known: dict[int, str | None] = {}
        self._methods = methods.Methods()
        names = list(model.named_modules(remove_duplicate=False))
        included = None if include is None else _matching(names, include, "include")
        excluded = set() if exclude is None else _matching(names, exclude, "exclude")
        for _, module in names:
            if (included is not None and id(module) not in included) or id(module) in excluded:
                self.limited.add(id(module))
                self.reasons[id(module)] = "it was excluded from fuse()"
            elif any(_is_of_quantization(child) for child in module.children()):
                for part in module.modules():
                    self.reasons[id(part)] = "it is made for quantization, which fuses and replaces BatchNorm itself"
            if self._asks_classes(module):
                for part in list(module.modules())[1:]:
                    self.reasons.setdefault(
                        id(part), f"{type(module).__name__} compares the exact classes of its parts"
                    )

    def allows(self, module: nn.Module) -> bool:
        """Whether ``module`` may be fused."""
        return self.why_not(module) is None

    def why_not(self, module: nn.Module) -> str | None:
        """Why ``module`` may not be fused; None where it may, or is none that could call a BatchNorm."""
        if id(module) not in self._known:
            self._known[id(module)] = self.reasons.get(id(module)) or self._obstacle(module)
        return self._known[id(module)]

    def _obstacle(self, module: nn.Module) -> str | None:
        if is_fused(module) and is_changed(module):
            return replaced(module)
        cls = base_of(module)
        kind = None if is_fused(module) else families.kind_of(module)
        if kind is not None and kind.role != kinds.CHAIN:
            return f"{cls.__name__} is known as it stands"
        if isinstance(module, FusedBottleneck | FusedResidualBlock):
            return "it is fused as it stands"
        chain = methods.is_chain(cls)
        try:
            if not chain and _is_torchs(cls) and not issubclass(cls, GraphModule):
                made_of = next((base.__name__ for base in cls.__mro__[:-1] if not _is_torchs(base)), None)
                if made_of is not None:  # by fully_shard
                    return f"torch made {cls.__name__} of {made_of}: fuse before that"
                return f"{cls.__name__} is torch's own"
            names = ("forward",) if chain else tuple(self._methods.of(cls))
            check_class(cls)
        except Refused as refusal:
            return str(refusal)
        return _on_the_instance(module, names)

    def _asks_classes(self, module: nn.Module) -> bool:
        try:
            found = self._methods.of(base_of(module))
        except Refused:
            return False
        return any(method.asks_classes for method in found.values())


def replaced(module: nn.Module) -> str | None:
    """Why the rewritten methods of a fused module do not run; None where they do."""
    cls = type(module)
    if are_replaced(cls):
        return "a method of its class was replaced after fuse()"
    return _on_the_instance(module, cls._fusion_originals) or why_overridden(cls)


def _on_the_instance(module: nn.Module, names: Iterable[str]) -> str | None:
    for name in names:
        if name in vars(module):
            return f"its {name} was replaced on the instance"
    return None


def _is_torchs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "torch"


def _is_of_quantization(module: nn.Module) -> bool:
    return type(module).__name__ in _QUANTIZATION and type(module).__module__.startswith(("torch.ao.", "torchao."))


def _matching(names: list[tuple[str, nn.Module]], patterns, argument: str) -> set[int]:
    """The modules that some pattern has, and all within these."""
    if isinstance(patterns, str) or callable(patterns):
        patterns = [patterns]
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{argument} must be a name pattern or a predicate, or several, got {type(patterns).__name__}")
    found: set[int] = set()
    for pattern in patterns:
        if not isinstance(pattern, str) and not callable(pattern):
            raise TypeError(f"{argument} must be name patterns or predicates, got {type(pattern).__name__}")
        matches = [
            module
            for name, module in names
            if (fnmatch.fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern(name, module))
        ]
        if not matches and isinstance(pattern, str):
            raise ValueError(f"{argument}={pattern!r} matches no module of the model")
        found.update(id(part) for module in matches for part in module.modules())
    return found
