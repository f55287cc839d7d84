"""What is known of the values in a forward that is followed (:mod:`.flow`)."""

from typing import Any, NamedTuple

from torch import nn


class Unknown:
    """A tensor that does not wait, or anything else."""


UNKNOWN = Unknown()


class Known(NamedTuple):
    """A module, a number or a container of such."""

    value: Any


class Bound(NamedTuple):
    """A method of a module that is known."""

    module: nn.Module
    name: str


class Fresh:
    """What a convolution has just made."""

    owned = True


class Norm:
    """A BatchNorm that waits, and the modules that must be fused for it to do so."""

    def __init__(self, bn: nn.Module, owned: bool, makers: frozenset[int]):
        self.bn = bn
        self.owned = owned
        self.makers = makers
        self.done = False


class Sum:
    """A sum that waits."""

    def __init__(self, left, right, owned: bool):
        self.left = left
        self.right = right
        self.owned = owned
        self.done = False


class Items:
    """A container of values."""

    def __init__(self, values: list):
        self.values = values


class Either:
    """One of several values, by the way that a method took."""

    def __init__(self, values: list):
        self.values = values


def either(values: list):
    """One of the values, whichever way was taken; of those that do not wait only that there is one."""
    flat = [one for value in values for one in alternatives(value)]
    unique = list({id(one): one for one in flat}.values())
    if len(unique) > 1:
        waiting = [one for one in unique if isinstance(one, Norm | Sum | Fresh)]
        unique = waiting + [UNKNOWN] if len(waiting) < len(unique) else waiting
    return unique[0] if len(unique) == 1 else Either(unique)


def alternatives(value) -> list:
    """The values that one may be."""
    return value.values if isinstance(value, Either) else [value]


def waits(value) -> bool:
    """Whether something may still be to be computed."""
    return any(isinstance(one, Norm | Sum) and not one.done for one in alternatives(value))


def is_owned(value) -> bool:
    """Whether it may wait while other modules run (:mod:`.deferred`)."""
    return all(getattr(one, "owned", False) and not getattr(one, "done", False) for one in alternatives(value))
